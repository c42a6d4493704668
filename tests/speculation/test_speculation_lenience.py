import math

import pytest

from lit_specrl.speculation import AdaptiveLenience


def test_moves_by_the_relative_error_in_log_lenience():
    lenience = AdaptiveLenience(target=0.02, low=1.0, high=math.e, rate=0.1)
    observations = [0.01, 0.02, 0.0, 0.03]
    moved = [math.log(lenience.update(observed)) for observed in observations]
    assert moved == pytest.approx([0.05, 0.05, 0.15, 0.10])


@pytest.mark.parametrize("observed", [0.5, math.inf])
def test_one_wild_observation_moves_it_by_no_more_than_the_rate(observed):
    lenience = AdaptiveLenience(target=0.02, rate=0.1)
    lenience.load_state_dict({"log_lenience": 0.5})
    assert math.log(lenience.update(observed)) == pytest.approx(0.4)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_settles_where_a_monotone_plant_meets_the_target(start):
    """Observed 0.01 * lenience**2 meets 0.03 at lenience sqrt(3); the error shrinks by 1 - 2 * rate = 0.8 an update."""
    lenience = AdaptiveLenience(target=0.03, rate=0.1)
    lenience.load_state_dict({"log_lenience": start})
    for _ in range(100):
        lenience.update(0.01 * lenience.value**2)
    assert lenience.value == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize(("observed", "bound", "opposite"), [(0.0, 2.0, 0.04), (0.1, 0.5, 0.0)])
def test_waits_at_a_bound_and_leaves_it_at_once(observed, bound, opposite):
    """Nothing is wound up there: after 50 updates at the bound, one in the other direction moves by the full rate."""
    lenience = AdaptiveLenience(target=0.02, low=0.5, high=2.0, rate=0.1, min_fraction=1)
    for _ in range(50):
        lenience.update(observed)
    assert (lenience.value, lenience.fraction) == (bound, 1)
    lenience.update(opposite)
    assert abs(math.log(lenience.value / bound)) == pytest.approx(0.1)


def test_below_the_smallest_lenience_fewer_groups_have_drafts_and_all_again_before_it_rises():
    lenience = AdaptiveLenience(target=0.02, low=1.5, rate=0.5, min_fraction=0.1)
    went = [(lenience.update(observed), lenience.fraction) for observed in [0.5] * 7 + [0.0] * 5]
    down = [math.exp(-0.5 * step) for step in range(1, 5)] + [0.1] * 3
    up = [min(1.0, 0.1 * math.exp(0.5 * step)) for step in range(1, 6)]
    assert [fraction for _, fraction in went] == pytest.approx(down + up)
    assert [value for value, _ in went[:11]] == [1.5] * 11
    assert went[-1][0] == pytest.approx(1.5 * 0.1 * math.exp(2.5))


@pytest.mark.parametrize("observed", [0.013, 0.9])
def test_resumes_where_it_was(observed):
    first, second = AdaptiveLenience(target=0.02), AdaptiveLenience(target=0.02)
    first.update(observed)
    second.load_state_dict(first.state_dict())
    assert (second.value, second.fraction) == (first.value, first.fraction)
    assert second.update(0.001) == first.update(0.001)


def test_a_saved_lenience_is_moved_into_the_present_bounds():
    lenience = AdaptiveLenience(target=0.02, high=1.5)
    lenience.load_state_dict({"log_lenience": 1.0})
    assert lenience.value == 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, r"target must be positive, got 0\.0"),
        ({"target": 0.1, "low": 0.0}, "0 < low <= high"),
        ({"target": 0.1, "high": 0.5}, "0 < low <= high"),
        ({"target": 0.1, "high": math.inf}, "0 < low <= high"),
        ({"target": 0.1, "rate": 0.0}, "rate must be positive"),
        (
            {"target": 0.1, "min_fraction": 0.0},
            r"min_fraction must lie in \(0, 1\], got 0.0; with 0 nothing would ever",
        ),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveLenience(**arguments)


def test_an_observation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="leave the update out when no token was reused"):
        AdaptiveLenience(target=0.02).update(float("nan"))
