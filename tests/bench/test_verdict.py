"""Paired differences over seeds, their intervals, and what is said about them."""

import math

import pytest

from lit_specrl.bench.rollout.arms import arms_table
from lit_specrl.bench.rollout.comparison import Pair
from lit_specrl.bench.rollout.intervals import Interval, mean_interval, ratio_interval, t_quantile
from lit_specrl.bench.rollout.paired import COSTS, LAST, MEAN, Comparison, compare, cost_to_score
from lit_specrl.bench.rollout.records import EvaluationRecord, RunRecord, StepRecord
from lit_specrl.bench.rollout.verdict import seeds_needed, verdict

# ----------------------------------------------------------------------------------------------------------- intervals


def test_a_mean_with_its_interval_by_hand():
    """Three values with standard deviation 1: 4.303 / sqrt(3) to either side."""
    found = mean_interval([1.0, 2.0, 3.0])
    margin = 4.303 / math.sqrt(3)
    assert found == pytest.approx((3, 2.0, 2.0 - margin, 2.0 + margin))
    assert found.half_width == pytest.approx(margin)
    assert mean_interval([0.5]) == (1, 0.5, -math.inf, math.inf)
    assert not mean_interval([0.5]).is_bounded


def test_ratios_are_averaged_by_their_logarithms():
    assert ratio_interval([0.5, 2.0, 1.0]).mean == pytest.approx(1.0)
    found = ratio_interval([2.0, 2.0, 2.0])
    assert found == pytest.approx((3, 2.0, 2.0, 2.0))
    assert ratio_interval([1e-9, 1e300]).high == math.inf


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (9, 2.262), (30, 2.042), (60, 2.0003), (1000, 1.9623)])
def test_quantiles_are_those_of_the_books(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-3)


# --------------------------------------------------------------------------------------------------- paired differences


def run(scores, wall_s=10.0, tokens=100, decode_steps=20):
    """Validated before the first step and after each; every step costs the same."""
    steps = [
        StepRecord(0, wall_s, tokens, 100, {"timing_s/gen": wall_s / 2, "reward": 0.0}, decode_steps)
        for _ in scores[1:]
    ]
    evaluations = [
        EvaluationRecord(step, step * wall_s, {"val_accuracy": score})
        for step, score in enumerate(scores)
        if score is not None
    ]
    return RunRecord("hash", "a CPU", "2.13.0", steps, evaluations)


@pytest.fixture
def pairs():
    """Half of the tokens and a fifth of the time are saved; two of three seeds end a tenth lower."""
    return [
        Pair(0, run([0.1, 0.5, 0.7]), run([0.1, 0.5, 0.6], 8.0, 50)),
        Pair(1, run([0.1, 0.5, 0.7]), run([0.1, 0.5, 0.6], 8.0, 50)),
        Pair(2, run([0.1, 0.5, 0.7]), run([0.1, 0.5, 0.7], 8.0, 50)),
    ]


def test_scores_are_compared_at_equal_steps(pairs):
    found = compare(pairs)
    assert found.differences[LAST] == pytest.approx(mean_interval([-0.1, -0.1, 0.0]))
    assert found.differences[MEAN] == pytest.approx(mean_interval([-0.05, -0.05, 0.0]))
    assert found.ratios["tokens"] == pytest.approx((3, 2.0, 2.0, 2.0))
    assert found.ratios["seconds"].mean == pytest.approx(1.25)
    assert found.ratios["rollout_seconds"].mean == pytest.approx(1.25)
    assert found.ratios["decode_steps"].mean == pytest.approx(1.0)
    assert found.ratios_to_score == {}


def test_validations_that_one_run_lacks_are_left_out():
    """And the one before the first step, which says nothing about the callbacks."""
    pair = Pair(0, run([0.1, 0.5, 0.7, 0.9]), run([0.3, None, 0.6]))
    assert compare([pair]).differences[LAST].mean == pytest.approx(-0.1)
    assert compare([pair]).differences[MEAN].mean == pytest.approx(-0.1)
    assert compare([Pair(0, run([0.1, None]), run([0.1, None]))]).differences == {}


def test_the_cost_to_a_score_lies_on_the_line_between_two_validations():
    seconds = COSTS["seconds"][1]
    assert cost_to_score(run([0.1, 0.5, 0.7]), seconds, 0.6) == pytest.approx(15.0)
    assert cost_to_score(run([0.1, 0.5, 0.7]), seconds, 0.7) == pytest.approx(20.0)
    assert cost_to_score(run([0.1, 0.5, 0.3, 0.7]), seconds, 0.5) == pytest.approx(10.0)  # the first time
    assert cost_to_score(run([0.1, 0.5, 0.7]), seconds, 0.8) is None
    for scores in ([0.6, 0.7], [0.5, 0.4, 0.7]):  # there was nothing to learn for it, also where it is lost again
        assert cost_to_score(run(scores), seconds, 0.5) is None


def test_costs_to_a_score_are_of_the_pairs_that_both_reach_it(pairs):
    found = compare(pairs, score=0.65)
    assert found.num_unreached == 2
    assert found.ratios_to_score["tokens"] == pytest.approx((1, 2.0, 0.0, math.inf))
    assert compare(pairs, score=0.6).num_unreached == 0
    assert compare(pairs, score=0.6).ratios_to_score["seconds"].num_seeds == 3


def test_records_of_earlier_versions_know_no_decode_steps():
    pair = Pair(0, run([0.1, 0.5], decode_steps=None), run([0.1, 0.5]))
    assert "decode_steps" not in compare([pair]).ratios


