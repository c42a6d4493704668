"""Lengths of drafts, row by row, against all others that there could be."""

import itertools

import numpy as np
import pytest

from lit_specrl.drafting.scheduler.row_lengths import row_lengths, row_weights


def test_no_other_lengths_emit_more_per_second():
    generator = np.random.default_rng(0)
    for _ in range(100):
        chances = generator.random((3, 3)).cumprod(-1)
        weights = generator.random(3) + 0.1
        seconds = 1 + generator.random(10).cumsum() * generator.choice([0.05, 0.2, 1.0])

        def speed(lengths, chances=chances, weights=weights, seconds=seconds):
            emitted = sum(w * (1 + c[:n].sum()) for w, c, n in zip(weights, chances, lengths, strict=True))
            return emitted / seconds[sum(lengths)]

        best = max(speed(lengths) for lengths in itertools.product(range(4), repeat=3))
        assert speed(row_lengths(chances, weights, seconds).tolist()) == pytest.approx(best)


def test_free_tokens_are_all_verified_and_dear_ones_never():
    chances = np.array([[0.5, 0.4, 0.0], [0.9, 0.1, 0.05]])
    assert row_lengths(chances, np.ones(2), np.ones(7)).tolist() == [2, 3]  # but for those that do not exist
    assert row_lengths(chances, np.ones(2), 1.0 + np.arange(7)).tolist() == [0, 0]


def test_a_row_that_is_worth_more_drafts_more():
    chances = np.array([[0.6, 0.36], [0.6, 0.36]])
    seconds = 1 + 0.2 * np.arange(5)
    assert row_lengths(chances, np.array([0.3, 1.7]), seconds).tolist() == [0, 2]


def test_long_drafts_where_verification_is_cheap():
    """A single row whose drafts are nearly always accepted drafts up to where a step begins to cost more."""
    chances = 0.97 ** np.arange(1.0, 33.0)[None]
    flat_then_steep = 1 + 0.002 * np.arange(33) + 0.2 * np.maximum(np.arange(33) - 20, 0)
    assert row_lengths(chances, np.ones(1), flat_then_steep).tolist() == [20]


def test_nothing_is_drafted_for_a_gain_below_the_margin():
    chances, seconds = np.array([[0.5]]), np.array([1.0, 1.48])
    assert row_lengths(chances, np.ones(1), seconds).tolist() == [1]
    assert row_lengths(chances, np.ones(1), seconds, margin=0.03).tolist() == [0]


def test_rows_at_their_ends_are_worth_the_same():
    """The longest rest was 0, and what was divided by it no number."""
    with np.errstate(all="raise"):
        assert row_weights(np.zeros(3), fixed_fraction=0.5).tolist() == [1.0, 1.0, 1.0]


def test_rows_that_may_be_the_last_are_worth_more():
    weights = row_weights(np.array([10.0, 50.0, 100.0]), fixed_fraction=0.8)
    assert weights.sum() == pytest.approx(3) and weights[0] < weights[1] < weights[2]
    assert weights[0] == pytest.approx(0.2, abs=0.01)
    assert row_weights(np.array([10.0, 100.0]), fixed_fraction=0.0).tolist() == [1, 1]
    assert row_weights(np.full(4, np.nan), 0.8).tolist() == [1, 1, 1, 1]
    assert row_weights(np.array([np.nan, 40.0, 40.0]), 0.8) == pytest.approx(np.ones(3))
