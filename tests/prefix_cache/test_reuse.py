"""Two prompts, two rollouts each, three tokens at most; the policy would say anything but token 9 again."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lit_specrl.prefix_cache.acceptance import FullReuse, RandomReuse, RatioAcceptance
from lit_specrl.prefix_cache.reuse import ReuseRound, control_samples
from lit_specrl.prefix_cache.row_data import data_digest
from lit_specrl.seeds import rollout_seeds, row_uniforms
from lit_specrl.types import PromptBatch, RolloutRequest, Rollouts, SamplingConfig

SEEDS = [11, 12, 13, 14]
NOW, NEVER = -0.2, -200.0  # log-probs of tokens under today's policy; cached ones have NOW too, and -0.1 when generated


class Scorer:
    """Log-probs of responses under a policy that never says 9; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, prompt_index, response_ids, keep_scoring):
        self.asked.append((list(prompt_index), list(response_ids)))
        self.keep_scoring = keep_scoring
        return [torch.tensor([NEVER if token == 9 else NOW for token in ids]) for ids in response_ids]


@pytest.fixture
def score():
    return Scorer()


def request_of(limit=3, seeds=SEEDS):
    prompts = PromptBatch(["a", "b"], [[5], [6, 7]], ["", ""], [None, None], ["", ""])
    return RolloutRequest(prompts, SamplingConfig(2, limit), list(seeds), policy_version=4)


def round_of(drafts, rule=RatioAcceptance(), **options):
    return ReuseRound(request_of(**options), drafts, rule)


def verified(drafts, score, rule=RatioAcceptance(), **options):
    current = round_of(drafts, rule, **options)
    current.verify(score)
    return current


def generated(current, response_ids):
    """The round after generation; what an engine samples has log-prob -0.7, and rewards count rows."""
    prefixes = [current.request.prefix(row) for row in range(4)]
    current.rollouts = Rollouts(
        current.request,
        response_ids,
        [
            [math.nan] * len(prefix) + [-0.7] * (len(ids) - len(prefix))
            for prefix, ids in zip(prefixes, response_ids, strict=True)
        ],
        ["stop" if ids[-1] == 2 else "length" for ids in response_ids],
        policy_version=4,
        elapsed_s=0.0,
        rewards={"exact": [0.0, 1.0, 2.0, 3.0]},
        total_rewards=[0.0, 1.0, 2.0, 3.0],
    )
    return current


def as_lists(known):
    """A known row as plain values."""
    return known and {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(known).items()
    }


def float32(*values):
    return np.float32(values).tolist()


# -------------------------------------------------------------------------------------------------------- verification


def test_each_draft_is_kept_up_to_the_first_token_that_is_rejected(cached, score):
    """All, none, some, and no draft."""
    current = verified(
        [cached(token_ids=[8, 8, 2]), cached(token_ids=[9, 8, 2]), cached(token_ids=[8, 9, 2]), None], score
    )
    assert score.asked == [([0, 0, 1], [[8, 8, 2], [9, 8, 2], [8, 9, 2]])]
    assert current.request.prefixes == [[8, 8, 2], [], [8], []]
    assert current.verified_lengths == [3, 0, 1, 0]
    assert current.expected_lengths == [0, 3, 2, 3]


def test_a_draft_longer_than_the_limit_is_cut_before_it_is_scored(cached, score):
    current = verified([None, cached(token_ids=[8, 7, 6, 5, 2]), None, cached(token_ids=[8, 2])], score, limit=3)
    assert score.asked == [([0, 1], [[8, 7, 6], [8, 2]])]
    assert current.request.prefixes == [[], [8, 7, 6], [], [8, 2]]


def test_without_drafts_the_policy_is_asked_about_nothing(score):
    """But it is asked: ranks that share a sharded policy meet in every pass."""
    current = verified([None] * 4, score)
    assert score.asked == [([], [])]
    assert current.request.prefixes == [[], [], [], []]
    assert current.expected_lengths == [0, 0, 0, 0]


