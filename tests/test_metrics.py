import math
from dataclasses import replace

import pytest
import torch

from lit_specrl.losses import ImportanceSampling, PolicyLoss, ValueClipStatistics, value_loss
from lit_specrl.metrics import CriticStatistics, RolloutStatistics, UpdateStatistics, ValueStatistics, merge
from lit_specrl.types import PromptBatch, RolloutRequest, Rollouts, SamplingConfig

# ----------------------------------------------------------------------------------------------------------- rollouts


def rollouts_of(lengths, rewards, total_rewards, num_generations=2):
    """Rows of the given lengths; those of 8 tokens were cut. Generation took a second for each prompt."""
    names = [f"prompt {index}" for index in range(len(lengths) // num_generations)]
    prompts = PromptBatch(names, [[5]] * len(names), names, [None] * len(names), ["test"] * len(names))
    return Rollouts(
        request=RolloutRequest(
            prompts, SamplingConfig(num_generations, 8), seeds=list(range(len(lengths))), policy_version=0
        ),
        response_ids=[[3] * length for length in lengths],
        sampling_logprobs=[[0.0] * length for length in lengths],
        finish_reasons=["length" if length == 8 else "stop" for length in lengths],
        policy_version=0,
        elapsed_s=float(len(names)),
        rewards=rewards,
        total_rewards=total_rewards,
    )


@pytest.fixture
def rollouts():
    """Three groups of two: rewards 0 and 2, 1 and 1, 3 and none."""
    return rollouts_of(
        lengths=[8, 3, 1, 8, 6, 4],
        rewards={
            "math": [0.0, 2.0, None, 1.0, 3.0, None],
            "format": [None, None, 1.0, None, None, None],
            "never": [None] * 6,
        },
        total_rewards=[0.0, 2.0, 1.0, 1.0, 3.0, None],
    )


def test_lengths_and_rewards_by_hand(rollouts):
    """A row that no reward applies to counts as 0 in `reward` and `reward_std`, whose deviations are sqrt(2), 0 and 3 /
    sqrt(2)."""
    statistics = RolloutStatistics.of(rollouts, {"rewards/math/timeouts": 1.0})
    assert statistics.elapsed_s == 3
    assert statistics.metrics() == {
        "completions/mean_length": 5.0,
        "completions/min_length": 1.0,
        "completions/max_length": 8.0,
        "completions/clipped_ratio": pytest.approx(1 / 3),
        "reward": pytest.approx(7 / 6),
        "reward_std": pytest.approx((2**0.5 + 3 / 2**0.5) / 3),
        "frac_reward_zero_std": pytest.approx(1 / 3),
        "rewards/unscored": 1.0,
        "rewards/math/mean": 1.5,
        "rewards/math/std": pytest.approx((5 / 3) ** 0.5),  # squares 2.25, 0.25, 0.25 and 2.25 over 4 - 1
        "rewards/format/mean": 1.0,
        "rewards/format/std": 0.0,
        "rewards/math/timeouts": 1.0,
    }


@pytest.mark.parametrize("parts", [[[0], [1, 2]], [[0, 1], [2]], [[0], [1], [2]]], ids=str)
def test_statistics_of_ranks_or_rounds_add_up_to_those_of_all_rows(rollouts, parts):
    counters = [{"timeouts": 1.0, "nonfinite": 1.0}, {"timeouts": 2.0}, {"errors": 4.0}][: len(parts)]
    groups = [replace(rollouts.select_groups(part), elapsed_s=float(len(part))) for part in parts]
    statistics = [RolloutStatistics.of(*pair) for pair in zip(groups, counters, strict=True)]
    all_counters = {"timeouts": 3.0, "nonfinite": 1.0} | ({"errors": 4.0} if len(parts) == 3 else {})
    assert merge(statistics) == RolloutStatistics.of(rollouts, all_counters)
    assert statistics[0].counters == counters[0]  # adding changes no part


def test_single_rows_have_no_deviation():
    statistics = RolloutStatistics.of(rollouts_of([1, 2], {"math": [0.0, 1.0]}, [0.0, 1.0], num_generations=1), {})
    found = statistics.metrics()
    assert (found["reward"], found["reward_std"], found["frac_reward_zero_std"]) == (0.5, 0.0, 1.0)


@pytest.mark.filterwarnings("error")
def test_one_row_in_all_has_no_deviation():
    found = RolloutStatistics.of(rollouts_of([3], {"math": [0.5]}, [0.5], num_generations=1), {}).metrics()
    assert (found["reward_std"], found["rewards/math/mean"], found["rewards/math/std"]) == (0.0, 0.5, 0.0)


# ------------------------------------------------------------------------------------------------------------ updates


MASK = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
ADVANTAGES = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
RATIOS = torch.tensor([[2.0, 1.0], [0.5, 9.0], [1.0, 3.0], [9.0, 6.0]])
"""Policy over old: of six tokens two are clipped above, one is below, one beyond the bound of a dual clip at 5."""
MISMATCH = torch.tensor([[1.5, 1.0], [0.25, 9.0], [1.0, 2.0], [9.0, 1.0]])
"""Old over sampling."""


def statistics(rows):
    """Statistics of the given rows as the module gathers them; the loss of a micro-batch is its share."""
    mask, old = MASK[rows], torch.full_like(RATIOS[rows], -2.0)
    _, clipped = PolicyLoss(0.2, clip_ratio_c=5.0)(old + RATIOS[rows].log(), old, ADVANTAGES[rows], mask)
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


LOGS = [math.log(ratio) for ratio in (1.5, 1, 0.25, 1, 2, 1)]
UPDATE_METRICS = {
    "loss": 0.4,
    "entropy": 2.0,
    "perf/trained_tokens": 20.0,
    "perf/computed_tokens": 16.0,
    "perf/padding_fraction": 0.25,
    "perf/rows_without_gradient": 2.0,
    "kl": 4 / 6,
    "clip_ratio/low_mean": 1 / 6,
    "clip_ratio/high_mean": 2 / 6,
    "clip_ratio/region_mean": 3 / 6,
    "actor/pg_clipfrac_lower": 1 / 6,
    "sampling/importance_sampling_ratio/min": 0.25,
    "sampling/importance_sampling_ratio/mean": (1.5 + 1 + 0.25 + 1 + 2 + 1) / 6,
    "sampling/importance_sampling_ratio/max": 2.0,
    "sampling/sampling_logp_difference/mean": sum(map(abs, LOGS)) / 6,
    "sampling/sampling_logp_difference/max": math.log(4),
}
"""Of all four rows, the loss being 0.1 for each."""


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[2], [3], [0], [1]]], ids=str)
def test_update_metrics_do_not_depend_on_the_split_into_micro_batches(parts):
    update = UpdateStatistics(num_updates=1, trained_tokens=20, rows_without_gradient=2)
    for rows in parts:
        update += statistics(rows)
    assert update.metrics() == pytest.approx(UPDATE_METRICS)


