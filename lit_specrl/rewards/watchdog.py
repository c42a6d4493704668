"""A warning while a reward takes long."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lit_specrl.rewards.base import Reward


@contextmanager
def warning_when_slow(reward: Reward, warn_after_s: float | None) -> Iterator[None]:
    """Warn once, from a timer thread, if the block still runs after `warn_after_s` seconds; `None` never warns."""
    if warn_after_s is None:
        yield
        return
    timer = threading.Timer(warn_after_s, _warn, [reward, warn_after_s, time.strftime("%H:%M:%S")])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _warn(reward: Reward, elapsed_s: float, started_at: str) -> None:
    # The moment also makes the text new: Python shows equal warnings only once, which would hide a hang after a slow
    # call.
    warnings.warn(
        f"reward {reward.name!r} has been running for {elapsed_s:g} s, since {started_at}, and training waits for it. "
        "If it hangs, give its own calls (requests, processes) a time limit, or a function a "
        "RewardFunction(timeout_s=...).",
        stacklevel=2,
    )