def test_a_draft_is_kept_no_further_than_its_logprobs_are_known(cached, score):
    unknown = [np.array([NOW, math.nan, NOW]), np.full(3, math.nan), np.array([NOW, NOW, math.nan]), np.full(3, NOW)]
    current = verified([cached(token_ids=[8, 8, 2], previous_logprobs=np.float32(row)) for row in unknown], score)
    assert current.verified_lengths == [1, 0, 2, 3]


def test_the_drift_bound_looks_at_the_logprobs_of_generation(cached, score):
    """A tenth of a nat was lost since then."""
    drafts = [cached(token_ids=[8, 8, 2])] * 4
    assert verified(drafts, score, RatioAcceptance(drift_bound=0.05)).verified_lengths == [0, 0, 0, 0]
    assert verified(drafts, score, RatioAcceptance(drift_bound=0.15)).verified_lengths == [3, 3, 3, 3]


def halved(cached, length):
    """A draft of tokens that have lost half of their probability."""
    return cached(token_ids=[8] * length, previous_logprobs=np.full(length, NOW + math.log(2), np.float32))


def test_coins_belong_to_the_seed_of_a_row_whatever_the_other_rows_have(cached, score):
    options = {"limit": 40, "seeds": [28, 0, 52, 29]}
    below_half = row_uniforms(options["seeds"], 40, "acceptance") < 0.5
    expected = below_half.long().cumprod(-1).sum(-1).tolist()
    assert expected == [4, 0, 7, 3]
    assert verified([halved(cached, 40)] * 4, score, **options).verified_lengths == expected
    mixed = verified([halved(cached, 2), None, halved(cached, 9), None], score, **options)
    assert mixed.verified_lengths == [2, 0, 7, 0]


def test_a_draft_survives_a_block_when_all_its_tokens_so_far_were_kept(cached, score):
    verified([cached(token_ids=[8, 8, 2]), None, cached(token_ids=[8, 2]), cached(token_ids=[8, 8, 8])], score)
    assert score.keep_scoring(torch.tensor([2, 0, 1]), 0, torch.tensor([[NOW]] * 3)).tolist() == [True, True, True]
    block = torch.tensor([[NOW, NOW], [NOW, 0.0], [NOW, NEVER]])  # columns 1 and 2; the second draft is over after one
    assert score.keep_scoring(torch.tensor([0, 1, 2]), 1, block).tolist() == [True, True, False]
    assert score.keep_scoring(torch.tensor([2, 0]), 0, torch.tensor([[NEVER], [NOW]])).tolist() == [False, True]


def test_a_sequence_is_judged_over_its_blocks(cached, score):
    """What the first token has gained makes up for what the second one loses, which the second block alone could not
    know."""
    draft = np.float32([NOW - math.log(4), NOW + math.log(4), NOW])
    for level, survives in [("sequence", True), ("token", False)]:
        seeds = [28, 0, 29, 52]  # the first row's coins are below a half and, by token, above a quarter
        assert 0.25 < row_uniforms(seeds[:1], 2, "acceptance")[0, 1] < 0.5
        drafts = [cached(token_ids=[8, 8, 2], previous_logprobs=draft), None, None, None]
        current = verified(drafts, score, RatioAcceptance(level=level), seeds=seeds)
        assert current.verified_lengths[0] == (3 if survives else 1)
        for start in (0, 1):
            kept = score.keep_scoring(torch.tensor([0]), start, torch.tensor([[NOW]]))
            assert kept.tolist() == [survives or start == 0]


def test_rules_that_need_no_logprobs_do_not_run_the_policy(cached, score):
    drafts = [
        cached(token_ids=[9, 9, 9], previous_logprobs=np.full(3, math.nan)),
        None,
        cached(token_ids=[8] * 5),
        None,
    ]
    assert verified(drafts, score, FullReuse()).request.prefixes == [[9, 9, 9], [], [8, 8, 8], []]
    cuts = (row_uniforms(SEEDS, 3, "acceptance")[:, 0] * 4).long().tolist()
    assert verified(drafts, score, RandomReuse()).verified_lengths == [cuts[0], 0, cuts[2], 0]
    assert score.asked == []


# ------------------------------------------------------------------------------------------- verification by the engine


