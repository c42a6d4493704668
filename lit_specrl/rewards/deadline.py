"""Calls that are given up when they take too long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class DeadlinePassed(Exception):
    """A call did not return in time; not a `TimeoutError`, which the called function may raise on its own account."""


class DeadlineThread:
    """Calls plain functions on a daemon thread and stops waiting at a deadline.

    Why a thread and not a process: the function may be a closure and may hold models, clients and counters, none of
    which travels to a process and back. The price is that Python cannot kill a thread. One that is given up is left
    behind and ends with the process; no other is started beside it. Code that holds the interpreter lock, such as a
    runaway regular expression or `9**9**9`, stops the waiting thread too.

    Args:
        timeout_s: time for one call, in seconds.

    Example::

        DeadlineThread(timeout_s=5.0).call(lambda: 6 * 7)  # 42
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type[DeadlineThread], tuple[float]]:
        return DeadlineThread, (self.timeout_s,)

    def call(self, function: Callable[[], T]) -> T:
        """Return what `function` returns, or raise what it raises.

        Raises:
            DeadlinePassed: it did neither in time, or an earlier call still has not.
        """
        if self._thread is not None and self._thread.is_alive():
            raise DeadlinePassed("has not come back from an earlier call")
        future: Future[T] = Future()
        self._thread = threading.Thread(target=_fulfil, args=(future, function), name="reward", daemon=True)
        self._thread.start()
        self._thread.join(self.timeout_s)
        if self._thread.is_alive():
            raise DeadlinePassed(f"did not return within timeout_s={self.timeout_s}")
        return future.result()


def _fulfil(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # the thread that waits raises it
        future.set_exception(error)


async def await_until_deadline(awaitable: Awaitable[T], timeout_s: float) -> T:
    """Return what `awaitable` comes to, or cancel it after `timeout_s` seconds.

    Raises:
        DeadlinePassed: it was cancelled.
    """
    deadline = asyncio.timeout(timeout_s)  # `wait_for` could not tell its own TimeoutError from one raised inside
    try:
        async with deadline:
            return await awaitable
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise DeadlinePassed(f"did not return within timeout_s={timeout_s}") from error
