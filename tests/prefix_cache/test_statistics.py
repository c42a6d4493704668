import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nan

from lit_specrl.metrics import merge
from lit_specrl.prefix_cache.statistics import ReuseStatistics


@pytest.fixture
def groups(cached):
    """Two prompts with two rows each, in step 7.

    First prompt: a draft of which two of three tokens were kept, and a fresh row. Second: a draft that was kept whole
    and never rewarded, and one that was rejected at once.
    """
    previous_logprobs, generation_logprobs = np.float32([-1, -1, -1]), np.float32([-0.25, -0.25, -0.25])
    scored = cached(
        token_ids=[8, 8, 8], step=5, previous_logprobs=previous_logprobs, generation_logprobs=generation_logprobs
    )
    return [
        ReuseStatistics.of_group(
            step=7,
            cached=[scored, None],
            verified_lengths=[2, 0],
            response_lengths=[4, 3],
            target_logprobs=[torch.tensor([-0.5, -2.0, nan]), None],
            rewards=[1.0, 0.25],
        ),
        ReuseStatistics.of_group(
            step=7,
            cached=[cached(token_ids=[8, 2], step=6), cached(token_ids=[8, 8, 2], step=4)],
            verified_lengths=[2, 0],
            response_lengths=[2, 1],
            target_logprobs=[torch.tensor([-0.2, -0.2]), torch.tensor([-9.0, nan, nan])],
            rewards=[None, 0.5],
        ),
    ]


# Two kept tokens gained 0.5 and lost 1 nat; of the second prompt, two are as they were and a rejected one lost 8.8.
KL_SUMS = [(math.exp(0.5) - 1 - 0.5) + (math.exp(-1) - 1 + 1), math.exp(-8.8) - 1 + 8.8]


def test_the_rows_of_a_prompt_are_counted(groups):
    assert [dataclasses.asdict(group) for group in groups] == [
        pytest.approx(
            {
                "num_rows": 2,
                "num_tokens": 7,
                "num_cached": 1,
                "num_cached_tokens": 3,
                "num_reused_tokens": 2,
                "num_whole": 0,
                "num_cut": 0,
                "age_sum": 2,
                "num_scored": 2,
                "kl_sum": KL_SUMS[0],
                "drift_sum": 0.25 + 1.75,
                "num_pairs": 1,
                "gap_sum": 0.75,
            }
        ),
        pytest.approx(
            {
                "num_rows": 2,
                "num_tokens": 3,
                "num_cached": 2,
                "num_cached_tokens": 5,
                "num_reused_tokens": 2,
                "num_whole": 1,
                "num_cut": 0,
                "age_sum": 1 + 3,
                "num_scored": 3,
                "kl_sum": KL_SUMS[1],
                "drift_sum": 0.1 + 0.1,
                "num_pairs": 0,
                "gap_sum": 0.0,
            }
        ),
    ]


def test_sums_are_divided_once_at_the_end(groups):
    assert merge(groups).metrics() == pytest.approx(
        {
            "prefix_cache/hit_fraction": 3 / 4,
            "prefix_cache/reuse_fraction": 4 / 10,
            "prefix_cache/full_reuse_fraction": 1 / 4,
            "prefix_cache/verified_length_mean": 4 / 3,
            "prefix_cache/cached_length_mean": 8 / 3,
            "prefix_cache/generated_tokens": 6.0,
            "prefix_cache/saved_tokens": 4.0,
            "prefix_cache/age": 6 / 3,
            "prefix_cache/drift": 2.2 / 4,
            "prefix_cache/kl": sum(KL_SUMS) / 5,
            "prefix_cache/reward_gap": 0.75,
        }
    )
    assert merge(groups).kl == pytest.approx(sum(KL_SUMS) / 5)


def test_the_first_epoch_has_nothing_to_say_of_drift_and_reward():
    nothing = ReuseStatistics.of_group(0, [None, None], [0, 0], [3, 4], [None, None], [1.0, 0.0])
    assert nothing.metrics() == {
        "prefix_cache/hit_fraction": 0.0,
        "prefix_cache/reuse_fraction": 0.0,
        "prefix_cache/full_reuse_fraction": 0.0,
        "prefix_cache/verified_length_mean": 0.0,
        "prefix_cache/cached_length_mean": 0.0,
        "prefix_cache/generated_tokens": 7.0,
        "prefix_cache/saved_tokens": 0.0,
        "prefix_cache/age": 0.0,
    }
    assert nothing.kl == 0


def test_the_empty_sum_has_metrics_too():
    assert set(ReuseStatistics().metrics().values()) == {0.0}


