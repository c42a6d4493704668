"""Proximal policy optimisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_specrl.algorithms.advantage_estimators import GAE
from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.losses import KLPenalty
from lit_specrl.models.critic import Critic, SeparateCritic
from lit_specrl.rewards import Reward


class PPO(RLVRModule):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) with a critic, as verl sets it up for
    verifiable rewards.

    Advantages come from generalized advantage estimation instead of a group, so that one rollout per prompt is enough.
    Departs from the paper as practice with language models does: no discount and no truncation of returns (`gamma=1`,
    `lam=1`; the paper has 0.99 and 0.95 for games), because the reward comes at the end; advantages are whitened over
    the step. A KL penalty (`beta`) goes into the reward, as in InstructGPT (Ouyang et al. 2022, arXiv 2203.02155).

    Args:
        model: hub name or local folder of the policy, in the transformers format.
        rewards: what to reward.
        critic: `SeparateCritic` (a second model, as in verl and TRL) or `SharedTrunkCritic` (a head on the policy);
            `None` means `SeparateCritic()`.
        num_generations: rollouts per prompt.
        gamma: discount per token.
        lam: lambda of the estimator: 0 trusts the critic, 1 trusts the rewards.
        whiten_advantages: bring the advantages to mean 0 and variance 1 over the loss tokens of the step.
        kl: how the KL penalty is taken; by default from the reward, token by token.
        options: further arguments of `RLVRModule`.

    Example::

        PPO("Qwen/Qwen3-1.7B-Base", rewards=[MathReward()], critic=SeparateCritic(warmup_steps=10))
    """

    def __init__(
        self,
        model: str,
        rewards: Sequence[Reward | Callable[..., Any] | str],
        critic: Critic | None = None,
        num_generations: int = 1,
        gamma: float = 1.0,
        lam: float = 1.0,
        whiten_advantages: bool = True,
        kl: KLPenalty = KLPenalty("k1", in_reward=True),
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            rewards,
            critic=critic or SeparateCritic(),
            num_generations=num_generations,
            advantage_estimator=GAE(gamma, lam, whiten_advantages),
            kl=kl,
            **options,
        )