def test_handing_over_gives_the_engine_drafts_cut_to_the_limit(cached):
    current = round_of([None, cached(token_ids=[8, 7, 6, 5]), cached(token_ids=[8, 2]), None])
    current.verify_in_engine(64)
    assert current.request.cached_responses == {1: [8, 7, 6], 2: [8, 2]}
    assert current.request.verify_block_length == 64
    assert current.verified_lengths == [0, 0, 0, 0]
    assert current.expected_lengths == [3, 4, 2, 3]


def test_the_engine_is_told_what_the_policy_would_have_been(cached, score):
    """In whatever order it asks; every token has lost half of its probability."""
    lengths, options = [2, 30, 20, 40], {"limit": 40, "seeds": [28, 0, 52, 29]}
    drafts = [halved(cached, length) for length in lengths]
    expected = verified(drafts, score, **options)
    current = round_of(drafts, **options)
    current.verify_in_engine(64)
    for row in (2, 0, 3, 1):
        for scored in (1, lengths[row]):  # block by block
            kept = current.request.accept(row, [NOW] * scored)
            assert kept == min(expected.verified_lengths[row], scored)
            assert current.target_logprobs[row].isnan().sum() == lengths[row] - scored
    assert {row: logprobs.tolist() for row, logprobs in current.target_logprobs.items()} == {
        row: float32(*[NOW] * length) for row, length in enumerate(lengths)
    }


# ------------------------------------------------------------------------------------------------ what is known already


@pytest.fixture
def whole_and_others(cached, score):
    """Kept whole, kept in part, without a draft, and kept as far as today's limit of three tokens lets it."""
    known = {"reward_values": {"exact": 0.5}, "reference_logprobs": np.float32([-1, -2, -3])}
    longer = {"reward_values": {"exact": 1.0}, "reference_logprobs": np.float32([-1, -2, -3, -4])}
    drafts = [
        cached(token_ids=[8, 8, 2], **known),
        cached(token_ids=[8, 9, 2], **known),
        None,
        cached(token_ids=[8, 8, 8, 2], **longer),
    ]
    return generated(verified(drafts, score), [[8, 8, 2], [8, 7, 7], [2], [8, 8, 8]])


def test_rows_that_were_kept_whole_are_known(whole_and_others):
    """A response that was cut shorter than it was when it was rewarded has to be rewarded again."""
    reference = [-1.0, -2.0, -3.0]
    logprobs = float32(NOW, NOW, NOW)
    assert [whole_and_others.is_complete(row) for row in range(4)] == [True, False, False, True]
    assert [as_lists(row) for row in whole_and_others.known_rows(reuse_rewards=True, scored_by_policy=True)] == [
        {"policy_logprobs": logprobs, "rewards": {"exact": 0.5}, "reference_logprobs": reference},
        None,
        None,
        {"policy_logprobs": logprobs, "rewards": None, "reference_logprobs": reference},
    ]


def test_neither_rewards_nor_logprobs_are_known_unless_they_may_be_taken_over(whole_and_others):
    known = whole_and_others.known_rows(reuse_rewards=False, scored_by_policy=False)
    assert as_lists(known[0]) == {"policy_logprobs": None, "rewards": None, "reference_logprobs": [-1.0, -2.0, -3.0]}


def test_rows_that_a_rule_kept_unseen_have_no_logprobs(cached, score):
    current = generated(verified([cached(token_ids=[8, 2])] * 4, score, FullReuse()), [[8, 2]] * 4)
    assert [as_lists(row) for row in current.known_rows(True, True)] == [
        {"policy_logprobs": None, "rewards": None, "reference_logprobs": None}
    ] * 4


def test_only_dropped_rows_that_nobody_scored_yet_are_scored(whole_and_others, score):
    """All rows but the second are dropped; the first and the last were scored when they were verified."""
    score.asked.clear()
    whole_and_others.score_dropped_rows(score, trained={SEEDS[1], 99})
    assert score.asked == [([1], [[2]])]
    assert {row: logprobs.tolist() for row, logprobs in whole_and_others.dropped_logprobs.items()} == {
        0: float32(NOW, NOW, NOW),
        2: float32(NOW),
        3: float32(NOW, NOW, NOW),
    }