def test_arms_stand_side_by_side_each_against_the_runs_without(pairs):
    other = [pair._replace(with_callbacks=pair.without) for pair in pairs]
    rows = arms_table({"with": compare(pairs, 0.6), "nothing": compare(other, 0.6)}, "tokens", 0.6)
    assert rows[0] == {
        "arm": "with",
        "seeds": 3,
        "seconds_ratio": "1.25x (1.25x to 1.25x)",
        "rollout_seconds_ratio": "1.25x (1.25x to 1.25x)",
        "tokens_ratio": "2.00x (2.00x to 2.00x)",
        "decode_steps_ratio": "1.00x (1.00x to 1.00x)",
        "score_last": "-0.067 (-0.210 to +0.077)",
        "score_mean": "-0.033 (-0.105 to +0.038)",
        "tokens_to_0.6": "1.65x (1.09x to 2.49x)",
        "pairs_not_there": 0,
    }
    assert rows[1]["tokens_ratio"] == rows[1]["tokens_to_0.6"] == "1.00x (1.00x to 1.00x)"
    assert rows[1]["score_last"] == "+0.000 (+0.000 to +0.000)"


def test_the_table_names_what_is_compared(pairs):
    rows = compare(pairs, score=0.6).table(0.6)
    assert [row["paired"] for row in rows] == [
        "score, last validation, with - without",
        "score, mean of validations, with - without",
        "seconds end to end, without / with",
        "seconds of generation + verification, without / with",
        "generated tokens, without / with",
        "decode steps, without / with",
        "seconds end to end to 0.6, without / with",
        "seconds of generation + verification to 0.6, without / with",
        "generated tokens to 0.6, without / with",
        "decode steps to 0.6, without / with",
    ]
    assert list(rows[0]) == ["paired", "seeds", "mean", "low_95", "high_95"]
    single = compare(pairs[:1]).table(None)[0]
    assert (single["low_95"], single["high_95"]) == (None, None)


# -------------------------------------------------------------------------------------------------------------- verdict


def comparison(lost, saved, to_score=None, num_unreached=0, num_seeds=10):
    """Of (mean, low, high) each."""
    return Comparison(
        {MEAN: Interval(num_seeds, *lost)} if lost else {},
        {"seconds": Interval(num_seeds, *saved)},
        {"seconds": Interval(num_seeds, *to_score)} if to_score else {},
        num_unreached,
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (comparison((0.0, -0.009, 0.009), (1.5, 1.4, 1.6)), "pays"),
        (comparison((0.05, 0.02, 0.08), (1.5, 1.4, 1.6)), "pays"),
        (comparison((0.0, -0.011, 0.011), (1.5, 1.4, 1.6)), "cannot tell yet"),  # more may be lost
        (comparison((-0.05, -0.08, -0.02), (1.5, 1.4, 1.6)), "does not pay"),  # certainly more is lost
        (comparison((0.0, -0.009, 0.009), (0.9, 0.8, 0.95)), "does not pay"),  # nothing is saved
        (comparison((0.0, -0.009, 0.009), (1.1, 0.9, 1.3)), "cannot tell yet"),
        (comparison(None, (1.5, 1.4, 1.6)), "cannot tell yet"),  # nobody looked at what was learned
        (comparison((-0.05, -0.08, -0.02), (1.5, 1.4, 1.6), (1.3, 1.1, 1.5)), "pays"),  # the score is there sooner
        (comparison((0.0, -0.009, 0.009), (1.5, 1.4, 1.6), (0.9, 0.8, 0.95)), "does not pay"),
        (comparison((0.0, -0.009, 0.009), (1.5, 1.4, 1.6), (0.9, 0.8, 0.95), num_unreached=1), "pays"),
        (comparison((0.0, -0.009, 0.009), (1.5, 1.4, 1.6), num_seeds=2), "cannot tell yet"),
    ],
)
def test_the_verdict(found, expected):
    assert verdict(found, "PrefixCache", "seconds", 0.01).startswith(f"PrefixCache: {expected}: seconds end to end")


def test_the_verdict_is_one_sentence_with_its_numbers():
    found = comparison((-0.004, -0.018, 0.010), (1.5, 1.4, 1.6))
    assert verdict(found, "PrefixCache", "seconds", 0.01) == (
        "PrefixCache: cannot tell yet: seconds end to end, without / with, are 1.50x (1.40x to 1.60x); the score at "
        "equal steps changes by -0.004 (-0.018 to +0.010), 0.01 may be lost, and about 20 seeds tell so small a change "
        "(95 % intervals, 10 seeds)."
    )


def test_a_cost_that_no_run_knows_decides_nothing():
    assert "do not say what they cost in decode steps" in verdict(
        comparison((0.0, -0.009, 0.009), (1.5, 1.4, 1.6)), "PrefixCache", "decode_steps", 0.01
    )


def test_a_single_seed_has_no_bounds_to_tell(pairs):
    said = verdict(compare(pairs[:1], None), "PrefixCache", "tokens", 0.01)
    assert "inf" not in said
    assert "; 3 seeds are the least that can tell (95 % intervals, 1 seed)" in said


def test_seeds_needed_grow_with_the_square_of_the_width():
    assert seeds_needed(Interval(10, 0.0, -0.02, 0.02), 0.01) == 40
    assert seeds_needed(Interval(10, 0.0, -0.001, 0.001), 0.01) == 10
    assert seeds_needed(Interval(1, 0.0, -math.inf, math.inf), 0.01) is None