@pytest.mark.parametrize("ranks", [[[0, 1], [2, 3]], [[], [0, 1, 2, 3]]], ids=str)
def test_update_metrics_do_not_depend_on_the_split_over_ranks(ranks):
    """The loss of a rank is its share of that of all ranks; a rank without rows has no ratios to report."""
    parts = [
        UpdateStatistics(num_updates=1, trained_tokens=10, rows_without_gradient=1)
        + (statistics(rows) if rows else UpdateStatistics())
        for rows in ranks
    ]
    assert merge(parts).metrics(num_ranks=2) == pytest.approx(UPDATE_METRICS)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_loss_is_the_mean_over_the_updates_of_a_step(num_ranks):
    """Losses 1 and 3, of which each rank reports its share."""
    losses = [UpdateStatistics(loss=torch.tensor(loss / num_ranks), num_updates=1) for loss in (1.0, 3.0)]
    assert merge(losses * num_ranks).metrics(num_ranks)["loss"] == 2.0


def test_an_update_of_nothing_reports_no_ratios():
    unknown = ImportanceSampling()(torch.zeros(1, 1), torch.tensor([[torch.nan]]), torch.tensor([[True]]))[1]
    for nothing in (UpdateStatistics(), UpdateStatistics(mismatch=unknown)):
        assert nothing.metrics() == {
            "loss": 0.0,
            "entropy": 0.0,
            "perf/trained_tokens": 0.0,
            "perf/computed_tokens": 0.0,
            "perf/padding_fraction": 1.0,
            "perf/rows_without_gradient": 0.0,
        }


