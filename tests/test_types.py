import pytest

from lit_specrl.types import PromptBatch, RolloutRequest, Rollouts, SamplingConfig


def prompts_of(names, columns=(), sampling=None):
    """One prompt for each letter."""
    return PromptBatch(
        uids=[f"uid {name}" for name in names],
        prompt_ids=[[ord(name), 0] for name in names],
        prompts=[f"{name}?" for name in names],
        answers=[None if name == "b" else f"{name}!" for name in names],
        sources=["vowels" if name in "aeiou" else "consonants" for name in names],
        columns=list(columns),
        sampling=sampling,
    )


def rollouts_of(names, first_row=0, elapsed_s=1.0, scored=True):
    """Two rows for each letter, numbered on; row n has n % 3 + 1 tokens n, and row 1 is cut."""
    rows = range(first_row, first_row + 2 * len(names))
    return Rollouts(
        request=RolloutRequest(
            prompts_of(names), SamplingConfig(2, 3), seeds=[100 + row for row in rows], policy_version=7
        ),
        response_ids=[[row] * (row % 3 + 1) for row in rows],
        sampling_logprobs=[[-row / 10] * (row % 3 + 1) for row in rows],
        finish_reasons=["length" if row == 1 else "stop" for row in rows],
        policy_version=7,
        elapsed_s=elapsed_s,
        texts=[f"text {row}" for row in rows] if scored else [],
        rewards={"math": [row / 2 for row in rows], "format": [None] * len(rows)} if scored else {},
        total_rewards=[None if row == 2 else row / 2 for row in rows] if scored else [],
    )


def test_selected_prompts_come_in_the_order_asked_for():
    sampling = SamplingConfig(4, 16)
    prompts = prompts_of("abc", columns=[{"level": 1}, {"level": 2}, {"level": 3}], sampling=sampling)
    assert prompts.select([2, 0]) == PromptBatch(
        uids=["uid c", "uid a"],
        prompt_ids=[[99, 0], [97, 0]],
        prompts=["c?", "a?"],
        answers=["c!", "a!"],
        sources=["consonants", "vowels"],
        columns=[{"level": 3}, {"level": 1}],
        sampling=sampling,
    )
    assert prompts == prompts_of("abc", [{"level": 1}, {"level": 2}, {"level": 3}], sampling)
    assert prompts.select([]) == prompts_of("", sampling=sampling)


def test_conversations_are_joined_where_one_side_has_them():
    turns = [{"role": "user", "content": "a?"}]
    with_turns = prompts_of("a")
    with_turns.messages = [turns]
    assert (with_turns + prompts_of("bc")).messages == [turns, [], []]
    assert (prompts_of("b") + with_turns).select([1]).messages == [turns]


def test_prompts_are_joined_in_order():
    sampling = SamplingConfig(4, 16)
    first, second = prompts_of("ab", [{"level": 1}, {"level": 2}], sampling), prompts_of("c", [{"level": 3}])
    assert first + second == prompts_of("abc", [{"level": 1}, {"level": 2}, {"level": 3}], sampling)
    assert len(first + second) == 3
    assert len(first) == 2


@pytest.mark.parametrize(
    ("first", "second", "columns"),
    [
        ([{"level": 1}, {"level": 2}], [], [{"level": 1}, {"level": 2}, {}]),
        ([], [{"level": 3}], [{}, {}, {"level": 3}]),
    ],
    ids=["first", "second"],
)
def test_prompts_without_columns_join_those_with(first, second, columns):
    """Columns of the later prompts must not slip to the earlier ones."""
    joined = prompts_of("ab", first) + prompts_of("c", second)
    assert joined == prompts_of("abc", columns)


