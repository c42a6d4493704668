import asyncio
import copy
import functools
import inspect
import math

import numpy as np
import pytest
import torch

from lit_specrl.rewards import FormatReward, Reward, RewardFunction, RewardSet


def returning(values, name="given", weight=1.0):
    return RewardFunction(lambda completions: values, weight=weight, name=name)


def test_the_total_is_the_weighted_sum_over_the_rewards_that_apply():
    rewards = RewardSet([returning([1.0, 0, None, None], "a"), returning([1, None, True, None], "b", weight=0.5)])
    scores = rewards(["q"] * 4, ["t"] * 4)
    assert scores.names == ["a", "b"]
    assert scores.values == [[1.0, 0.0, None, None], [1.0, None, 1.0, None]]
    assert scores.total == [1.5, 0.0, 0.5, 0.0]
    assert (scores.num_unscored, scores.num_nonfinite) == (1, 0)


def test_conversations_are_given_as_trl_gives_them():
    given = []

    def function(prompts, completions, level):
        given.append((prompts, completions))
        return level

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    reward = RewardFunction(function, conversational=True)
    RewardSet([reward])(["p", "q"], ["yes", "no"], level=[1, 2], prompt_messages=[turns, []])
    user = [{"role": "user", "content": "Hi"}]
    assert given == [
        (
            [user, [{"role": "user", "content": "q"}]],
            [[{"role": "assistant", "content": "Well, yes"}], [{"role": "assistant", "content": "no"}]],
        )
    ]
    assert len(turns) == 2  # of the data, for the next epoch


def test_nan_and_infinity_count_as_none_with_a_warning():
    rewards = RewardSet([returning([math.nan, math.inf, 1.0, None])])
    with pytest.warns(UserWarning, match="reward 'given' returned NaN or infinity for 2 of 4 rows"):
        scores = rewards(["q"] * 4, ["t"] * 4)
    assert scores.values == [[None, None, 1.0, None]]
    assert scores.total == [0.0, 0.0, 1.0, 0.0]
    assert (scores.num_nonfinite, scores.num_unscored) == (2, 3)
    assert scores.metrics == {"rewards/given/nonfinite": 2.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "reward 'given' must return one number .* expected 2, got 1"),
        ([1.0] * 3, "reward 'given' must return one number .* expected 2, got 3"),
        (None, "reward 'given' must return a list of 2 numbers, got NoneType"),
        (0.5, "reward 'given' must return a list of 2 numbers, got float"),
        ([0.0, "1"], "reward 'given' must return numbers or None, got '1' of type str for row 1"),
    ],
)
def test_scores_of_the_wrong_form_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RewardSet([returning(values)])(["q"] * 2, ["t"] * 2)


