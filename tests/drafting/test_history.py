"""What a row reads in earlier responses, in those of its group, in its prompt and in what it has said."""

import numpy as np
import pytest

from lit_specrl.drafting.drafts import SOURCES
from lit_specrl.drafting.history import HistoryReader, RolloutTexts

TEXTS = [[1, 2, 3, 4, 5, 6], [7, 2, 3, 8, 9], [1, 2, 3, 4, 7, 2, 5]]
PROMPT = [90, 91]
ROOM = 64


class Row:
    """A row beside earlier responses to its prompt, of which `own` is its own last one."""

    def __init__(self, texts, own=None, prompt=PROMPT, siblings=False):
        self.prompt = list(prompt)
        rest = [text for number, text in enumerate(texts) if number != own]
        past = {1 + number: text for number, text in enumerate(rest)}
        if own is not None:
            past[0] = texts[own]
        self.reader = HistoryReader(RolloutTexts([self.prompt], len(texts) + 1, past, ROOM), siblings)

    def propose(self, response, length, row=0):
        return propose(self.reader, {row: self.prompt + response}, length)[row]


def drafts_of(reader, texts, length):
    """Of rows with these tokens of prompt and response."""
    width = max(map(len, texts.values()))
    token_ids = np.array([text + [99] * (width - len(text)) for text in texts.values()])
    return reader.propose(np.array(list(texts)), token_ids, np.array(list(map(len, texts.values()))), length)


def propose(reader, texts, length):
    return dict(zip(texts, drafts_of(reader, texts, length).as_lists(), strict=True))


# ------------------------------------------------------------------------------------------------- earlier responses


def test_a_row_first_reads_what_it_said_itself():
    row = Row(TEXTS, own=1)
    assert row.propose([], 3) == [7, 2, 3]
    assert row.propose([7, 2], 3) == [3, 8, 9]
    assert row.propose([7, 2, 3, 8], 3) == [9]
    assert row.propose([7, 2, 3, 8, 9], 3) == []


def test_a_row_without_a_text_of_its_own_begins_as_the_others_of_its_group():
    row = Row(TEXTS)
    assert row.propose([], 3) in ([1, 2, 3], [7, 2, 3])
    assert row.propose([7], 3) == [2, 3, 8]
    assert row.propose([7, 2], 2) == [3, 8]


@pytest.mark.parametrize(
    ("response", "own", "expected"),
    [
        ([7, 2, 3], 0, [8, 9]),
        ([9, 9, 1, 2, 3], 1, [4]),
        ([50, 4, 7, 2], None, [5]),
        ([1, 2, 3, 4], 0, [5, 6]),
        ([1, 2, 3, 4], 2, [7, 2]),
    ],
)
def test_the_longest_match_decides_and_among_equals_the_own_text(response, own, expected):
    assert Row(TEXTS, own).propose(response, 2)[: len(expected)] == expected


def test_among_equal_places_of_a_text_the_nearest_comes_first():
    assert Row([[5, 6, 70, 5, 6, 1, 5, 6, 2]]).propose([9, 9, 9, 5, 6], 1) == [1]


def test_one_replaced_word_does_not_lead_away():
    """The last two tokens stand elsewhere, too, but what is before them does not."""
    own = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    other = [30, 31, 32, 33, 34, 14, 99, 35, 36, 37]
    row = Row([own, other], own=0)
    row.propose([10, 11, 12, 13, 14], 3)
    assert row.propose([10, 11, 12, 13, 14, 99], 3) == [16, 17, 18]
    assert row.propose([10, 11, 12, 13, 14, 99, 16], 3) == [17, 18, 19]
    assert row.propose([10, 11, 12, 13, 14, 99, 16, 35], 2) == [18, 19]


def test_a_word_may_be_replaced_in_any_earlier_response_that_is_followed():
    row = Row([[30, 31, 32, 33, 34], [5, 30, 31, 32, 40, 41]])
    assert row.propose([5, 30, 31, 32], 2) == [40, 41]
    assert row.propose([5, 30, 31, 32, 99], 2) == [41]


def test_the_agreement_of_the_last_sixteen_tokens_decides_each_less_the_further_back_it_is():
    response = list(range(100, 116))
    for replaced in range(14):  # the last two are what is looked up
        near, far = list(response), list(response)
        near[14 - 1 - replaced] = 0
        far[max(0, 14 - 2 - replaced)] = 1
        row = Row([[*near, 7], [*far, 8]], own=0)
        assert row.propose([98, *response], 1) == ([8] if replaced < 13 else [7])


def test_texts_do_not_run_into_each_other():
    assert Row([[9, 7, 8], [1, 2, 5], [8, 1, 2, 6]]).propose([7, 8, 1, 2], 1) == [6]
    assert Row([[1, 2], [3, 4, 5]], own=0).propose([1, 2, 3], 4) == []


def test_a_text_is_followed_as_long_as_it_is_right():
    """The other one agrees in the first word, too, but nothing is looked for before the own text is wrong."""
    row = Row([[1, 2, 3, 4, 5], [50, 2, 3, 4, 9]], own=0)
    row.propose([], 2)
    assert row.propose([1], 2) == [2, 3]
    assert row.propose([1, 2, 3], 2) == [4, 5]


def test_where_the_own_text_ends_another_one_may_go_on():
    assert Row([[1, 2, 3], [9, 1, 2, 3, 4]], own=0).propose([1, 2, 3], 2) == [4]


def test_after_a_rejection_it_goes_on_where_the_texts_agree_again():
    row = Row(TEXTS, own=0)
    row.propose([1, 2, 3], 2)
    assert row.propose([1, 2, 3, 8], 2) == [9]
    assert row.propose([1, 2, 3, 8, 50], 2) == [6]  # nothing agrees: as if the words before it had been replaced
    assert row.propose([1, 2, 3, 8, 50, 2, 3], 1) in ([4], [8])


