import pytest

from lit_specrl.speculation import Follower, TextHistory

TEXTS = [[1, 2, 3, 4, 5, 6], [7, 2, 3, 8, 9], [1, 2, 3, 4, 7, 2, 5]]


@pytest.fixture
def history():
    return TextHistory(TEXTS)


def test_a_row_first_reads_what_it_said_itself(history):
    follower = Follower(history, own_text=1)
    assert follower.propose([], 3) == [7, 2, 3]
    assert follower.propose([7, 2], 3) == [3, 8, 9]
    assert follower.propose([7, 2, 3, 8], 3) == [9]
    assert follower.propose([7, 2, 3, 8, 9], 3) == []


def test_a_row_without_a_text_of_its_own_waits_for_two_tokens(history):
    follower = Follower(history)
    assert follower.propose([], 3) == []
    assert follower.propose([7], 3) == []
    assert follower.propose([7, 2], 2) in ([3, 8], [5])


def test_the_longest_match_decides(history):
    assert history.find([7, 2, 3], own_text=0) == (1, 3)
    assert history.find([9, 9, 1, 2, 3], own_text=1) in ((0, 3), (2, 3))
    assert history.find([0, 4, 7, 2], own_text=None) == (2, 6)


def test_among_equal_matches_the_own_text_comes_first_then_the_nearest_place(history):
    assert history.find([1, 2, 3, 4], own_text=0) == (0, 4)
    assert history.find([1, 2, 3, 4], own_text=2) == (2, 4)
    repeated = TextHistory([[5, 6, 0, 5, 6, 1, 5, 6, 2]])
    assert repeated.find([9, 9, 9, 5, 6], own_text=None) == (0, 5)


def test_after_a_rejection_it_goes_on_where_the_texts_agree_again(history):
    follower = Follower(history, own_text=0)
    follower.propose([1, 2, 3], 2)
    assert follower.propose([1, 2, 3, 8], 2) == [9]
    assert follower.propose([1, 2, 3, 8, 0], 2) == [6]  # nothing agrees: as if the words before it had been replaced
    assert follower.propose([1, 2, 3, 8, 0, 2, 3], 1) in ([4], [8])


def test_without_texts_there_is_nothing_to_say():
    assert Follower(TextHistory([])).propose([1, 2, 3], 4) == []
    assert Follower(TextHistory([[], [1]]), own_text=0).propose([], 4) == []


def test_a_verified_prefix_is_the_beginning_of_the_response(history):
    """The prefix cache kept three tokens: reading begins where the draft was cut."""
    assert Follower(history, own_text=0).propose([1, 2, 3], 2) == [4, 5]
