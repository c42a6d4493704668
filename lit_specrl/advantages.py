"""From rewards to advantages: how much better than expected was each rollout, or each token.

Rows of one prompt are neighbours (row n answers prompt n // G, `types.py`). A reward of NaN marks a row without
a score: it takes no part in any mean or deviation and its advantage is 0, as in TRL. Means over a group need only
that group; what is taken over the batch (`scale_rewards="batch"`, `normalize=True`) covers the rows handed in, so
hand in those of all ranks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Tensor, num_generations: int, scale_rewards: ScaleRewards = "group", epsilon: float = 1e-4
) -> Tensor:
    """Reward minus the mean of its group, divided by a standard deviation.

    GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2) divides by the deviation of the group, "Lite PPO" (Liu et
    al. 2025, arXiv 2508.08221) by that of the batch, Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.2) by
    nothing. Numbers are TRL's: unbiased deviation (divided by count - 1), plus `epsilon`. verl differs in `epsilon`
    (1e-6) and in groups of one, where it returns the reward itself; here, as in TRL, a lone row has advantage 0.

    Args:
        rewards: [N]; NaN where a row could not be scored.
        num_generations: rows per group, G; divides N.
        scale_rewards: whose deviation divides: "group", "batch" (all rows) or "none".
        epsilon: added to the deviation.

    Returns:
        Advantages [N].

    Raises:
        ValueError: unknown `scale_rewards`, or rows that do not form whole groups.

    Example:
        >>> group_advantages(torch.tensor([0.0, 1.0, 1.0, 1.0]), num_generations=2, scale_rewards="none")
        tensor([-0.5000,  0.5000,  0.0000,  0.0000])
    """
    grouped = _groups(rewards, num_generations)  # [B, G]
    centred = grouped - grouped.nanmean(-1, keepdim=True)
    if scale_rewards == "group":
        centred = centred / (_nanstd(grouped) + epsilon)
    elif scale_rewards == "batch":
        centred = centred / (_nanstd(grouped.flatten()) + epsilon)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', got {scale_rewards!r}")
    return _zero_where_unscored(centred).flatten().to(rewards.dtype)  # [N]


def leave_one_out_advantages(
    rewards: Tensor, num_generations: int, normalize: bool = False, epsilon: float = 1e-4
) -> Tensor:
    """Reward minus the mean reward of the other rows of its group.

    RLOO: Kool et al. 2019 ("Buy 4 REINFORCE samples, get a baseline for free"), Ahmadian et al. 2024, arXiv 2402.14740,
    section 3. Equals the group-mean baseline times G / (G - 1). A row whose group holds no other scored row has
    advantage 0 (TRL; verl returns its reward).

    Args:
        rewards: [N]; NaN where a row could not be scored.
        num_generations: rows per group, G; divides N.
        normalize: bring the advantages of the batch to mean 0 and deviation 1 (TRL's `normalize_advantages`).
        epsilon: added to that deviation.

    Returns:
        Advantages [N].

    Example:
        >>> leave_one_out_advantages(torch.tensor([0.0, 1.0, 1.0, 1.0]), num_generations=4)
        tensor([-1.0000,  0.3333,  0.3333,  0.3333])
    """
    grouped = _groups(rewards, num_generations)  # [B, G]
    num_others = (~grouped.isnan()).sum(-1, keepdim=True) - 1
    baseline = (grouped.nansum(-1, keepdim=True) - grouped) / num_others
    # A row without others has 0 / 0 = NaN: unscored from here on, so that it stays out of the batch statistics too.
    advantages = grouped - baseline  # [B, G]
    if normalize:
        advantages = (advantages - advantages.nanmean()) / (_nanstd(advantages.flatten()) + epsilon)
    return _zero_where_unscored(advantages).flatten().to(rewards.dtype)  # [N]


def length_weighted_advantages(rewards: Tensor, lengths: Tensor, num_generations: int) -> Tensor:
    """Reward minus the mean of its group, in which each row counts by its length.

    OPO (Hao et al. 2025, arXiv 2505.23585): the baseline of least variance, if the gradient of a row grows
    with its length. As in verl, whose lone row keeps its reward; here it has advantage 0.

    Args:
        rewards: [N]; NaN where a row could not be scored.
        lengths: [N] response tokens.
        num_generations: rows per group, G; divides N.

    Returns:
        Advantages [N].

    Example:
        >>> length_weighted_advantages(torch.tensor([0.0, 1.0]), torch.tensor([30, 10]), num_generations=2)
        tensor([-0.2500,  0.7500])
    """
    grouped = _groups(rewards, num_generations)  # [B, G]
    weights = lengths.view(grouped.shape).double().masked_fill(grouped.isnan(), 0)
    baseline = (grouped.nan_to_num() * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    baseline = torch.where(baseline.isnan(), grouped, baseline)  # all empty: nothing to learn from
    return _zero_where_unscored(grouped - baseline).flatten().to(rewards.dtype)  # [N]


def pass_at_k_advantages(
    rewards: Tensor, num_generations: int, scale_rewards: ScaleRewards = "group", epsilon: float = 1e-4
) -> Tensor:
    """Lead of the best row of each group over the second; 0 for all others.

    Tang et al. 2025, arXiv 2503.19595: the leave-one-out gradient of the best reward of G samples. As verl's
    "grpo_passk", but for its `epsilon` of 1e-6.

    Args:
        rewards: [N]; NaN where a row could not be scored.
        num_generations: rows per group, G; divides N.
        scale_rewards: whose deviation divides: "group", "batch" (all rows) or "none".
        epsilon: added to the deviation.

    Returns:
        Advantages [N].

    Example:
        >>> pass_at_k_advantages(torch.tensor([0.0, 1.0, 0.25]), num_generations=3, scale_rewards="none")
        tensor([0.0000, 0.7500, 0.0000])
    """
    grouped = _groups(rewards, num_generations)  # [B, G]
    best, where = grouped.nan_to_num(-torch.inf).sort(-1, descending=True)
    lead = torch.zeros_like(grouped)
    if num_generations > 1:
        first = (best[:, :1] - best[:, 1:2]).nan_to_num(0.0, posinf=0.0)  # nothing to lead without a second row
        lead.scatter_(-1, where[:, :1], first)
    if scale_rewards != "none":
        std = _nanstd(grouped if scale_rewards == "group" else grouped.flatten())
        lead = lead / (std + epsilon)
    return _zero_where_unscored(lead).flatten().to(rewards.dtype)  # [N]


def rescaled_group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Reward minus the mean of its group, times rows / (rows whose reward is not 0).

    GPG (2025, arXiv 2504.02546) as verl computes it ("gpg"): a batch of few successes weighs as much as one of many.
    verl's lone row keeps its reward; here it has advantage 0.

    Args:
        rewards: [N]; NaN where a row could not be scored.
        num_generations: rows per group, G; divides N.

    Returns:
        Advantages [N].

    Example:
        >>> rescaled_group_advantages(torch.tensor([0.0, 1.0]), num_generations=2)
        tensor([-1.,  1.])
    """
    scored = ~rewards.isnan()
    share = ((rewards != 0) & scored).sum().clamp(min=1) / scored.sum().clamp(min=1)
    return group_advantages(rewards, num_generations, "none") / share


def decoupled_advantages(scores: Tensor, weights: Tensor, num_generations: int, epsilon: float = 1e-4) -> Tensor:
    """Group advantages of each reward for itself, then added up, and brought to deviation 1 over the batch.

    GDPO (Liu et al. 2026, arXiv 2601.05242): a reward of small spread counts as much as one of large spread. Numbers
    are those of TRL's `multi_objective_aggregation="normalize_then_sum"`.

    Args:
        scores: [N, K] unweighted, of K rewards; NaN where one does not apply.
        weights: [K].
        num_generations: rows per group, G; divides N.
        epsilon: added to each deviation.

    Returns:
        Advantages [N].

    Example: the second reward has a tenth of the spread of the first::

        >>> scores = torch.tensor([[0.0, 0.1], [1.0, 0.0]])
        >>> decoupled_advantages(scores, torch.tensor([1.0, 2.0]), num_generations=2)
        tensor([ 0.7070, -0.7070])
    """
    parts = [group_advantages(column, num_generations, epsilon=epsilon) for column in scores.double().unbind(-1)]
    total = (torch.stack(parts, -1) * weights).sum(-1)  # [N]
    total = total.masked_fill(scores.isnan().all(-1), torch.nan)
    whole = (total - total.nanmean()) / (_nanstd(total) + epsilon)
    return _zero_where_unscored(whole).to(scores.dtype)


def frac_reward_zero_std(rewards: Tensor, num_generations: int) -> Tensor:
    """Fraction of groups whose scored rewards are all equal, so that GRPO learns nothing from them.

    TRL's metric of that name, always by group (TRL looks at the batch deviation under `scale_rewards="batch"`, which
    hides what the metric is for). A group with fewer than two scored rows is not counted as equal but stays in the
    denominator, unless G is 1: then every group is.

    Args:
        rewards: [N]; NaN where a row could not be scored.
        num_generations: rows per group, G.

    Example:
        >>> frac_reward_zero_std(torch.tensor([0.0, 1.0, 1.0, 1.0]), num_generations=2)
        tensor(0.5000)
    """
    std = _nanstd(_groups(rewards, num_generations))
    return torch.isclose(std, torch.zeros_like(std)).float().mean()


def generalized_advantages(
    token_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float = 1.0, gae_lambda: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token by generalized advantage estimation.

    Schulman et al. 2015, arXiv 1506.02438, equation 16, computed from the last token backwards:
    `delta_t = r_t + gamma * V_{t+1} - V_t`, `A_t = delta_t + gamma * lambda * A_{t+1}`. Tokens outside the mask are
    stepped over, as in verl: the token before a gap sees the value after it. Nothing is whitened here; verl does it
    at once, `masked_whiten` does it later.

    Args:
        token_rewards: [N, R] reward received after each token; see `rewards_at_last_token`.
        values: [N, R] the critic's estimate before each token.
        response_mask: [N, R] bool, True on tokens the policy chose.
        gamma: discount per token, in [0, 1].
        gae_lambda: 0 trusts the critic, 1 trusts the rewards.

    Returns:
        Advantages [N, R] and returns [N, R] (= advantages + values, the critic's target), without gradient, 0 outside
        the mask.

    Example:
        >>> token_rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.25, 0.5]])
        >>> generalized_advantages(token_rewards, values, torch.ones(1, 2, dtype=torch.bool))[0]
        tensor([[0.7500, 0.5000]])
    """
    token_rewards = token_rewards.detach().float().masked_fill(~response_mask, 0)
    values = values.detach().float().masked_fill(~response_mask, 0)
    next_value = next_advantage = token_rewards.new_zeros(token_rewards.shape[0])  # [N]
    advantages = torch.zeros_like(token_rewards)  # [N, R]
    for t in reversed(range(token_rewards.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = advantage
        next_advantage = torch.where(response_mask[:, t], advantage, next_advantage)
        next_value = torch.where(response_mask[:, t], values[:, t], next_value)
    return advantages.masked_fill(~response_mask, 0), (advantages + values).masked_fill(~response_mask, 0)


def rewards_at_last_token(rewards: Tensor, response_mask: Tensor) -> Tensor:
    """Spread rewards of whole rows over tokens: all of it on the last True token, 0 elsewhere.

    Args:
        rewards: [N].
        response_mask: [N, R] bool; a row without True receives nothing.

    Returns:
        Token rewards [N, R].

    Example:
        >>> rewards_at_last_token(torch.tensor([2.0]), torch.tensor([[True, True, False]]))
        tensor([[0., 2., 0.]])
    """
    remaining = response_mask.flip(-1).cumsum(-1).flip(-1)  # [N, R] True tokens from here to the end
    return (response_mask & (remaining == 1)) * rewards[:, None]


def _groups(rewards: Tensor, num_generations: int) -> Tensor:
    """Rewards by group [B, G], in float64 so that equal float32 rewards have exactly zero deviation."""
    if num_generations < 1 or rewards.shape[0] % num_generations:
        raise ValueError(
            f"rewards must hold whole groups of num_generations={num_generations} rows, got {rewards.shape[0]} rows"
        )
    return rewards.double().view(-1, num_generations)


def _nanstd(values: Tensor) -> Tensor:
    """Unbiased deviation along the last dimension [..., 1]; of one entry 0, of one scored among several NaN."""
    if values.shape[-1] == 1:
        return torch.zeros_like(values)
    count = (~values.isnan()).sum(-1, keepdim=True)
    squares = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt()


def _zero_where_unscored(advantages: Tensor) -> Tensor:
    return torch.where(advantages.isnan(), 0.0, advantages)
