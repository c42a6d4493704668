"""Wall time by stage of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Adds up the seconds spent in named stages, until they are taken out.

    Stages must not be nested: what they add up to is then at most the time that has passed.

    Args:
        on_start: called with the name of a stage that begins.
        on_progress: called with the name of the present stage, how many of its parts are done, and of how many.

    Example:
        >>> timer = StageTimer()
        >>> with timer("gen"):
        ...     pass
        >>> list(timer.pop())
        ['gen']
    """

    def __init__(
        self,
        on_start: Callable[[str], None] | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._on_start, self._on_progress = on_start, on_progress
        self._stage = ""
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started_at, self._stage = time.perf_counter(), stage
        if self._on_start is not None:
            self._on_start(stage)
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # otherwise the next stage pays for the kernels of this one
            self.seconds[stage] += time.perf_counter() - started_at

    def tell(self, num_done: int, num_parts: int) -> None:
        """How far the present stage is."""
        if self._on_progress is not None:
            self._on_progress(self._stage, num_done, num_parts)

    def pop(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds
