import numpy as np
import pytest

from lit_specrl.drafting.scheduler.acceptance_rates import AcceptanceRates


def drafts(chances, count, length, seed=0):
    """(drafted, accepted) by position of `count` drafts whose tokens are each accepted with a chance given those
    before."""
    generator = np.random.default_rng(seed)
    hits = (generator.random((count, length)) < np.array(chances)[:length]).cumprod(axis=1)
    return [count] * length, hits.sum(axis=0).tolist()


def test_chances_are_those_of_many_drafts():
    rates = AcceptanceRates(max_length=4, half_life=1e9)
    rates.observe(*drafts([0.9, 0.8, 0.5, 0.7], 20000, 4))
    np.testing.assert_allclose(rates.by_position, np.cumprod([0.9, 0.8, 0.5, 0.7]), atol=0.01)
    assert rates.emitted_tokens(0) == 1
    assert rates.emitted_tokens(4) == pytest.approx(1 + 0.9 + 0.72 + 0.36 + 0.252, abs=0.03)


def test_what_was_never_drafted_is_hoped_to_be_good_until_a_few_drafts_tell():
    rates = AcceptanceRates(max_length=4)
    assert rates.conditional.min() > 0.9
    rates.observe(*drafts([0.8, 0.6], 5000, 2))
    np.testing.assert_allclose(rates.conditional, [0.8, 0.6, 0.95, 0.95], atol=0.02)
    rates.observe([64] * 4, [48, 24, 0, 0])
    assert rates.conditional[2] < 0.2


def test_drafts_of_several_lengths_in_one_step():
    """Two requests drafted two tokens, one drafted one; both second tokens followed an accepted first one."""
    rates = AcceptanceRates(max_length=2, half_life=1e9)
    rates.observe(drafted=[3, 2], accepted=[2, 1])
    first = (2 + 4 * 0.95) / (3 + 4)  # four hoped-for drafts
    second = (1 + 4 * 0.95) / (2 + 4)
    np.testing.assert_allclose(rates.by_position, [first, first * second])


def test_old_drafts_are_forgotten():
    rates = AcceptanceRates(max_length=1, half_life=100)
    rates.observe([5000], [5000])
    for _ in range(200):
        rates.observe([10], [2])
    assert rates.by_position[0] == pytest.approx(0.2, abs=0.02)


def test_a_drafter_that_never_drafts_teaches_nothing():
    rates = AcceptanceRates(max_length=2)
    before = rates.by_position
    rates.observe([0, 0], [0, 0])
    rates.observe([], [])
    np.testing.assert_array_equal(rates.by_position, before)
    assert rates.num_drafts == 0


def test_resuming():
    rates, copy = AcceptanceRates(max_length=3), AcceptanceRates(max_length=2)
    rates.observe([10, 8, 8], [7, 5, 1])
    copy.load_state_dict(rates.state_dict())
    np.testing.assert_array_equal(copy.by_position, rates.by_position[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1 token, got 0"),
        ({"max_length": 2, "half_life": 0}, "half_life must be positive, got 0"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AcceptanceRates(**options)
