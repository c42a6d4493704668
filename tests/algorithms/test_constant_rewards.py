import warnings

import pytest

from lit_specrl.algorithms.constant_rewards import ConstantRewards


def warned(steps, num_steps=3):
    """Messages of a run of these steps."""
    rewards = ConstantRewards(num_steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            rewards.update(step)
    return [str(warning.message) for warning in caught]


def test_each_reward_that_stays_constant_is_named_once():
    steps = [{"math": [0.0, 0.0], "format": [1.0, step % 2], "brace{": [None, 1.0]} for step in range(7)]
    messages = warned(steps)
    assert [message.partition(" in 3 steps")[0] for message in messages] == [
        "reward 'math' gave all rows the same value (now 0.0)",
        "reward 'brace{' gave all rows the same value (now 1.0)",
    ]
    assert "Look at answer_format and the prompt template" in messages[0] and "columns" in messages[0]


def test_a_reward_that_scores_no_row_is_named():
    assert "reward 'math' scored no row in 3 steps in a row" in warned([{"math": [None, None]}] * 3)[0]


@pytest.mark.parametrize("between", [[0.0, 1.0], [0.5]])
def test_a_step_with_spread_or_of_one_row_ends_the_streak(between):
    flat = {"math": [0.0, 0.0]}
    assert warned([flat, flat, {"math": between}, flat, flat]) == []