def test_selected_groups_bring_all_of_their_rows():
    assert rollouts_of("abc").select_groups([2, 0]) == Rollouts(
        request=RolloutRequest(
            PromptBatch(
                uids=["uid c", "uid a"],
                prompt_ids=[[99, 0], [97, 0]],
                prompts=["c?", "a?"],
                answers=["c!", "a!"],
                sources=["consonants", "vowels"],
                columns=[],
            ),
            SamplingConfig(2, 3),
            seeds=[104, 105, 100, 101],
            policy_version=7,
        ),
        response_ids=[[4, 4], [5, 5, 5], [0], [1, 1]],
        sampling_logprobs=[[-0.4, -0.4], [-0.5, -0.5, -0.5], [0.0], [-0.1, -0.1]],
        finish_reasons=["stop", "stop", "stop", "length"],
        policy_version=7,
        elapsed_s=1.0,
        texts=["text 4", "text 5", "text 0", "text 1"],
        rewards={"math": [2.0, 2.5, 0.0, 0.5], "format": [None] * 4},
        total_rewards=[2.0, 2.5, 0.0, 0.5],
    )


def test_rollouts_are_joined_in_order():
    joined = rollouts_of("ab", elapsed_s=1.0) + rollouts_of("c", first_row=4, elapsed_s=0.5)
    assert joined == Rollouts(
        request=RolloutRequest(
            prompts_of("abc", columns=[{}] * 3), SamplingConfig(2, 3), seeds=list(range(100, 106)), policy_version=7
        ),
        response_ids=[[0], [1, 1], [2, 2, 2], [3], [4, 4], [5, 5, 5]],
        sampling_logprobs=[[0.0], [-0.1] * 2, [-0.2] * 3, [-0.3], [-0.4] * 2, [-0.5] * 3],
        finish_reasons=["stop", "length", "stop", "stop", "stop", "stop"],
        policy_version=7,
        elapsed_s=1.5,
        texts=["text 0", "text 1", "text 2", "text 3", "text 4", "text 5"],
        rewards={"math": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5], "format": [None] * 6},
        total_rewards=[0.0, 0.5, None, 1.5, 2.0, 2.5],
    )
    assert (joined.num_rows, joined.num_tokens, joined.request.num_rows) == (6, 12, 6)
    assert joined.truncated == [False, True, False, False, False, False]


def test_what_helped_to_answer_stays_with_the_rows_that_it_was_for():
    """Rows get other numbers when groups are selected or joined; these fields kept the old ones."""
    rollouts = rollouts_of("ab")
    request = rollouts.request
    request.cached_responses, request.past_responses = {0: [1]}, {0: [2]}
    request.expected_lengths, request.accept, request.verify_block_length = [3] * 4, lambda row, logprobs: 0, 8
    for changed in (rollouts.select_groups([1]).request, (rollouts + rollouts_of("c", first_row=4)).request):
        assert (changed.cached_responses, changed.past_responses, changed.expected_lengths) == ({}, {}, [])
        assert (changed.accept, changed.verify_block_length) == (None, None)
    assert request.cached_responses == {0: [1]}


def test_unscored_rollouts_are_selected_and_joined_too():
    whole = rollouts_of("ab", scored=False) + rollouts_of("c", first_row=4, scored=False)
    part = whole.select_groups([1])
    assert part.response_ids == [[2, 2, 2], [3]]
    assert (part.texts, part.rewards, part.total_rewards) == ([], {}, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1 token, got 0"),
        ({"temperature": -1.0}, "temperature must not be negative, got -1.0; use 0 for greedy"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0; use 1.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5; use 1.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0; leave it out"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\], got -0.1; use 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0; use 1.0"),
        ({"stop": ["a", ""]}, r"stop must hold texts that are not empty, got \['a', ''\]"),
        ({"stop_token_ids": [3, -1]}, r"stop_token_ids must not be negative, got \[3, -1\]"),
    ],
)
def test_sampling_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_a_nucleus_and_the_likeliest_tokens_are_truncated_sampling():
    configs = [SamplingConfig(), SamplingConfig(temperature=0.5), SamplingConfig(top_p=0.9), SamplingConfig(top_k=5)]
    assert [config.is_truncated for config in configs] == [False, False, True, True]
    assert SamplingConfig(min_p=0.1).is_truncated and SamplingConfig(repetition_penalty=0.9).is_truncated
    assert SamplingConfig(top_p=0.9, min_p=0.1).departure == "top_p=0.9 and min_p=0.1"


def test_stop_is_one_text_or_several():
    assert SamplingConfig().stop_strings == ()
    assert SamplingConfig(stop="</answer>").stop_strings == ("</answer>",)
    assert SamplingConfig(stop=["a", "b"]).stop_strings == ("a", "b")
