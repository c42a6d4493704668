import asyncio
import copy
import threading
import time
import warnings

import pytest

from lit_specrl.rewards import RewardFunction, RewardSet

SOON_S = 0.05
pytestmark = pytest.mark.timeout(60)


class Hanging:
    """A plain reward function that hangs until it is let go, and counts its calls."""

    def __init__(self):
        self.release = threading.Event()
        self.num_calls = 0

    def __call__(self, completions):
        self.num_calls += 1
        self.release.wait()
        return [1.0] * len(completions)

    def let_go(self):
        self.release.set()
        for thread in threading.enumerate():
            if thread.name == "reward":
                thread.join()

    def hang_again(self):
        self.release.clear()


class AsyncHanging:
    """An async reward function that hangs, and counts how often it was cancelled, until it is let go."""

    def __init__(self):
        self.is_released = False
        self.num_cancelled = 0

    async def __call__(self, completions):
        try:
            await asyncio.sleep(0 if self.is_released else 3600)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return [1.0] * len(completions)

    def let_go(self):
        self.is_released = True

    def hang_again(self):
        self.is_released = False


@pytest.fixture(params=[Hanging, AsyncHanging])
def hanging(request):
    function = request.param()
    yield function
    function.let_go()


def test_a_call_that_hangs_is_given_up_and_the_other_rewards_count(hanging):
    rewards = RewardSet([RewardFunction(hanging, name="slow", timeout_s=SOON_S), lambda completions: [2.0, 3.0]])
    with pytest.warns(
        UserWarning, match=r"reward 'slow' did not return within timeout_s=0.05: its 2 rows count as None"
    ):
        scores = rewards(["q"] * 2, ["t"] * 2)
    assert scores.values == [[None, None], [2.0, 3.0]]
    assert scores.total == [2.0, 3.0]
    assert scores.metrics["rewards/slow/timeouts"] == 2.0
    rewards.close()


def test_the_set_is_usable_after_a_hang_and_forgets_it(hanging):
    """Time-outs that do not follow each other never add up to the error."""
    rewards = RewardSet([RewardFunction(hanging, name="slow", timeout_s=SOON_S)])
    for _ in range(2):
        with pytest.warns(UserWarning, match="count as None"):
            assert rewards(["q"], ["t"]).values == [[None]]
    hanging.let_go()
    scores = rewards(["q"], ["t"])
    assert (scores.values, scores.metrics["rewards/slow/timeouts"]) == ([[1.0]], 0.0)
    hanging.hang_again()
    with pytest.warns(UserWarning, match="count as None"):
        assert rewards(["q"], ["t"]).values == [[None]]
    rewards.close()


def test_the_third_call_in_a_row_that_hangs_is_an_error_with_the_remedy(hanging):
    rewards = RewardSet([RewardFunction(hanging, name="slow", timeout_s=SOON_S)])
    for _ in range(2):
        with pytest.warns(UserWarning, match="count as None"):
            rewards(["q"], ["t"])
    with pytest.raises(
        RuntimeError, match=r"reward 'slow' failed: .* 3 calls in a row gave no scores.*Raise timeout_s"
    ):
        rewards(["q"], ["t"])
    hanging.let_go()
    assert rewards(["q"], ["t"]).values == [[1.0]]
    rewards.close()


def test_no_second_thread_is_started_while_one_hangs():
    hanging = Hanging()
    rewards = RewardSet([RewardFunction(hanging, name="slow", timeout_s=SOON_S)])
    with pytest.warns(UserWarning, match="did not return"):
        rewards(["q"], ["t"])
    with pytest.warns(UserWarning, match="'slow' has not come back from an earlier call: its 3 rows count as None"):
        scores = rewards(["q"] * 3, ["t"] * 3)
    assert (scores.values, scores.metrics["rewards/slow/timeouts"]) == ([[None] * 3], 3.0)
    assert hanging.num_calls == 1
    hanging.let_go()


def test_an_async_function_is_cancelled():
    hanging = AsyncHanging()
    rewards = RewardSet([RewardFunction(hanging, timeout_s=SOON_S)])
    with pytest.warns(UserWarning, match="did not return"):
        rewards(["q"], ["t"])
    assert hanging.num_cancelled == 1
    rewards.close()


