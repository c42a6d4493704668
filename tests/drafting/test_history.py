import pytest

from lit_specrl.drafting.history import HistoryReader, TextHistory

TEXTS = [[1, 2, 3, 4, 5, 6], [7, 2, 3, 8, 9], [1, 2, 3, 4, 7, 2, 5]]


@pytest.fixture
def history():
    return TextHistory(TEXTS)


def test_a_row_first_reads_what_it_said_itself(history):
    follower = HistoryReader(history, own_text=1)
    assert follower.propose([], 3) == [7, 2, 3]
    assert follower.propose([7, 2], 3) == [3, 8, 9]
    assert follower.propose([7, 2, 3, 8], 3) == [9]
    assert follower.propose([7, 2, 3, 8, 9], 3) == []


def test_a_row_without_a_text_of_its_own_waits_for_two_tokens(history):
    follower = HistoryReader(history)
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


def test_one_replaced_word_does_not_lead_away():
    """The last two tokens stand elsewhere, too, but what is before them does not."""
    own = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    other = [30, 31, 32, 33, 34, 14, 99, 35, 36, 37]
    follower = HistoryReader(TextHistory([own, other]), own_text=0)
    follower.propose([10, 11, 12, 13, 14], 3)
    assert follower.propose([10, 11, 12, 13, 14, 99], 3) == [16, 17, 18]
    assert follower.propose([10, 11, 12, 13, 14, 99, 16], 3) == [17, 18, 19]
    assert follower.propose([10, 11, 12, 13, 14, 99, 16, 35], 2) == [18, 19]


def test_a_word_may_be_replaced_in_any_text_that_is_followed():
    follower = HistoryReader(TextHistory([[30, 31, 32, 33, 34], [5, 30, 31, 32, 40, 41]]), own_text=None)
    assert follower.propose([5, 30, 31, 32], 2) == [40, 41]
    assert follower.propose([5, 30, 31, 32, 99], 2) == [41]


def test_the_agreement_of_the_last_sixteen_tokens_decides_each_less_the_further_back_it_is():
    response = list(range(100, 116))
    for replaced in range(14):  # the last two are what is looked up
        near, far = list(response), list(response)
        near[14 - 1 - replaced] = 0
        far[max(0, 14 - 2 - replaced)] = 1
        history = TextHistory([[*near, 7], [*far, 8]])
        assert history.find(response, own_text=0) == ((1, 16) if replaced < 13 else (0, 16))


def test_texts_do_not_run_into_each_other():
    """What stands before a text, or behind it, agrees with nothing and is never read."""
    assert TextHistory([[9, 7, 8], [1, 2, 5], [8, 1, 2, 6]]).find([7, 8, 1, 2], own_text=None) == (2, 3)
    history = TextHistory([[1, 2], [3, 4, 5]])
    assert history.find([1, 2], own_text=0, guesses=[(0, 2), (1, 9)]) is None
    assert HistoryReader(history, own_text=0).propose([1, 2, 3], 4) == []


def test_a_text_is_followed_as_long_as_it_is_right():
    """The other one agrees in the first word, too, but nothing is looked for before the own text is wrong."""
    follower = HistoryReader(TextHistory([[1, 2, 3, 4, 5], [0, 2, 3, 4, 9]]), own_text=0)
    follower.propose([], 2)
    assert follower.propose([0], 2) == [2, 3]
    assert follower.propose([0, 2, 3], 2) == [4, 5]


def test_where_the_own_text_ends_another_one_may_go_on():
    follower = HistoryReader(TextHistory([[1, 2, 3], [9, 1, 2, 3, 4]]), own_text=0)
    assert follower.propose([1, 2, 3], 2) == [4]


def test_a_replacement_at_the_end_of_the_text_ends_the_reading(history):
    follower = HistoryReader(history, own_text=1)
    follower.propose([7, 2, 3, 8], 2)
    assert follower.propose([7, 2, 3, 8, 1], 2) == []


def test_after_a_rejection_it_goes_on_where_the_texts_agree_again(history):
    follower = HistoryReader(history, own_text=0)
    follower.propose([1, 2, 3], 2)
    assert follower.propose([1, 2, 3, 8], 2) == [9]
    assert follower.propose([1, 2, 3, 8, 0], 2) == [6]  # nothing agrees: as if the words before it had been replaced
    assert follower.propose([1, 2, 3, 8, 0, 2, 3], 1) in ([4], [8])


def test_without_texts_there_is_nothing_to_say():
    assert HistoryReader(TextHistory([])).propose([1, 2, 3], 4) == []
    assert HistoryReader(TextHistory([[], [1]]), own_text=0).propose([], 4) == []


def test_a_verified_prefix_is_the_beginning_of_the_response(history):
    """The prefix cache kept three tokens: reading begins where the draft was cut."""
    assert HistoryReader(history, own_text=0).propose([1, 2, 3], 2) == [4, 5]