def test_the_reward_gap_is_between_the_means_of_drafted_and_fresh_rows(cached):
    """Rejected drafts count as drafted: otherwise the comparison would pick the rows that the policy likes."""
    draft = cached(token_ids=[8])
    groups = [
        ReuseStatistics.of_group(1, drafts, [0] * 4, [1] * 4, [None] * 4, rewards)
        for drafts, rewards in [
            ([draft, draft, None, None], [1.0, 0.0, 0.0, None]),
            ([draft, None, None, None], [0.0, 1.0, 0.0, 1.0]),
            ([draft, draft, None, None], [1.0, 1.0, None, None]),
        ]
    ]
    assert [(group.num_pairs, group.gap_sum) for group in groups] == [(1, 0.5), (1, -2 / 3), (0, 0.0)]
    assert merge(groups).metrics()["prefix_cache/reward_gap"] == pytest.approx((0.5 - 2 / 3) / 2)


def test_an_unchanged_policy_has_no_kl(cached):
    draft = cached(token_ids=[8, 2])
    same = ReuseStatistics.of_group(1, [draft], [2], [2], [torch.from_numpy(draft.previous_logprobs)], [1.0])
    assert (same.kl, same.num_scored) == (0.0, 2)


def test_tokens_without_probability_or_without_a_logprob_leave_the_kl_finite(cached):
    """An impossible token counts as 10 nats; what nobody knows does not count."""
    draft = cached(token_ids=[8, 8, 8, 2], previous_logprobs=np.float32([-1, -math.inf, nan, -1]))
    now = torch.tensor([-math.inf, -1.0, -1.0, nan])
    found = ReuseStatistics.of_group(1, [draft], [0], [3], [now], [1.0])
    assert (found.kl_sum, found.num_scored) == (20.0, 2)


def test_the_kl_is_that_of_the_policies_wherever_drafts_are_left(cached):
    """0.83 nats; of the tokens that were kept it would be 0.36. Scoring stops behind the first rejection, as with
    blocks of one token."""
    generator = torch.Generator().manual_seed(0)
    then, now = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.05, 0.475, 0.475])
    drafts, lengths, scores = [], [], []
    for _ in range(2000):
        ids = torch.multinomial(then, 8, replacement=True, generator=generator)
        kept = torch.rand(8, generator=generator) < (now / then)[ids]
        length = int(kept.long().cumprod(0).sum())
        scores.append(now[ids].log().where(torch.arange(8) <= length, torch.tensor(nan)))
        drafts.append(cached(token_ids=ids.tolist(), previous_logprobs=then[ids].log().numpy()))
        lengths.append(length)
    found = ReuseStatistics.of_group(1, drafts, lengths, lengths, scores, [None] * 2000)
    assert found.kl == pytest.approx(0.83, rel=0.05)
    assert float((then * (then / now).log()).sum()) == pytest.approx(0.83, abs=0.001)


def expected_cost(block, rate, overhead):
    """Tokens computed on average until a draft without end is rejected: blocks are computed whole."""
    num_blocks = 1 / -math.expm1(-rate * block)
    return num_blocks * (block + overhead)


@pytest.mark.parametrize("rejected", [1, 10, 50, 100])
def test_blocks_have_nearly_the_fewest_tokens_computed(rejected):
    found = ReuseStatistics(num_cached=100, num_whole=100 - rejected, num_reused_tokens=10_000).block_length
    best = min(expected_cost(block, rejected / 10_000, 32) for block in range(32, 4096, 32))
    assert found % 32 == 0
    assert expected_cost(found, rejected / 10_000, 32) < 1.05 * best


def test_blocks_are_long_where_nothing_is_rejected_and_short_where_all_is():
    assert ReuseStatistics(num_cached=32, num_whole=32, num_reused_tokens=6000).block_length > 512
    assert ReuseStatistics(num_cached=32).block_length == 32


def test_rows_that_kept_all_they_were_offered_are_not_rejected(cached):
    """Of three rows of eight tokens with four on offer, one was rejected: after nine tokens, in the mean."""
    drafts = [cached(token_ids=[8] * 8)] * 3
    found = ReuseStatistics.of_group(1, drafts, [4, 4, 1], [8] * 3, [None] * 3, [1.0] * 3, offered_lengths=[4] * 3)
    assert (found.num_whole, found.num_cut) == (0, 2)
    long = dataclasses.replace(found, num_reused_tokens=9_000)
    assert long.block_length == dataclasses.replace(long, num_whole=2, num_cut=0).block_length
    assert long.block_length > dataclasses.replace(long, num_cut=0).block_length
