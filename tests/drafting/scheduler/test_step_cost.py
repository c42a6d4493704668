"""Times of steps that were never seen, from those that were."""

import numpy as np
import pytest

from lit_specrl.drafting.scheduler.step_cost import StepCost


def seconds(rows, drafted):
    tokens = rows + drafted
    return 0.01 + 1e-5 * rows + 2e-5 * tokens + 1e-4 * max(0, tokens - 64)


@pytest.fixture
def cost():
    cost = StepCost()
    generator = np.random.default_rng(0)
    for _ in range(300):
        rows = int(generator.choice([1, 4, 16, 64]))
        cost.observe(rows, drafted := rows * int(generator.integers(0, 9)), seconds(rows, drafted))
    cost.fit()
    return cost


@pytest.mark.parametrize(("rows", "drafted"), [(1, 5), (4, 3), (16, 40), (32, 100), (64, 20)])
def test_steps_that_were_never_seen(cost, rows, drafted):
    assert cost.seconds(rows, drafted) == pytest.approx(seconds(rows, drafted), rel=0.05)


def test_more_tokens_never_take_less(cost):
    assert (np.diff(cost.curve(16, 200)) >= 0).all()


def test_a_disturbed_step_counts_little(cost):
    before = cost.seconds(16, 16)
    cost.observe(16, 16, 100 * before)
    cost.fit()
    assert cost.seconds(16, 16) < 1.1 * before


def test_another_engine_is_learnt():
    cost = StepCost(half_life=50)
    for factor in (1.0, 1.4):
        for _ in range(100):
            for rows, drafted in ((1, 0), (1, 4), (8, 0), (8, 8)):
                cost.observe(rows, drafted, factor * seconds(rows, drafted))
            cost.fit()
    assert cost.seconds(8, 8) == pytest.approx(1.4 * seconds(8, 8), rel=0.05)


def test_what_was_learnt_goes_through_a_checkpoint(cost):
    other = StepCost()
    other.load_state_dict(cost.state_dict())
    assert other.num_steps == cost.num_steps and (other.curve(16, 20) == cost.curve(16, 20)).all()


def test_nothing_is_predicted_before_a_step_was_timed():
    assert not StepCost().is_known
    with pytest.raises(ValueError, match="no step of the engine has been timed yet"):
        StepCost().curve(1, 1)
