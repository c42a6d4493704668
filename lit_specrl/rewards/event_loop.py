"""Coroutines run to their end from code that is none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import Any

CLOSE_LIMIT_S = 5.0


class EventLoop:
    """An event loop on a thread of its own, started when it is first needed.

    `asyncio.run` would not do: it fails inside a running loop (a notebook), and each call would close the loop that the
    network sessions of rewards and tools belong to.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type[EventLoop], tuple[()]]:
        return EventLoop, ()

    def gather(self, awaitables: list[Awaitable[Any]]) -> list[Any]:
        """Await all at the same time; an exception comes back as a value."""
        if not awaitables:
            return []
        with self._lock:
            if self._loop is None or self._thread is None or not self._thread.is_alive():  # not alive: a forked child
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="coroutines", daemon=True)
                self._thread.start()

        async def gather_all() -> list[Any]:
            return await asyncio.gather(*awaitables, return_exceptions=True)

        return asyncio.run_coroutine_threadsafe(gather_all(), self._loop).result()

    def close(self) -> None:
        """Stop the loop; the next call starts another."""
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_LIMIT_S)
            if not self._thread.is_alive():  # alive: an async reward blocks it; waiting on would hide that from Ctrl-C
                self._loop.close()
        self._loop = self._thread = None
