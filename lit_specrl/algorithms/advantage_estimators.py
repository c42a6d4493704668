"""Advantage estimators: what the updates of a step compare its rewards with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lit_specrl.advantages import (
    ScaleRewards,
    decoupled_advantages,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    pass_at_k_advantages,
    rescaled_group_advantages,
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
    takes_kl_in_reward: bool = True
    """Whether a KL penalty that is taken from the reward reaches the advantages."""
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


def token_advantages(estimator: AdvantageEstimator, experience: Experience, num_generations: int) -> Tensor:
    """What an estimator says, by token, [N, R].

    Raises:
        ValueError: it says something of another shape.
    """
    found = estimator(experience, num_generations)
    rows, tokens = (experience.num_rows,), tuple(experience.response_ids.shape)
    shape = tuple(found.shape) if isinstance(found, Tensor) else None
    if shape not in (rows, tokens):
        raise ValueError(
            f"{type(estimator).__name__} must return a tensor of advantages of shape {rows}, one a row, or {tokens}, one "
            f"a token; got {f'shape {shape}' if shape is not None else f'a {type(found).__name__}'}"
        )
    return found[:, None] * experience.policy_mask if shape == rows else found


class GroupAdvantages(AdvantageEstimator):
    """GRPO: the reward minus the mean of its group, see `group_advantages`.

    Args:
        scale_rewards: divide by the standard deviation of the "group", of the "batch" of all ranks, or not ("none").
    """

    min_generations = 2

    def __init__(self, scale_rewards: ScaleRewards = "group") -> None:
        _check_scale(scale_rewards)
        self.scale_rewards: ScaleRewards = scale_rewards

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        everyone, own = gather_rows(experience.row_rewards)
        return group_advantages(everyone, num_generations, self.scale_rewards)[own]


class PassAtK(GroupAdvantages):
    """The lead of the best response of a group over the second, see `pass_at_k_advantages`.

    Args:
        scale_rewards: divide by the standard deviation of the "group", of the "batch" of all ranks, or not ("none").
    """

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        everyone, own = gather_rows(experience.row_rewards)
        return pass_at_k_advantages(everyone, num_generations, self.scale_rewards)[own]


class OPO(AdvantageEstimator):
    """The reward minus the length-weighted mean of its group, see `length_weighted_advantages`."""

    min_generations = 2

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        lengths = experience.policy_mask.sum(-1)
        return length_weighted_advantages(experience.row_rewards, lengths, num_generations)


class GPG(AdvantageEstimator):
    """The reward minus the mean of its group, larger where few rewards are not 0, see `rescaled_group_advantages`."""

    min_generations = 2

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        everyone, own = gather_rows(experience.row_rewards)
        return rescaled_group_advantages(everyone, num_generations)[own]


class GDPO(AdvantageEstimator):
    """Each reward compared within its group for itself, see `decoupled_advantages`. Takes no KL penalty from the
    reward: it would be one more reward, without a weight."""

    min_generations = 2
    takes_kl_in_reward = False

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        assert experience.scores is not None and experience.score_weights is not None
        everyone, own = gather_rows(experience.scores)
        return decoupled_advantages(everyone, experience.score_weights, num_generations)[own]


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
        advantages, experience.returns = generalized_advantages(
            _token_rewards(experience), experience.values, experience.policy_mask, self.gamma, self.lam
        )
        return _whitened(advantages, experience) if self.whiten else advantages


class ReinforcePlusPlus(AdvantageEstimator):
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): the rewards that are still to come at each token, whitened.

    As verl's "reinforce_plus_plus". Compares a response with those of all prompts of the step, so that one rollout per
    prompt is enough. A KL penalty in the reward (`KLPenalty("k1", in_reward=True)`, as in the paper) counts token by
    token.

    Args:
        gamma: discount per token.

    Raises:
        ValueError: `gamma` is not in [0, 1].
    """

    def __init__(self, gamma: float = 1.0) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
        self.gamma = gamma

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        token_rewards = _token_rewards(experience)
        returns, _ = generalized_advantages(  # against a critic that expects nothing
            token_rewards, torch.zeros_like(token_rewards), experience.policy_mask, self.gamma
        )
        return _whitened(returns, experience)