def tensors_of(value):
    """All tensors in a dataclass, also in those that it holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [tensor for entry in vars(value).values() for tensor in tensors_of(entry)] if hasattr(value, "__dict__") else []
    )


def test_statistics_are_moved_with_all_they_hold():
    update = statistics([0, 1, 2, 3])
    moved = update.to("meta")
    assert len(tensors_of(moved)) == len(tensors_of(update)) == 4 + 4 + 7
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert {tensor.device.type for tensor in tensors_of(update)} == {"cpu"}
    assert (moved.computed_tokens, moved.real_tokens) == (16, 12)
    assert update.to("cpu").metrics() == update.metrics()
    assert {tensor.device.type for tensor in tensors_of(critic_statistics([0, 1]).to("meta"))} == {"meta"}
    assert UpdateStatistics().to("cpu").metrics() == UpdateStatistics().metrics()


# ------------------------------------------------------------------------------------------------------------- critic

VALUES = torch.tensor([[0.25, 2.0, 2.0], [1.0, 0.5, 9.0]])
RETURNS = torch.tensor([[1.0, 3.0, 0.0], [1.0, 1.0, 9.0]])
VALUE_MASK = torch.tensor([[True, True, True], [True, True, False]])


def critic_statistics(rows):
    """Values that were 0 before, clipped at 0.5."""
    per_token_loss, clipped = value_loss(
        VALUES[rows], torch.zeros_like(VALUES[rows]), RETURNS[rows], VALUE_MASK[rows], cliprange_value=0.5
    )
    return CriticStatistics(per_token_loss.sum(), clipped)


@pytest.mark.parametrize("parts", [[[0, 1]], [[0], [1]]], ids=str)
def test_critic_metrics_are_means_over_tokens_however_rows_are_split(parts):
    """Clipped to 0.5 or less, the second value and the fourth have the larger error, 2.5 and 0.5."""
    squares = [0.75**2, 2.5**2, 2.0**2, 0.5**2, 0.5**2]
    assert merge([critic_statistics(rows) for rows in parts]).metrics() == pytest.approx(
        {"critic/vf_loss": 0.5 * sum(squares) / 5, "critic/vf_clipfrac": 2 / 5}
    )


def test_a_critic_without_tokens_has_loss_zero():
    nothing = CriticStatistics(torch.tensor(0.0), ValueClipStatistics(torch.tensor(0), torch.tensor(0)))
    assert nothing.metrics() == {"critic/vf_loss": 0.0, "critic/vf_clipfrac": 0.0}


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_critic():
    returns = torch.tensor([[0.0, 2.0, 4.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])

    def metrics_of(values):
        return ValueStatistics.of(values, returns, mask).metrics()

    assert metrics_of(returns) == {
        "critic/values/mean": 2.0,
        "critic/returns/mean": 2.0,
        "critic/vf_explained_var": 1.0,
    }
    assert metrics_of(torch.ones(1, 4)) == {
        "critic/values/mean": 1.0,
        "critic/returns/mean": 2.0,
        "critic/vf_explained_var": pytest.approx(0, abs=1e-5),
    }
    assert metrics_of(-returns)["critic/vf_explained_var"] == pytest.approx(-3, abs=1e-4)


@pytest.mark.parametrize("parts", [[[0], [1]], [[1], [0]]], ids=str)
def test_value_statistics_of_ranks_add_up_to_those_of_all_rows(parts):
    """Values are off by 0.75, 1, -2, 0 and 0.5: mean 0.05, of returns 1.2."""
    error_variance = (0.7**2 + 0.95**2 + 2.05**2 + 0.05**2 + 0.45**2) / 4
    variance = (3 * 0.2**2 + 1.8**2 + 1.2**2) / 4
    added_up = merge([ValueStatistics.of(VALUES[rows], RETURNS[rows], VALUE_MASK[rows]) for rows in parts])
    assert added_up.metrics() == pytest.approx(
        {
            "critic/values/mean": 5.75 / 5,
            "critic/returns/mean": 6 / 5,
            "critic/vf_explained_var": 1 - error_variance / (variance + 1e-5),
        }
    )


def test_explained_variance_survives_returns_far_from_zero():
    """In float32 the squares of 1000 and 1001 differ by less than the sum of many of them can tell."""
    returns = 1000 + torch.arange(2.0).repeat(5000)[None]
    values = torch.full_like(returns, 1000.5)
    found = ValueStatistics.of(values, returns, torch.ones_like(returns, dtype=torch.bool)).metrics()
    assert found["critic/vf_explained_var"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("num_tokens", "mean"), [(0, 0.0), (1, 2.0)])
def test_fewer_than_two_tokens_have_no_explained_variance(num_tokens, mean):
    values = torch.full((1, 2), 2.0)
    assert ValueStatistics.of(values, values, torch.arange(2)[None] < num_tokens).metrics() == {
        "critic/values/mean": mean,
        "critic/returns/mean": mean,
    }
