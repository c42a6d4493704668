import pytest

from lit_specrl.data import PromptTemplate
from lit_specrl.data.prompts import build_prompts, prompt_uids

PLAIN = PromptTemplate(kind="plain", text="{question}")


def test_rows_become_prompts_with_all_their_columns(tokenizer):
    rows = {
        "letters": [{"question": "A B", "answer": "1", "level": 3}],
        "words": [{"messages": [{"role": "user", "content": "C"}], "answer": None}],
    }
    prompts, num_dropped = build_prompts(rows, PLAIN, tokenizer, max_prompt_length=3)
    assert num_dropped == 0
    assert vars(prompts) == {
        "uids": prompt_uids([[1, 7, 8], [1, 9]], ["1", None]),
        "prompt_ids": [[1, 7, 8], [1, 9]],
        "prompts": ["A B", "C"],
        "answers": ["1", None],
        "sources": ["letters", "words"],
        "columns": [{"level": 3}, {}],
        "sampling": None,
    }


def test_prompts_over_the_limit_are_left_out_and_counted(tokenizer):
    rows = {"x": [{"question": q, "answer": None} for q in ("A", "A B", "A B C", "B B B B")]}
    prompts, num_dropped = build_prompts(rows, PLAIN, tokenizer, max_prompt_length=3)
    assert (prompts.prompts, num_dropped) == (["A", "A B"], 2)


def test_prompts_over_the_limit_can_be_refused(tokenizer):
    rows = {"x": [{"question": q, "answer": None} for q in ("A", "A B C")]}
    with pytest.raises(
        ValueError, match=r"1 of 2 prompts are longer than max_prompt_length=3 tokens, the longest has 4 \('A B C'"
    ):
        build_prompts(rows, PLAIN, tokenizer, max_prompt_length=3, overlong="raise")


def test_no_prompt_within_the_limit_is_an_error(tokenizer):
    rows = {"x": [{"question": "A B C", "answer": None}]}
    with pytest.raises(ValueError, match=r"1 of 1 prompts are longer .* has 4 .*; raise max_prompt_length$"):
        build_prompts(rows, PLAIN, tokenizer, max_prompt_length=3)


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "1"},
        {"question": "  "},
        {"question": 5},
        {"messages": "A"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    ],
)
def test_rows_that_ask_nothing_are_refused(tokenizer, row):
    with pytest.raises(ValueError, match=r"source 'x': expected a question as text, or messages .*, got \{"):
        build_prompts({"x": [row]}, PLAIN, tokenizer, max_prompt_length=3)


def test_answers_that_are_not_text_are_refused(tokenizer):
    with pytest.raises(ValueError, match="source 'x': the answer must be text or None, got 5"):
        build_prompts({"x": [{"question": "A", "answer": 5}]}, PLAIN, tokenizer, max_prompt_length=3)


def test_uids_depend_on_prompt_and_answer_and_number_the_duplicates():
    a, b, c, d, e, f = prompt_uids([[1, 2], [1, 2], [12], [1, 2], [1, 2], [1, 2]], ["5", "5", "5", None, "None", "5"])
    assert len({a, c, d, e}) == 4
    assert (b, f) == (f"{a}-1", f"{a}-2")
    assert a == "7568438d832d260c"


def test_uids_survive_reordering_and_other_data():
    ids, answers = [[1], [2], [3], [2]], ["a", "b", "c", "b"]
    uids = prompt_uids(ids, answers)
    assert prompt_uids(ids[2:0:-1], answers[2:0:-1]) == uids[2:0:-1]
    assert sorted(prompt_uids(ids[::-1], answers[::-1])) == sorted(uids)
