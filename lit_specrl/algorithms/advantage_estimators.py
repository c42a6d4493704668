"""Advantage estimators: what the updates of a step compare its rewards with."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lit_specrl.advantages import (
    ScaleRewards,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    rewards_at_last_token,
)
from lit_specrl.distributed.collectives import gather_rows, sum_over_ranks
from lit_specrl.experience import Experience
from lit_specrl.masking import masked_whiten


class AdvantageEstimator(ABC):
    """From the rewards of a step to the advantage of each row or token.

    Example: the reward itself, compared with nothing, in a file of the user::

        class Plain(AdvantageEstimator):
            def __call__(self, experience, num_generations):
                return experience.row_rewards.nan_to_num()
    """

    needs_critic: bool = False
    """Whether `experience.values` are wanted; the module then must have a critic, and otherwise none."""
    min_generations: int = 1
    """Fewest rollouts per prompt."""

    @abstractmethod
    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        """Estimate.

        Args:
            experience: N rows of this rank, with rewards, and values where there is a critic; an estimator that
                `needs_critic` fills in its `returns`.
            num_generations: rows per group, G.

        Returns:
            Advantages, [N] of rows or [N, R] of tokens.
        """


class GroupAdvantages(AdvantageEstimator):
    """GRPO: the reward minus the mean of its group, see `group_advantages`.

    Args:
        scale_rewards: divide by the standard deviation of the "group", of the "batch" of all ranks, or not ("none").
    """

    min_generations = 2

    def __init__(self, scale_rewards: ScaleRewards = "group") -> None:
        if scale_rewards not in ("group", "batch", "none"):
            raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', got {scale_rewards!r}")
        self.scale_rewards: ScaleRewards = scale_rewards

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        everyone, own = gather_rows(experience.row_rewards)
        return group_advantages(everyone, num_generations, self.scale_rewards)[own]


class LeaveOneOut(AdvantageEstimator):
    """RLOO: the reward minus the mean of the others of its group, see `leave_one_out_advantages`.

    Args:
        normalize: bring the advantages of the batch of all ranks to mean 0 and deviation 1.
    """

    min_generations = 2

    def __init__(self, normalize: bool = False) -> None:
        self.normalize = normalize

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        everyone, own = gather_rows(experience.row_rewards)
        return leave_one_out_advantages(everyone, num_generations, normalize=self.normalize)[own]


class GAE(AdvantageEstimator):
    """PPO: generalized advantage estimation with a critic, see `generalized_advantages`.

    Args:
        gamma: discount per token.
        lam: 0 trusts the critic, 1 trusts the rewards (TRL's `lam`).
        whiten: bring the advantages to mean 0 and variance 1 over the loss tokens of the step.

    Raises:
        ValueError: an argument out of its range.
    """

    needs_critic = True

    def __init__(self, gamma: float = 1.0, lam: float = 1.0, whiten: bool = True) -> None:
        for name, value in {"gamma": gamma, "lam": lam}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        self.gamma, self.lam, self.whiten = gamma, lam, whiten

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        assert experience.values is not None
        mask = experience.policy_mask
        experience.loss_mask = experience.loss_mask & ~experience.rewards.isnan()[:, None]
        token_rewards = rewards_at_last_token(experience.rewards.nan_to_num(), mask)  # [N, R]
        if experience.kl_penalty is not None:
            token_rewards = token_rewards - experience.kl_penalty
        advantages, experience.returns = generalized_advantages(
            token_rewards, experience.values, mask, self.gamma, self.lam
        )
        if self.whiten:
            advantages = masked_whiten(advantages, experience.loss_mask, add_up=sum_over_ranks)
        return advantages


def resolve_estimator(
    estimator: str | AdvantageEstimator, scale_rewards: ScaleRewards, num_generations: int, has_critic: bool
) -> AdvantageEstimator:
    """The estimator of a name, checked against the run; arguments as those of `RLVRModule`.

    Raises:
        ValueError: an unknown name, or settings that do not go together.
    """
    name = repr(estimator) if isinstance(estimator, str) else type(estimator).__name__
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', got {scale_rewards!r}")
    if isinstance(estimator, str):
        estimator = _named(estimator, scale_rewards)
    if estimator.needs_critic != has_critic:
        raise ValueError(
            f"advantage_estimator={name} {'needs a' if not has_critic else 'does not use its'} critic; 'gae' goes "
            "with critic=SeparateCritic() or SharedTrunkCritic(), 'grpo' and 'rloo' without"
        )
    if num_generations < estimator.min_generations:
        raise ValueError(
            f"advantage_estimator={name} compares the rollouts of a prompt, got num_generations={num_generations}; "
            "use at least 2, or 'gae' with a critic"
        )
    if name == "'rloo'" and scale_rewards == "group":
        raise ValueError("advantage_estimator='rloo' takes scale_rewards='none' or 'batch', got 'group'")
    return estimator


def _named(name: str, scale_rewards: ScaleRewards) -> AdvantageEstimator:
    if name == "grpo":
        return GroupAdvantages(scale_rewards)
    if name == "rloo":
        return LeaveOneOut(normalize=scale_rewards == "batch")
    if name == "gae":
        return GAE()
    raise ValueError(
        f"advantage_estimator must be 'grpo', 'rloo', 'gae' or an AdvantageEstimator by class_path, got {name!r}"
    )
