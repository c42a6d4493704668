import pytest

from lit_specrl.losses import KLCoefficient


def test_the_weight_follows_the_target_by_hand():
    coefficient = KLCoefficient(0.5, target=0.1, horizon=100)
    coefficient.update(kl=0.11, num_rows=50)  # a tenth above the target, half a horizon
    assert coefficient.value == pytest.approx(0.5 * 1.05)
    coefficient.update(kl=0.1, num_rows=50)
    assert coefficient.value == pytest.approx(0.5 * 1.05)
    coefficient.update(kl=0.09, num_rows=20)
    assert coefficient.value == pytest.approx(0.5 * 1.05 * 0.98)


@pytest.mark.parametrize(
    ("kl", "factor"), [(0.12, 1.2), (0.121, 1.2), (9.0, 1.2), (0.08, 0.8), (0.0, 0.8), (-1.0, 0.8)]
)
def test_the_error_is_clipped_to_a_fifth(kl, factor):
    coefficient = KLCoefficient(0.5, target=0.1, horizon=100)
    coefficient.update(kl, num_rows=100)
    assert coefficient.value == pytest.approx(0.5 * factor)


def test_without_a_target_the_weight_is_constant():
    coefficient = KLCoefficient(0.5)
    coefficient.update(kl=9.0, num_rows=100)
    assert coefficient.value == 0.5


def verl_update(value, target, horizon, current_kl, n_steps):
    """`AdaptiveKLController.update` of verl 0.9.1."""
    proportional_error = min(max(current_kl / target - 1, -0.2), 0.2)
    mult = 1 + proportional_error * n_steps / horizon
    return value * mult


@pytest.mark.parametrize("horizon", [10, 10_000])
def test_the_weight_follows_that_of_verl(horizon):
    coefficient, expected = KLCoefficient(0.1, target=0.02, horizon=horizon), 0.1
    for kl, num_rows in [(0.0, 8), (0.021, 8), (0.5, 16), (0.019, 3), (-0.2, 8)]:
        coefficient.update(kl, num_rows)
        expected = verl_update(expected, 0.02, horizon, kl, num_rows)
        assert coefficient.value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": -0.1}, "beta must not be negative, got -0.1; 0 switches the KL penalty off"),
        ({"value": 0.1, "target": 0.0}, "the KL target must be positive, got 0.0; leave it out for a constant beta"),
        ({"value": 0.0, "target": 0.1}, "the KL target 0.1 needs a positive beta to begin with, got 0"),
        ({"value": 0.1, "horizon": 0}, "the KL horizon must be at least 1 row, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KLCoefficient(**arguments)
