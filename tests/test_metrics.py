import math

import pytest
import torch

from lit_specrl.losses import ImportanceSampling, PolicyLoss
from lit_specrl.metrics import UpdateStatistics, completion_metrics, reward_metrics
from lit_specrl.rewards.reward_set import RewardScores
from lit_specrl.types import PromptBatch, RolloutRequest, Rollouts, SamplingConfig


def test_completion_metrics():
    prompts = PromptBatch(uids=["a"], prompt_ids=[[5]], prompts=["p"], answers=[None], sources=["test"])
    rollouts = Rollouts(
        request=RolloutRequest(prompts, SamplingConfig(4, 8), seeds=[0, 1, 2, 3], policy_version=0),
        response_ids=[[3] * 8, [3] * 3, [2], [3] * 8],
        sampling_logprobs=[[0.0] * 8, [0.0] * 3, [0.0], [0.0] * 8],
        finish_reasons=["length", "stop", "stop", "length"],
        policy_version=0,
        elapsed_s=1.0,
    )
    assert completion_metrics(rollouts) == {
        "completions/mean_length": 5.0,
        "completions/min_length": 1.0,
        "completions/max_length": 8.0,
        "completions/clipped_ratio": 0.5,
    }


def test_reward_metrics_are_over_the_rows_that_a_reward_applies_to():
    """Totals 0, 2 | 1, 1: deviations of the groups are sqrt(2) and 0."""
    scores = RewardScores(
        names=["math", "format", "never"],
        values=[[0.0, 2.0, None, 1.0], [None, None, 1.0, None], [None] * 4],
        total=[0.0, 2.0, 1.0, 1.0],
        num_unscored=3,
        metrics={"rewards/math/timeouts": 1.0},
    )
    assert reward_metrics(scores, torch.tensor(scores.total), num_generations=2) == {
        "reward": 1.0,
        "reward_std": pytest.approx(math.sqrt(2) / 2),
        "rewards/math/mean": 1.0,
        "rewards/math/std": 1.0,
        "rewards/format/mean": 1.0,
        "rewards/format/std": 0.0,
        "rewards/math/timeouts": 1.0,
        "rewards/unscored": 3.0,
    }


def test_single_rows_have_no_deviation():
    scores = RewardScores(names=["math"], values=[[0.0, 1.0]], total=[0.0, 1.0])
    metrics = reward_metrics(scores, torch.tensor(scores.total), num_generations=1)
    assert (metrics["reward"], metrics["reward_std"]) == (0.5, 0.0)


MASK = torch.tensor([[True, True], [True, False], [True, True]])
ADVANTAGES = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]])
RATIOS = torch.tensor([[2.0, 1.0], [0.5, 9.0], [1.0, 3.0]])
"""Policy over old: two tokens clipped above, one below, of five."""
MISMATCH = torch.tensor([[1.5, 1.0], [0.25, 9.0], [1.0, 2.0]])
"""Old over sampling."""


def statistics(rows):
    """Statistics of the given rows as the module gathers them; the loss of a micro-batch is its share."""
    mask, old = MASK[rows], torch.full_like(RATIOS[rows], -2.0)
    _, clipped = PolicyLoss(0.2)(old + RATIOS[rows].log(), old, ADVANTAGES[rows], mask)
    _, mismatch = ImportanceSampling("token_truncate")(old, old - MISMATCH[rows].log(), mask)
    return UpdateStatistics(
        loss=torch.tensor(0.1 * len(rows)),
        entropy_sum=torch.tensor(2.0 * int(mask.sum())),
        kl_sum=torch.tensor(float(len(rows))),
        num_tokens=mask.sum(),
        clipped=clipped,
        mismatch=mismatch,
        computed_tokens=4 * len(rows),
        real_tokens=3 * len(rows),
    )


@pytest.mark.parametrize("parts", [[[0, 1, 2]], [[0, 1], [2]], [[2], [0], [1]]], ids=str)
def test_update_metrics_do_not_depend_on_the_split_into_micro_batches(parts):
    update = UpdateStatistics(num_updates=1, trained_tokens=20, rows_without_gradient=2)
    for rows in parts:
        update += statistics(rows)
    logs = [math.log(ratio) for ratio in (1.5, 1, 0.25, 1, 2)]
    assert update.metrics() == pytest.approx(
        {
            "loss": 0.3,
            "entropy": 2.0,
            "perf/trained_tokens": 20.0,
            "perf/computed_tokens": 12.0,
            "perf/padding_fraction": 0.25,
            "perf/rows_without_gradient": 2.0,
            "kl": 3 / 5,
            "clip_ratio/low_mean": 1 / 5,
            "clip_ratio/high_mean": 2 / 5,
            "clip_ratio/region_mean": 3 / 5,
            "sampling/importance_sampling_ratio/min": 0.25,
            "sampling/importance_sampling_ratio/mean": (1.5 + 1 + 0.25 + 1 + 2) / 5,
            "sampling/importance_sampling_ratio/max": 2.0,
            "sampling/sampling_logp_difference/mean": sum(map(abs, logs)) / 5,
            "sampling/sampling_logp_difference/max": math.log(4),
        }
    )


def test_the_loss_is_the_mean_over_the_updates_of_a_step():
    updates = UpdateStatistics(loss=torch.tensor(1.0), num_updates=1) + UpdateStatistics(
        loss=torch.tensor(3.0), num_updates=1
    )
    assert updates.metrics()["loss"] == 2.0


def test_an_update_of_nothing_reports_no_ratios():
    unknown = ImportanceSampling()(torch.zeros(1, 1), torch.tensor([[torch.nan]]), torch.tensor([[True]]))[1]
    for nothing in (UpdateStatistics(), UpdateStatistics(mismatch=unknown)):
        assert not [name for name in nothing.metrics() if name.startswith(("clip_ratio", "sampling", "kl"))]
        assert nothing.metrics()["entropy"] == 0.0
