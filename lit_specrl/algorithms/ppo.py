"""Proximal policy optimisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.losses import KLEstimator
from lit_specrl.models.critic import Critic, SeparateCritic
from lit_specrl.rewards import Reward


class PPO(RLVRModule):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) with a critic, as verl sets it up for verifiable rewards.

    Advantages come from generalized advantage estimation instead of a group, so that one rollout per prompt is enough. Departs from the
    paper as practice with language models does: no discount and no truncation of returns (`gamma=1`, `gae_lambda=1`; the paper has 0.99
    and 0.95 for games), because the reward comes at the end; advantages are whitened over the step. A KL penalty (`beta`) goes into the
    reward, as in InstructGPT (Ouyang et al. 2022, arXiv 2203.02155).

    Args:
        model: hub name or local folder of the policy, in the transformers format.
        rewards: what to reward.
        critic: `SeparateCritic` (a second model, as in verl and TRL) or `SharedTrunkCritic` (a head on the policy); `None` means
            `SeparateCritic()`.
        num_generations: rollouts per prompt.
        gamma: discount per token.
        gae_lambda: 0 trusts the critic, 1 trusts the rewards.
        kl_estimator: of the penalty.
        kl_in_reward: subtract the penalty from the reward, token by token; otherwise it is added to the loss.
        options: further arguments of `RLVRModule`.

    Example::

        PPO("Qwen/Qwen3-1.7B-Base", rewards=[MathReward()], critic=SeparateCritic(warmup_steps=10), max_completion_length=4096)
    """

    def __init__(
        self,
        model: str,
        rewards: Sequence[Reward | Callable[..., Any] | str],
        critic: Critic | None = None,
        num_generations: int = 1,
        gamma: float = 1.0,
        gae_lambda: float = 1.0,
        kl_estimator: KLEstimator = "k1",
        kl_in_reward: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            rewards,
            critic=critic or SeparateCritic(),
            num_generations=num_generations,
            gamma=gamma,
            gae_lambda=gae_lambda,
            kl_estimator=kl_estimator,
            kl_in_reward=kl_in_reward,
            advantage_estimator="gae",
            **options,
        )