def test_an_async_function_behind_a_plain_one_has_the_deadline_too():
    hanging = AsyncHanging()
    rewards = RewardSet([RewardFunction(lambda completions: hanging(completions), timeout_s=SOON_S)])
    with pytest.warns(UserWarning, match="did not return"):
        assert rewards(["q"], ["t"]).values == [[None]]
    rewards.close()


def raising_timeout(completions):
    raise TimeoutError("server")


async def raising_timeout_async(completions):
    raise TimeoutError("server")


@pytest.mark.parametrize("function", [raising_timeout, raising_timeout_async])
def test_what_the_function_raises_reaches_the_caller(function):
    """A TimeoutError of its own, as HTTP clients raise, is a failure and not the deadline."""
    rewards = RewardSet([RewardFunction(function, name="judge", timeout_s=30)])
    with pytest.raises(RuntimeError, match="reward 'judge' failed: TimeoutError: server") as caught:
        rewards(["q"], ["t"])
    assert isinstance(caught.value.__cause__, TimeoutError)
    rewards.close()


def test_a_call_in_time_costs_no_warning_and_uses_a_thread_of_its_own():
    threads = []

    def recording(completions):
        threads.append(threading.current_thread())
        return [1.0]

    rewards = RewardSet([RewardFunction(recording, timeout_s=30), RewardFunction(recording, name="free")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            assert rewards(["q"], ["t"]).metrics["rewards/recording/timeouts"] == 0.0
    assert threads[1] is threading.main_thread()
    assert threads[0] is not threading.main_thread() and threads[0].daemon


def test_a_failing_neighbour_leaves_no_coroutine_with_a_deadline_waiting(recwarn):
    def broken(completions):
        raise KeyError("level")

    rewards = RewardSet([RewardFunction(AsyncHanging(), timeout_s=30), broken])
    with pytest.raises(RuntimeError, match="reward 'broken' failed"):
        rewards(["q"], ["t"])
    assert not recwarn.list


def test_a_reward_with_a_deadline_can_be_copied_while_it_hangs():
    hanging = Hanging()
    rewards = RewardSet([RewardFunction(lambda completions: hanging(completions), name="slow", timeout_s=SOON_S)])
    with pytest.warns(UserWarning, match="did not return"):
        rewards(["q"], ["t"])
    copied = copy.deepcopy(rewards)
    hanging.let_go()
    assert copied(["q"], ["t"]).values == [[1.0]]


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf")])
def test_an_impossible_deadline_is_refused(timeout_s):
    with pytest.raises(ValueError, match=r"timeout_s must be a positive number of seconds, got .* leave it out"):
        RewardFunction(len, timeout_s=timeout_s)


def test_closing_does_not_wait_for_an_async_reward_that_blocks(monkeypatch):
    monkeypatch.setattr("lit_specrl.rewards.event_loop.CLOSE_LIMIT_S", SOON_S)
    entered, release = threading.Event(), threading.Event()

    async def blocking(completions):
        entered.set()
        release.wait()
        return [1.0]

    rewards = RewardSet([blocking])
    caller = threading.Thread(target=rewards, args=(["q"], ["t"]), daemon=True)
    caller.start()
    entered.wait()
    started_at = time.monotonic()
    rewards.close()
    assert time.monotonic() - started_at < 10
    release.set()
    assert rewards(["q"], ["t"]).values == [[1.0]]
    rewards.close()


@pytest.mark.parametrize(
    ("first", "error"),
    [(KeyError("level"), RuntimeError), ([1.0, 2.0], ValueError), (["1"], ValueError), ([float("nan")], UserWarning)],
)
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("timeout_s", [None, 30.0])
@pytest.mark.filterwarnings("error:reward 'given'")
def test_the_set_is_usable_after_a_reward_went_wrong(first, error, is_async, timeout_s):
    outcomes = [first, [1.0]]

    def given(completions):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def given_async(completions):
        return given(completions)

    rewards = RewardSet([RewardFunction(given_async if is_async else given, name="given", timeout_s=timeout_s)])
    with pytest.raises(error, match="reward 'given'"):
        rewards(["q"], ["t"])
    assert rewards(["q"], ["t"]).values == [[1.0]]
    rewards.close()