# ------------------------------------------------------------------------------------------------------ the next drafts


def test_kept_tokens_keep_the_logprobs_of_their_generation_and_new_ones_get_todays(cached, score, plain):
    """Rows 0, 1 and 3 were trained on, in another order; row 2 was dropped."""
    drafts = [cached(token_ids=[8, 9, 2]), None, cached(token_ids=[8, 2]), cached(token_ids=[8, 8, 2])]
    current = generated(verified(drafts, score), [[8, 7, 2], [7, 2], [8, 2], [8, 8, 2]])
    current.score_dropped_rows(score, trained={SEEDS[0], SEEDS[1], SEEDS[3]})
    recorded = np.float32([[-0.5, -0.6, 0.0], [-0.25, -0.35, -0.45], [-1.0, -1.1, -1.2]])
    reference = recorded - 1
    position = {SEEDS[1]: 0, SEEDS[3]: 1, SEEDS[0]: 2}
    data = data_digest(current.request.prompts, 0)  # of both: neither has further columns
    common = {"policy_version": 4, "step": 7, "num_reuses": 1, "num_equal": 0, "data": data}
    assert plain(current.cached_rows(7, position, recorded, reference)) == [
        {
            "uid": "a",
            "sample": 0,
            "token_ids": [8, 7, 2],
            "previous_logprobs": float32(-1.0, -1.1, -1.2),
            "generation_logprobs": float32(-0.1, -1.1, -1.2),
            "finish_reason": "stop",
            "reward": 0.0,
            "reward_values": {"exact": 0.0},
            "reference_logprobs": reference[2].tolist(),
        }
        | common,
        {
            "uid": "a",
            "sample": 1,
            "token_ids": [7, 2],
            "previous_logprobs": float32(-0.5, -0.6),
            "generation_logprobs": float32(-0.5, -0.6),
            "finish_reason": "stop",
            "reward": 1.0,
            "reward_values": {"exact": 1.0},
            "reference_logprobs": reference[0, :2].tolist(),
        }
        | common
        | {"num_reuses": 0},
        {
            "uid": "b",
            "sample": 0,
            "token_ids": [8, 2],
            "previous_logprobs": float32(NOW, NOW),
            "generation_logprobs": float32(-0.1, -0.1),
            "finish_reason": "stop",
            "reward": 2.0,
            "reward_values": {"exact": 2.0},
            "reference_logprobs": None,
        }
        | common,
        {
            "uid": "b",
            "sample": 1,
            "token_ids": [8, 8, 2],
            "previous_logprobs": float32(-0.25, -0.35, -0.45),
            "generation_logprobs": float32(-0.1, -0.1, -0.1),
            "finish_reason": "stop",
            "reward": 3.0,
            "reward_values": {"exact": 3.0},
            "reference_logprobs": reference[1].tolist(),
        }
        | common,
    ]


def test_rows_that_nobody_scored_are_kept_without_logprobs(cached, score):
    """Kept tokens still know theirs from when they were generated."""
    drafts = [cached(token_ids=[8, 9, 2]), None, None, None]
    current = generated(verified(drafts, score), [[8, 7, 2], [7], [7], [7]])
    first = next(current.cached_rows(7, {}, np.zeros((0, 0), np.float32), None))
    np.testing.assert_equal(first.previous_logprobs, np.float32([math.nan] * 3))
    np.testing.assert_equal(first.generation_logprobs, np.float32([-0.1, math.nan, math.nan]))
    assert first.reference_logprobs is None