class ReinforcePlusPlusBaseline(AdvantageEstimator):
    """REINFORCE++ with the mean of the group as baseline (arXiv 2501.03262), whitened over the tokens of the step.

    As verl's "reinforce_plus_plus_baseline".
    """

    min_generations = 2

    def __call__(self, experience: Experience, num_generations: int) -> Tensor:
        advantages = group_advantages(experience.row_rewards, num_generations, "none")
        _leave_out_unscored(experience)
        return _whitened(advantages[:, None].expand(experience.loss_mask.shape), experience)


def _token_rewards(experience: Experience) -> Tensor:
    """Reward received after each token, [N, R]; leaves rows without a score out of the loss."""
    _leave_out_unscored(experience)
    token_rewards = rewards_at_last_token(experience.rewards.nan_to_num(), experience.policy_mask)
    return token_rewards if experience.kl_penalty is None else token_rewards - experience.kl_penalty


def _leave_out_unscored(experience: Experience) -> None:
    experience.loss_mask = experience.loss_mask & ~experience.rewards.isnan()[:, None]


def _whitened(advantages: Tensor, experience: Experience) -> Tensor:
    """Of mean 0 and variance 1 over the loss tokens of all ranks."""
    return masked_whiten(advantages, experience.loss_mask, add_up=sum_over_ranks)


def _check_scale(scale_rewards: str) -> None:
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', got {scale_rewards!r}")


def resolve_estimator(
    estimator: str | AdvantageEstimator,
    scale_rewards: ScaleRewards,
    num_generations: int,
    has_critic: bool,
    kl_in_reward: bool,
) -> AdvantageEstimator:
    """The estimator of a name, checked against the run; arguments as those of `RLVRModule`.

    Raises:
        ValueError: an unknown name, or settings that do not go together.
    """
    name = repr(estimator) if isinstance(estimator, str) else type(estimator).__name__
    _check_scale(scale_rewards)
    if isinstance(estimator, str):
        estimator = _named(estimator, scale_rewards)
    if estimator.needs_critic != has_critic:
        raise ValueError(
            f"advantage_estimator={name} {'needs a' if not has_critic else 'does not use its'} critic; 'gae' goes "
            "with critic=SeparateCritic() or SharedTrunkCritic(), the others, such as 'grpo' and 'rloo', without"
        )
    if num_generations < estimator.min_generations:
        raise ValueError(
            f"advantage_estimator={name} compares the rollouts of a prompt, got num_generations={num_generations}; "
            "use at least 2, or 'reinforce_plus_plus', or 'gae' with a critic"
        )
    if kl_in_reward and not estimator.takes_kl_in_reward:
        raise ValueError(
            f"advantage_estimator={name} takes no KL penalty from the reward; leave in_reward out of kl, and the "
            "penalty goes into the loss"
        )
    return estimator


_ESTIMATORS: dict[str, tuple[tuple[ScaleRewards, ...], Callable[[ScaleRewards], AdvantageEstimator]]] = {
    "grpo": (("group", "batch", "none"), GroupAdvantages),
    "rloo": (("none", "batch"), lambda scale: LeaveOneOut(normalize=scale == "batch")),
    "gae": (("group", "batch", "none"), lambda _: GAE()),
    "reinforce_plus_plus": (("group", "batch"), lambda _: ReinforcePlusPlus()),
    "reinforce_plus_plus_baseline": (("group", "batch"), lambda _: ReinforcePlusPlusBaseline()),
    "opo": (("group", "none"), lambda _: OPO()),
    "grpo_passk": (("group", "batch", "none"), PassAtK),
    "gpg": (("group", "none"), lambda _: GPG()),
    "gdpo": (("group",), lambda _: GDPO()),
}
"""By name: the values of `scale_rewards` that say what it does, the default besides, and how to make it."""


def _named(name: str, scale_rewards: ScaleRewards) -> AdvantageEstimator:
    if name not in _ESTIMATORS:
        names = ", ".join(map(repr, _ESTIMATORS))
        raise ValueError(
            f"advantage_estimator must be one of {names}, or an AdvantageEstimator by class_path, got {name!r}"
        )
    scales, make = _ESTIMATORS[name]
    if scale_rewards not in scales:
        allowed = " or ".join(map(repr, scales))
        raise ValueError(f"advantage_estimator={name!r} takes scale_rewards={allowed}, got {scale_rewards!r}")
    return make(scale_rewards)
