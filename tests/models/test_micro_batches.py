import random

import pytest

from lit_specrl.models.micro_batches import MicroBatch, plan_micro_batches


def test_rows_of_similar_length_go_together():
    """Rows of 3, 12, 4 and 11 tokens: the two long ones, then the two short ones."""
    plan = plan_micro_batches([0, 1, 2, 3], [2, 2, 2, 2], [1, 10, 2, 9], max_tokens=24)
    assert plan == [MicroBatch([1, 3], False, 24, 23), MicroBatch([2, 0], False, 8, 7)]


def test_padding_counts_for_both_sides():
    """A long prompt with a short response and the reverse: together they are as long as the longest of each."""
    lengths = {"prompt_lengths": [9, 1], "response_lengths": [1, 9]}
    together = plan_micro_batches([0, 1], max_tokens=36, **lengths)
    apart = plan_micro_batches([0, 1], max_tokens=35, **lengths)
    assert together == [MicroBatch([0, 1], False, 36, 20)]
    assert apart == [MicroBatch([0], False, 10, 10), MicroBatch([1], False, 10, 10)]


def test_a_row_beyond_the_budget_is_alone():
    plan = plan_micro_batches([0, 1, 2], [5, 5, 5], [20, 1, 2], max_tokens=14)
    assert plan == [MicroBatch([0], False, 25, 25), MicroBatch([2, 1], False, 14, 13)]


def test_the_rows_of_a_prompt_share_it():
    """Two prompts of 10 tokens, two rows each: 10 + 2 + 2 instead of 12 + 12 tokens per prompt."""
    plan = plan_micro_batches([0, 0, 1, 1], [10] * 4, [2, 1, 2, 2], max_tokens=20)
    assert plan == [MicroBatch([0, 1], True, 14, 13), MicroBatch([2, 3], True, 14, 14)]


def test_several_prompts_share_a_micro_batch_as_whole_groups():
    """3 * 10 prompt tokens and 6 rows of up to 2: the last group does not fit into 42."""
    plan = plan_micro_batches([0, 0, 1, 1, 2, 2, 3, 3], [10] * 8, [2, 1, 2, 2, 1, 1, 1, 1], max_tokens=42)
    assert plan == [MicroBatch([0, 1, 2, 3, 4, 5], True, 42, 39), MicroBatch([6, 7], True, 12, 12)]


def test_a_group_beyond_the_budget_is_cut_and_its_prompt_computed_again():
    plan = plan_micro_batches([0] * 5, [10] * 5, [4, 3, 4, 4, 4], max_tokens=22)
    assert plan == [MicroBatch([0, 2, 3], True, 22, 22), MicroBatch([4, 1], True, 18, 17)]


def test_a_single_row_is_nothing_to_share():
    plan = plan_micro_batches([0, 0, 0], [10] * 3, [4, 4, 4], max_tokens=18)
    assert plan == [MicroBatch([0, 1], True, 18, 18), MicroBatch([2], False, 14, 14)]


@pytest.mark.parametrize(
    ("response_length", "expected"),
    [(39, MicroBatch([0, 1], True, 88, 88)), (40, MicroBatch([0, 1], False, 100, 100))],
    ids=["88 of 98 tokens", "90 of 100 tokens"],
)
def test_sharing_must_save_more_than_a_tenth(response_length, expected):
    assert plan_micro_batches([0, 0], [10, 10], [response_length] * 2, max_tokens=1000) == [expected]


def test_prompts_are_not_shared_where_the_policy_cannot():
    plan = plan_micro_batches([0, 0], [10, 10], [2, 2], max_tokens=100, can_share_prompts=False)
    assert plan == [MicroBatch([0, 1], False, 24, 24)]


def test_no_rows_need_no_micro_batch():
    assert plan_micro_batches([], [], [], max_tokens=10) == []


@pytest.mark.parametrize("can_share_prompts", [True, False])
@pytest.mark.parametrize("seed", range(50))
def test_every_row_comes_once_within_the_budget_and_the_count_is_what_is_computed(seed, can_share_prompts):
    rng = random.Random(seed)
    num_prompts, max_tokens = rng.randint(1, 8), rng.randint(8, 200)
    lengths = [rng.randint(1, 60) for _ in range(num_prompts)]
    prompt_index = sorted(rng.randrange(num_prompts) for _ in range(rng.randint(1, 40)))
    prompt_lengths = [lengths[prompt] for prompt in prompt_index]
    response_lengths = [rng.randint(1, 60) for _ in prompt_index]

    plan = plan_micro_batches(prompt_index, prompt_lengths, response_lengths, max_tokens, can_share_prompts)

    assert sorted(row for batch in plan for row in batch.rows) == list(range(len(prompt_index)))
    for batch in plan:
        longest_prompt = max(prompt_lengths[row] for row in batch.rows)
        longest_response = max(response_lengths[row] for row in batch.rows)
        owners = [prompt_index[row] for row in batch.rows]
        computed = set(owners) if batch.share_prompts else owners
        assert batch.num_tokens == len(computed) * longest_prompt + len(batch.rows) * longest_response
        real_responses = sum(response_lengths[row] for row in batch.rows)
        assert batch.num_real_tokens == sum(lengths[prompt] for prompt in computed) + real_responses
        assert batch.num_tokens <= max_tokens or len(batch.rows) == 1
        assert can_share_prompts or not batch.share_prompts
    if any(batch.share_prompts for batch in plan):
        apart = plan_micro_batches(prompt_index, prompt_lengths, response_lengths, max_tokens, can_share_prompts=False)
        assert sum(batch.num_tokens for batch in plan) < 0.9 * sum(batch.num_tokens for batch in apart)
