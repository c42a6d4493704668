"""What vLLM does while it starts, in a few lines; its own log would fill screens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_STAGES = {
    "Starting to load model": "loads the model",
    "Loading model from scratch": "loads the model",
    "Loading drafter model": "loads the drafter",
    "Starting torch.compile": "compiles the model; that is cached for the next start",
    "Directly load the compiled graph": "takes compiled code from its cache",
    "KV cache size": "has the memory of its key-value cache",
    "JIT kernel warmup starting": "compiles kernels; they are cached for the next start",
    "Warming up": "warms up",
    "Profiling CUDA graph memory": "measures the memory of CUDA graphs",
    "Graph capturing finished": "has captured its CUDA graphs",
}
"""Beginnings or parts of vLLM's lines -> what they mean to whoever waits; lines without a meaning are not told."""


class _Stages(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._say, self._told, self._started_at = say, "", time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        stage = next((meaning for part, meaning in _STAGES.items() if part in line), self._told)
        if stage != self._told:
            self._told = stage
            self._say(f"{time.perf_counter() - self._started_at:4.0f} s  vLLM {stage}")


@contextmanager
def told_by_vllm(say: Callable[[str], None]) -> Iterator[None]:
    """Say each stage of a start as it begins; vLLM's own log stays at its level.

    vLLM must have been imported: that sets its log up anew.

    Args:
        say: takes a line.
    """
    logger = logging.getLogger("vllm")
    own, level = [(handler, handler.level) for handler in logger.handlers], logger.level
    for handler, handler_level in own:
        handler.setLevel(max(handler_level, level))
    stages = _Stages(say)
    logger.addHandler(stages)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(stages)
        logger.setLevel(level)
        for handler, handler_level in own:
            handler.setLevel(handler_level)
