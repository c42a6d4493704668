import warnings
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest

from lit_specrl.data import PromptTemplate
from lit_specrl.data.prompts import REWARD_ARGUMENTS, build_prompts, prompt_uids
from lit_specrl.engines.rollout_worker import RolloutWorker
from lit_specrl.timing import StageTimer
from lit_specrl.types import Episode, PromptBatch, RolloutRequest, Rollouts, SamplingConfig

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
        "columns": [{"level": 3}, {"level": None}],
        "messages": [[{"role": "user", "content": "A B"}], [{"role": "user", "content": "C"}]],
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


def test_a_question_counts_where_there_are_messages_too(tokenizer):
    """The messages, worked solution and all, became the prompt."""
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "1"}]
    row = {"question": "A", "messages": messages, "answer": "1", "columns": {"question": "B"}}
    prompts, _ = build_prompts({"x": [row]}, PromptTemplate(), tokenizer, max_prompt_length=9)
    assert prompts.prompts == ["<user> A <end>\n<assistant>"]
    assert prompts.columns == [{"messages": messages, "question": "B"}]


def test_prompts_that_show_their_answer_are_counted_once_for_a_source(tokenizer):
    shown = {"question": r"A \boxed{1} B", "answer": "1"}
    rows = {"bad": [shown, {"question": "1 A", "answer": "1"}, shown], "good": [{"question": "1 A", "answer": "1"}]}
    with pytest.warns(UserWarning, match="show their own reference answer") as caught:
        build_prompts(rows, PLAIN, tokenizer, max_prompt_length=9)
    [message] = [str(warning.message) for warning in caught]
    assert message.startswith(
        r"source 'bad': 2 of 3 prompts show their own reference answer, such as '1' in 'A \\boxed{1} B'; a policy learns"
    )


def test_the_answers_of_examples_are_no_answers_shown(tokenizer):
    template = PromptTemplate(examples=[{"question": "A", "answer": r"\boxed{1}"}], suffix=r"\boxed{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_prompts({"x": [{"question": "B", "answer": "1"}]}, template, tokenizer, max_prompt_length=20)


@pytest.mark.parametrize("name", sorted(REWARD_ARGUMENTS))
def test_columns_that_rewards_could_not_be_given_are_refused(tokenizer, name):
    """`prompts` ended the run at the first rollout, `source` was replaced."""
    row = {"question": "A", "answer": "1", **({"columns": {name: 1}} if name == "answer" else {name: 1})}
    with pytest.raises(
        ValueError, match=rf"source 'x': the data has a column '{name}', .*`columns: \{{{name}: data_{name}\}}`\)$"
    ):
        build_prompts({"x": [{"question": "B"}, row]}, PLAIN, tokenizer, max_prompt_length=3)
    build_prompts({"x": [row]}, PLAIN, tokenizer, max_prompt_length=3, rewarded=False)


def test_names_of_columns_are_text(tokenizer):
    with pytest.raises(ValueError, match="source 'x': the names of columns must be text, got 5"):
        build_prompts({"x": [{"question": "A", 5: 1}]}, PLAIN, tokenizer, max_prompt_length=3)


def test_the_refused_names_are_those_that_rewards_are_given():
    prompts = PromptBatch(["a"], [[7]], ["A"], ["1"], ["x"], [{"level": 1}])
    request = RolloutRequest(prompts, SamplingConfig(num_generations=1), seeds=[0], policy_version=0)
    rollouts = Rollouts(
        request,
        [[7]],
        [[0.0]],
        ["stop"],
        policy_version=0,
        elapsed_s=0,
        texts=["A"],
        episodes=[Episode(["A"], [False])],
    )
    given = {}

    def rewards(prompts, completions, **columns):
        given.update(columns, prompts=prompts, completions=completions)
        raise InterruptedError

    rewards.rewards = [SimpleNamespace(name="r")]
    with suppress(InterruptedError):
        RolloutWorker.score(
            SimpleNamespace(rewards=rewards, timer=StageTimer(), _abandoning_environments=nullcontext), rollouts
        )
    assert set(given) == set(REWARD_ARGUMENTS) - {"self"} | {"level"}


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "1"},
        {"question": None, "messages": []},
        {"question": "", "messages": [{"role": "user", "content": "A"}]},
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


def test_a_source_without_rows_is_refused(tokenizer):
    with pytest.raises(ValueError, match="source 'y' is empty; expected at least one row"):
        build_prompts({"x": [{"question": "A"}], "y": []}, PLAIN, tokenizer, max_prompt_length=3)


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"source 'x': 'A .ud800' is no text: .*; correct the row"):
        build_prompts({"x": [{"question": "A \ud800", "answer": None}]}, PLAIN, tokenizer, max_prompt_length=3)


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