def test_a_verified_prefix_is_the_beginning_of_the_response():
    """The prefix cache kept three tokens: reading begins where the draft was cut."""
    assert Row(TEXTS, own=0).propose([1, 2, 3], 2) == [4, 5]


def test_without_siblings_nothing_else_is_read():
    reader = HistoryReader(RolloutTexts([[1, 2, 3, 1, 2]], 2, {}, ROOM), siblings=False)
    said = {0: [1, 2, 3, 1, 2, 7, 8, 9, 7, 8], 1: [1, 2, 3, 1, 2, 7, 8]}
    assert propose(reader, said, 3) == {0: [], 1: []}


def test_without_texts_there_is_nothing_to_say():
    assert Row([]).propose([1, 2, 3], 4) == []
    assert Row([[], [1]], own=0).propose([5], 4) == []


# ------------------------------------------------------------------------------------------------------ this rollout


def group(size=2, past=None, prompts=(PROMPT,), room=ROOM):
    return HistoryReader(RolloutTexts([list(prompt) for prompt in prompts], size, past or {}, room))


def test_a_row_reads_what_a_sibling_ahead_has_said():
    reader = group()
    assert propose(reader, {0: [*PROMPT, 5, 6, 7, 8], 1: [*PROMPT, 5]}, 2) == {0: [], 1: [6, 7]}
    assert propose(reader, {0: [*PROMPT, 5, 6, 7, 8, 9], 1: [*PROMPT, 5, 6, 7]}, 4) == {0: [], 1: [8, 9]}


def test_a_finished_sibling_is_read_on():
    reader = group()
    propose(reader, {0: [*PROMPT, 5, 6, 7, 8]}, 2)
    assert propose(reader, {1: [*PROMPT, 5, 6]}, 4) == {1: [7, 8]}


def test_rows_at_the_same_place_have_nothing_to_tell_each_other():
    assert propose(group(), {0: [*PROMPT, 5, 6], 1: [*PROMPT, 5, 6]}, 2) == {0: [], 1: []}


def test_the_prompt_and_the_rows_own_words_are_read():
    reader = group(1, prompts=[[1, 2, 3, 4]])
    assert propose(reader, {0: [1, 2, 3, 4, 7, 2, 3]}, 2) == {0: [4]}
    assert propose(reader, {0: [1, 2, 3, 4, 7, 2, 3, 9, 7, 2]}, 2) == {0: [3, 9]}


def test_other_groups_are_not_read():
    reader = group(1, prompts=[PROMPT, PROMPT])
    assert propose(reader, {0: [*PROMPT, 5, 6, 7, 8], 1: [*PROMPT, 5, 6]}, 2) == {0: [], 1: []}


def test_earlier_responses_come_before_siblings_that_agree_as_well():
    reader = group(3, past={1: [5, 6, 7, 1], 2: [5, 6, 7, 2]})
    said = {0: [*PROMPT, 5, 6, 7, 3]}
    propose(reader, said, 2)
    assert propose(reader, {1: [*PROMPT, 5, 6, 7]}, 2) == {1: [1]}
    reader = group(3, past={2: [5, 6, 7, 2]})
    propose(reader, said, 2)
    assert propose(reader, {1: [*PROMPT, 5, 6, 7]}, 2) == {1: [2]}


def test_drafts_tell_where_they_were_read_and_how_well_it_agrees():
    prompt = list(range(20, 40))
    reader = group(2, past={1: [5, 6, 7, 8, 9]}, prompts=[prompt])
    drafts = drafts_of(reader, {0: [*prompt, 11, 12, 13, 14], 1: [*prompt, 5, 6]}, 2)
    assert [SOURCES[source] for source in drafts.sources] == ["other", "past"]
    assert drafts.agreement.tolist() == pytest.approx([0, sum(0.7**k for k in range(16))])
    assert drafts.remaining.tolist() == [ROOM - 4, 3]  # all that it may have, or as much as last time
    drafts = drafts_of(reader, {0: [*prompt, 11, 12, 13, 14, 11, 12], 1: [*prompt, 5, 6, 12, 13]}, 2)
    assert [SOURCES[source] for source in drafts.sources] == ["own", "sibling"]
    assert drafts.agreement.tolist() == pytest.approx([1.7, 1.7])


def test_no_token_is_drafted_where_the_response_must_end():
    reader = group(room=4)
    propose(reader, {0: [*PROMPT, 5, 6, 7, 8]}, 2)
    assert propose(reader, {1: [*PROMPT, 5]}, 4) == {1: [6, 7]}  # the policy adds the fourth itself
    assert propose(reader, {1: [*PROMPT, 5, 6, 7]}, 4) == {1: []}
    assert propose(reader, {1: [*PROMPT, 5, 6, 7, 8, 9]}, 4) == {1: []}  # more than a response may have


def test_rows_may_be_asked_in_any_order_and_not_every_time():
    reader = group(3)
    propose(reader, {2: [*PROMPT, 5, 6, 7, 8, 9]}, 2)
    assert propose(reader, {1: [*PROMPT, 5], 0: [*PROMPT, 5, 6]}, 2) == {1: [6, 7], 0: [7, 8]}
    assert propose(reader, {0: [*PROMPT, 5, 6, 7]}, 0) == {0: []}  # nothing is wanted, but it is read
    assert propose(reader, {0: [*PROMPT, 5, 6, 7, 8], 1: [*PROMPT, 5, 6, 7]}, 2) == {0: [9], 1: [8, 9]}