@pytest.mark.parametrize(
    "values",
    [
        [np.float32(0.5), np.int64(1), np.bool_(True), None],
        [torch.tensor(0.5), torch.tensor(1), torch.tensor(True), None],
        [torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), np.array(1.0), np.array(True), None],
        np.array([0.5, 1, 1, None], dtype=object),
        (0.5, 1, True, None),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_scalars_of_numpy_and_torch_are_numbers(values, is_async):
    async def later(completions):
        return values

    scores = RewardSet([later if is_async else returning(values)])(["q"] * 4, ["t"] * 4)
    assert scores.values == [[0.5, 1.0, 1.0, None]]
    assert all(type(value) is float for value in scores.values[0][:3])


@pytest.mark.parametrize(
    "values", [np.array([0.5, 1.0]), np.array([0.5, 1.0], np.float16), torch.tensor([0.5, 1.0], requires_grad=True)]
)
def test_arrays_and_tensors_are_lists_of_numbers(values):
    assert RewardSet([returning(values)])(["q"] * 2, ["t"] * 2).values == [[0.5, 1.0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 1)), r"reward 'given' must return a list of 2 numbers, got ndarray of shape \(2, 1\)"),
        (torch.zeros(2, 2), r"got Tensor of shape \(2, 2\); return one number per completion, shape \(2,\)"),
        (torch.tensor(1.0), "must return a list of 2 numbers, got Tensor"),
        (np.float64(1.0), "must return a list of 2 numbers, got float64"),
        (torch.zeros(3), "expected 2, got 3"),
        (np.array([1j, 0]), r"must return numbers or None, got 1j of type complex for row 0"),
        ([1.0, 1j], "got 1j of type complex for row 1"),
        ([np.complex64(1), 1.0], r"got \(1\+0j\) of type complex for row 0"),
        (np.array(["1", "2"]), "got '1' of type str for row 0"),
        ([torch.zeros(1), 1.0], "of type Tensor for row 0"),
        ({0: 1.0, 1: 2.0}, "got dict"),
        ({0.0, 1.0}, "got set"),
        (b"ab", "got bytes"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_arrays_of_the_wrong_form_are_refused(values, message, is_async):
    async def given(completions):
        return values

    with pytest.raises(ValueError, match=message):
        RewardSet([given if is_async else returning(values)])(["q"] * 2, ["t"] * 2)


def test_a_whole_number_beyond_the_floats_counts_as_infinity():
    with pytest.warns(UserWarning, match="NaN or infinity for 1 of 2 rows"):
        assert RewardSet([returning([10**400, 1])])(["q"] * 2, ["t"] * 2).values == [[None, 1.0]]


def broken(completions):
    raise KeyError("level")


async def broken_async(completions):
    raise KeyError("level")


@pytest.mark.parametrize("function", [broken, broken_async])
def test_a_reward_that_raises_is_named_and_keeps_its_cause(function):
    async def fine(completions):
        return [1.0]

    rewards = RewardSet([fine, function])
    with pytest.raises(RuntimeError, match=f"reward '{function.__name__}' failed: KeyError: 'level'") as caught:
        rewards(["q"], ["t"])
    assert isinstance(caught.value.__cause__, KeyError)
    rewards.close()


def test_a_raising_reward_leaves_no_coroutine_waiting():
    async def fine():
        return [1.0]

    coroutine = fine()
    with pytest.raises(RuntimeError, match="reward 'broken' failed"):
        RewardSet([returning(coroutine), broken])(["q"], ["t"])
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@pytest.mark.timeout(30)
def test_async_rewards_run_at_the_same_time_and_beside_plain_ones():
    """Each of the two waits for the other: one after the other they would wait for ever."""
    arrived = [asyncio.Event(), asyncio.Event()]

    async def first(completions):
        arrived[0].set()
        await arrived[1].wait()
        return [1.0]

    async def second(completions):
        arrived[1].set()
        await arrived[0].wait()
        return [2.0]

    rewards = RewardSet([first, returning([4.0]), second])
    assert rewards(["q"], ["t"]).values == [[1.0], [4.0], [2.0]]
    rewards.close()


def test_async_rewards_keep_their_event_loop_between_calls_and_work_inside_a_running_one():
    loops = []

    async def recording(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0]

    rewards = RewardSet([recording])

    async def notebook():
        return rewards(["q"], ["t"]).total

    assert rewards(["q"], ["t"]).total == asyncio.run(notebook()) == [1.0]
    assert loops[0] is loops[1]
    rewards.close()
    assert rewards(["q"], ["t"]).total == [1.0]
    assert copy.deepcopy(rewards)(["q"], ["t"]).total == [1.0]
    rewards.close()


def test_columns_reach_every_reward_and_counters_become_metrics():
    class LevelReward(Reward):
        def __call__(self, prompts, completions, **columns):
            self.counters = {"timeouts": 3}
            return columns["level"]

    scores = RewardSet([LevelReward(), FormatReward("t")])(["q"] * 2, ["t", "u"], level=[5, 6])
    assert scores.values == [[5.0, 6.0], [1.0, 0.0]]
    assert scores.metrics == {
        "rewards/level/timeouts": 3.0,
        "rewards/level/nonfinite": 0.0,
        "rewards/format/nonfinite": 0.0,
    }


def test_a_reward_that_names_its_columns_is_given_those_alone():
    class LevelReward(Reward):
        def __call__(self, prompts, completions, level):
            return [number * len(text) for number, text in zip(level, completions, strict=True)]

    assert RewardSet([LevelReward()])(["q"] * 2, ["t", "uv"], level=[5, 6], answer=["a"] * 2).total == [5.0, 12.0]


def test_columns_that_a_call_names_are_needed():
    def with_lengths(call):
        @functools.wraps(call)
        def wrapper(self, prompts, completions, **columns):
            return call(self, prompts, completions, lengths=[len(text) for text in completions], **columns)

        return wrapper

    class Gold(Reward):
        def __call__(self, prompts, completions, gold, level=1):
            return gold

    class Answer(Gold):
        def __call__(self, prompts, completions, answer):
            return answer

    class OfArguments(Gold):
        def __init__(self, column):
            super().__init__()
            self.required_columns = (column,)

    class OfProperty(Reward):
        required_columns = property(lambda self: ("shown",))

        @with_lengths
        def __call__(self, prompts, completions, lengths, **columns):
            return [length + number for length, number in zip(lengths, columns["shown"], strict=True)]

    found = [reward.needed_columns() for reward in (Gold(), Answer(), OfArguments("x"), OfProperty())]
    assert found == [{"gold"}, {"answer"}, {"x", "gold"}, {"shown"}]
    assert RewardSet([OfProperty()])(["q"], ["ab"], shown=[3]).total == [5.0]


def test_a_single_reward_needs_no_list():
    def level(level):
        return level

    assert [RewardSet(one).rewards[0].name for one in (level, FormatReward("t"), "math.sqrt")] == [
        "level",
        "format",
        "sqrt",
    ]


@pytest.mark.parametrize("reward", [FormatReward, "lit_specrl.rewards.FormatReward"])
def test_a_class_is_no_reward(reward):
    with pytest.raises(
        TypeError, match=r"got the class FormatReward; give an instance, such as FormatReward\(\), or cl"
    ):
        RewardSet([reward])


def test_closing_closes_every_reward():
    closed = []

    class HoldingReward(Reward):
        def __call__(self, prompts, completions, **columns):
            return [0.0]

        def close(self):
            closed.append(self.name)

    RewardSet([HoldingReward(name="a"), HoldingReward(name="b")]).close()
    assert closed == ["a", "b"]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [([], "at least one reward"), ([FormatReward("a"), FormatReward("b")], "2 rewards are named 'format'")],
)
def test_impossible_sets_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        RewardSet(rewards)


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="column 'answer' has 1 rows, completions has 2"):
        RewardSet([returning([0, 0])])(["q"] * 2, ["t"] * 2, answer=["5"])
