import math

import pytest

from lit_specrl.prefix_cache.lenience import AdaptiveLenience


@pytest.mark.parametrize(
    ("kl", "lenience", "fraction"),
    [(0.0, 1.5, 1.0), (0.01, 1.5, 1.0), (0.016, 1.25, 1.0), (0.02, 1.0, 1.0), (0.08, 1.0, 0.25), (9.0, 1.0, 0.1)],
)
def test_a_slow_policy_is_met_with_lenience_and_a_fast_one_reuses_in_few_groups(kl, lenience, fraction):
    adaptive = AdaptiveLenience(target=0.02, high=1.5, min_fraction=0.1)
    adaptive.update(kl * 300, 300)
    assert (adaptive.value, adaptive.fraction) == pytest.approx((lenience, fraction))


def test_nothing_is_known_at_first():
    adaptive = AdaptiveLenience(target=0.02, low=1.1, min_fraction=0.2)
    assert (adaptive.value, adaptive.fraction) == (1.1, 0.2)
    adaptive.update(0.0, 0)  # no group had drafts
    assert (adaptive.value, adaptive.fraction) == (1.1, 0.2)


def test_the_mean_kl_over_all_groups_is_the_target_where_the_bounds_allow_it():
    adaptive = AdaptiveLenience(target=0.02)
    adaptive.update(30.0, 500)
    assert adaptive.fraction * 0.06 == pytest.approx(0.02)


def test_a_smallest_lenience_above_1_says_nothing_of_the_share():
    adaptive = AdaptiveLenience(target=0.02, low=1.3, high=2.0)
    adaptive.update(0.025, 1)
    assert (adaptive.value, adaptive.fraction) == pytest.approx((1.3, 0.8))


def test_steps_are_weighted_by_their_tokens_and_forgotten():
    adaptive = AdaptiveLenience(target=0.1, smoothing=0.5)
    adaptive.update(16.0, 40)
    adaptive.update(2.0, 80)
    assert adaptive.fraction == pytest.approx(0.1 * (20 + 80) / (8 + 2))
    for _ in range(20):
        adaptive.update(2.0, 10)
    assert adaptive.fraction == pytest.approx(0.5, rel=1e-3)


def test_without_smoothing_the_latest_step_decides():
    adaptive = AdaptiveLenience(target=0.1, smoothing=0)
    adaptive.update(1000.0, 10)
    adaptive.update(2.0, 10)
    assert adaptive.fraction == pytest.approx(0.5)


def test_resumes_where_it_was():
    first, second = AdaptiveLenience(target=0.02), AdaptiveLenience(target=0.02)
    first.update(5.0, 100)
    second.load_state_dict(first.state_dict())
    for adaptive in (first, second):
        adaptive.update(0.1, 50)
    assert (second.value, second.fraction) == (first.value, first.fraction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, r"target must be positive, got 0\.0"),
        ({"target": 0.1, "low": 0.0}, "0 < low <= high"),
        ({"target": 0.1, "high": 0.5}, "0 < low <= high"),
        ({"target": 0.1, "high": math.inf}, "0 < low <= high"),
        ({"target": 0.1, "smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1\.0"),
        (
            {"target": 0.1, "min_fraction": 0.0},
            r"min_fraction must lie in \(0, 1\], got 0.0; with 0 nothing would ever",
        ),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveLenience(**arguments)


@pytest.mark.parametrize("kl_sum", [math.nan, math.inf])
def test_what_is_no_number_is_refused(kl_sum):
    with pytest.raises(ValueError, match=r"kl_sum must be finite, got (nan|inf)"):
        AdaptiveLenience(target=0.02).update(kl_sum, 10)
