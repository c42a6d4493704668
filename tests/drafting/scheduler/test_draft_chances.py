"""What the drafts so far say about the next ones."""

import numpy as np
import pytest

from lit_specrl.drafting.drafts import OWN, PAST, SIBLING, Drafts
from lit_specrl.drafting.scheduler.draft_chances import DraftChances


def drafts(num_rows, length=1, source=SIBLING, agreement=1.7):
    return Drafts(
        np.zeros((num_rows, length), dtype=int),
        np.full(num_rows, length),
        np.full(num_rows, source),
        np.full(num_rows, agreement),
        np.full(num_rows, np.nan),
    )


@pytest.fixture
def chances():
    chances = DraftChances()
    chances.start(np.array([0, 0, 1, 1]))
    return chances


def first(chances, row=0, **options):
    return float(chances.by_position(np.array([row]), drafts(1, **options), 1)[0, 0])


def feed(chances, share, times=100, rows=(0, 1, 2, 3), **options):
    """Drafts of one token, a share of which is accepted in every row."""
    for number in range(times):
        accepted = np.full(len(rows), int(number % 10 < 10 * share))
        chances.observe(np.array(rows), drafts(len(rows), **options), accepted)


def test_what_was_never_tried_is_hoped_for(chances):
    assert first(chances) == 0.8


def test_acceptance_is_learnt_by_source_and_agreement(chances):
    feed(chances, 0.9, source=PAST, agreement=3.3)
    feed(chances, 0.2, source=SIBLING, agreement=3.3)
    feed(chances, 0.4, source=SIBLING, agreement=2.5)
    chances.start(np.zeros(1, dtype=int))
    assert first(chances, source=PAST, agreement=3.3) == pytest.approx(0.9, abs=0.03)
    assert first(chances, source=SIBLING, agreement=3.3) == pytest.approx(0.2, abs=0.03)
    assert first(chances, source=SIBLING, agreement=2.5) == pytest.approx(0.4, abs=0.03)
    assert first(chances, source=OWN, agreement=2.5) == 0.8


def test_a_token_behind_accepted_ones_is_one_with_more_agreement(chances):
    """One of 1.7 would, accepted, have 0.7 * 1.7 + 1 = 2.19 before it, then 2.53, then 2.77."""
    for agreement, share in ((1.7, 0.5), (2.19, 0.8), (2.53, 0.9)):
        feed(chances, share, times=400, agreement=agreement)
    chances.start(np.zeros(1, dtype=int))
    found = chances.by_position(np.array([0]), drafts(1, length=3), 3)[0]
    assert found == pytest.approx([0.5, 0.5 * 0.8, 0.5 * 0.8 * 0.9], abs=0.04)


def test_only_tokens_that_were_tested_count(chances):
    """Of a draft of three, one accepted: the second was tested, the third never."""
    chances.observe(np.array([0]), drafts(1, length=3, agreement=3.3), np.array([1]))
    assert chances._tried.sum() == 2 and chances._accepted.sum() == 1


def test_a_row_and_its_group_have_factors_of_their_own(chances):
    feed(chances, 0.5)
    chances.start(np.array([0, 0, 1, 1]))
    feed(chances, 0.6, times=30, rows=(0,))
    feed(chances, 0.2, times=30, rows=(2,))
    assert first(chances, row=0) > first(chances, row=1) > first(chances, row=3) > first(chances, row=2)


def test_positions_beyond_a_draft_have_no_chance(chances):
    assert chances.by_position(np.array([0]), drafts(1, length=1), 3)[0, 1:].tolist() == [0, 0]
    nothing = drafts(2)._replace(lengths=np.array([0, 1]))
    assert chances.by_position(np.arange(2), nothing, 1)[:, 0].tolist() == [0, 0.8]


def test_a_source_that_has_failed_is_tried_again_in_the_end():
    chances = DraftChances(half_life=100)
    chances.start(np.zeros(1, dtype=int))
    feed(chances, 0.0, times=50, rows=(0,), source=SIBLING)
    before = first(chances, source=SIBLING)
    feed(chances, 1.0, times=1000, rows=(0,), source=PAST)
    chances.start(np.zeros(1, dtype=int))
    assert before < 0.1 < 0.7 < first(chances, source=SIBLING)


def test_a_half_life_that_cannot_be():
    with pytest.raises(ValueError, match="half_life must be positive, got 0"):
        DraftChances(0)


def test_what_was_learnt_outlives_the_process(chances):
    feed(chances, 0.3)
    again = DraftChances()
    again.load_state_dict(chances.state_dict())
    again.start(np.zeros(1, dtype=int))
    chances.start(np.zeros(1, dtype=int))
    assert first(again) == first(chances) < 0.5


def test_tables_of_another_version_are_left_out(chances):
    chances.load_state_dict({"tried": [[1.0]], "accepted": [[1.0]]})
    assert first(chances) == 0.8