def test_both_sides_of_the_engines_next_ratio_come_from_the_engine(cached):
    """What the trainer recorded is left alone: the engine scores kept tokens and samples new ones."""
    drafts = [cached(token_ids=[8, 9, 2]), None, cached(token_ids=[8, 2]), None]
    current = round_of(drafts)
    current.verify_in_engine(64)
    kept = {
        row: current.request.accept(row, logprobs)
        for row, logprobs in {0: [-0.2, NEVER, -0.2], 2: [-0.2, -0.15]}.items()
    }
    assert kept == {0: 1, 2: 2}
    current.request.prefixes = [[8], [], [8, 2], []]  # as the engine does
    generated(current, [[8, 7, 2], [7, 2], [8, 2], [2]])
    recorded = np.full((4, 3), -5.0, np.float32)
    rows = list(current.cached_rows(7, {seed: row for row, seed in enumerate(SEEDS)}, recorded, None))
    assert [row.previous_logprobs.tolist() for row in rows] == [
        float32(-0.2, -0.7, -0.7),
        float32(-0.7, -0.7),
        float32(-0.2, -0.15),
        float32(-0.7),
    ]
    assert [row.generation_logprobs.tolist() for row in rows] == [
        float32(-0.1, -0.7, -0.7),
        float32(-0.7, -0.7),
        float32(-0.1, -0.1),
        float32(-0.7),
    ]


def test_a_draft_that_survives_epochs_remembers_its_generation(cached, score):
    """Three epochs in which the policy drifts away from where it was."""
    draft = cached(token_ids=[8, 8, 2])
    for step, logprob in [(1, -0.3), (2, -0.4), (3, -0.5)]:
        current = generated(
            verified([draft, None, None, None], score, RatioAcceptance(math.inf)), [[8, 8, 2], [7], [7], [7]]
        )
        draft = next(current.cached_rows(step, {SEEDS[0]: 0}, np.full((1, 3), logprob, np.float32), None))
    assert draft.previous_logprobs.tolist() == float32(-0.5, -0.5, -0.5)
    assert draft.generation_logprobs.tolist() == float32(-0.1, -0.1, -0.1)
    assert (draft.step, draft.policy_version) == (3, 4)


# ------------------------------------------------------------------------------------------------------------
# statistics


def test_statistics_are_the_sum_over_the_groups(cached, score):
    drafts = [
        cached(token_ids=[8, 9, 2], step=1),
        None,
        cached(token_ids=[8, 2], step=3),
        cached(token_ids=[9], step=2),
    ]
    current = generated(verified(drafts, score), [[8, 7, 2], [7, 2], [8, 2], [7, 7, 7]])
    counted = dataclasses.asdict(current.statistics(step=5))
    assert counted == pytest.approx(
        {
            "num_rows": 4,
            "num_tokens": 10,
            "num_cached": 3,
            "num_cached_tokens": 6,
            "num_reused_tokens": 3,
            "num_whole": 1,
            "num_cut": 0,
            "age_sum": 4 + 2 + 3,
            "num_scored": 6,
            "drift_sum": 3 * 0.1,
            "kl_sum": 2 * 10.0,  # of the two tokens that were rejected
            "num_pairs": 1,
            "gap_sum": -1.0,
        }
    )


# -------------------------------------------------------------------------------------------------------- control group


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.01, 1), (0.25, 2), (0.5, 4), (0.9, 7)])
def test_the_control_group_is_a_fraction_of_the_rollouts_and_one_at_least(fraction, expected):
    assert len(control_samples(rollout_seeds(0, "train/0", ["a"], 8), fraction)) == expected


def test_every_sample_takes_its_turn_in_the_control_group():
    """800 steps, two of eight samples; five standard deviations of a binomial count."""
    turns = [control_samples(rollout_seeds(0, f"train/{step}", ["a"], 8), 0.25) for step in range(800)]
    counts = [sum(sample in chosen for chosen in turns) for sample in range(8)]
    assert sum(counts) == 1600
    assert all(abs(count - 200) < 5 * math.sqrt(800 * 0.25 * 0.75) for count in counts)


def test_a_single_rollout_is_the_control_group_in_a_fraction_of_the_steps():
    """2000 steps; five standard deviations of a binomial count."""
    turns = [control_samples(rollout_seeds(0, f"train/{step}", ["a"], 1), 0.2) for step in range(2000)]
    assert {frozenset(chosen) for chosen in turns} == {frozenset(), frozenset({0})}
    assert abs(sum(map(len, turns)) - 400) < 5 * math.sqrt(2000 * 0.2 * 0.8)
