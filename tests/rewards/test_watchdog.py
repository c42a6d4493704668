import asyncio
import threading
import time
import warnings
from contextlib import suppress

import pytest

from lit_specrl.rewards import Reward, RewardSet

pytestmark = pytest.mark.timeout(60)


class SlowReward(Reward):
    def __call__(self, prompts, completions, **columns):
        time.sleep(0.3)
        return [1.0] * len(completions)


async def slow(completions):
    await asyncio.sleep(0.3)
    return [1.0] * len(completions)


async def quick(completions):
    return [1.0] * len(completions)


@pytest.mark.parametrize("reward", [SlowReward(), slow])
def test_a_reward_that_takes_long_is_named_once_per_call(reward):
    rewards = RewardSet([quick, reward], warn_after_s=0.05)
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"reward 'slow' has been running for 0.05 s, since \d\d:\d\d:\d\d"
        ) as caught:
            assert rewards(["q"], ["t"]).total == [2.0]
        assert len(caught) == 1
    rewards.close()


def test_the_warning_comes_while_the_reward_hangs():
    warned = threading.Event()

    def hanging(completions):
        return [float(warned.wait(30))]

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *arguments: warned.set()
        assert RewardSet([hanging], warn_after_s=0.05)(["q"], ["t"]).total == [1.0]


def test_a_slow_call_does_not_hide_a_later_hang(monkeypatch):
    """Python shows equal warnings only once."""
    moments = iter(["10:00:00", "10:05:00"])
    monkeypatch.setattr("lit_specrl.rewards.watchdog.time.strftime", lambda form: next(moments))
    rewards = RewardSet([SlowReward()], warn_after_s=0.05)
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *arguments: shown.append(str(message))
        for _ in range(2):
            rewards(["q"], ["t"])
    assert len(shown) == 2


def broken(completions):
    raise KeyError("level")


async def broken_async(completions):
    raise KeyError("level")


@pytest.mark.parametrize("reward", [quick, broken, broken_async])
@pytest.mark.parametrize("warn_after_s", [3600.0, None])
def test_no_timer_outlives_the_call(reward, warn_after_s):
    others = set(threading.enumerate())
    rewards = RewardSet([reward], warn_after_s=warn_after_s)
    with suppress(RuntimeError):
        rewards(["q"], ["t"])
    for thread in set(threading.enumerate()) - others:
        if isinstance(thread, threading.Timer):
            thread.join(5)
            assert not thread.is_alive()
    rewards.close()


@pytest.mark.parametrize("warn_after_s", [0, -1.0, float("nan"), float("inf")])
def test_an_impossible_limit_is_refused(warn_after_s):
    with pytest.raises(
        ValueError, match=r"warn_after_s must be a positive number of seconds, got .*; None never warns"
    ):
        RewardSet([quick], warn_after_s=warn_after_s)
