"""The published algorithms: `RLVRModule` with the defaults of a paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_specrl.losses import KLEstimator
from lit_specrl.models.critic import Critic, SeparateCritic
from lit_specrl.module import RLVRModule
from lit_specrl.rewards import OverlongReward, Reward


class GRPO(RLVRModule):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300).

    The clipped surrogate of PPO with the group's mean reward as baseline, and the group's standard deviation as scale. Departs from the
    paper where today's practice does, as TRL's defaults do: the loss is averaged over all tokens of the step (`loss_type="dapo"`; the paper's mean
    of row means is "grpo"), there is no KL penalty (`beta=0`), and the engine's rounding is corrected for
    (`importance_sampling`). Arguments are those of `RLVRModule`; with them it is also

    - Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): `loss_type="dr_grpo", scale_rewards="none"`;
    - RLOO (Ahmadian et al. 2024, arXiv 2402.14740): `advantage_estimator="rloo", scale_rewards="none", kl_in_reward=True, beta=0.05`;
    - GSPO (Zheng et al. 2025, arXiv 2507.18071): `loss_type="gspo", epsilon=3e-4, epsilon_high=4e-4`;
    - CISPO (MiniMax 2025, arXiv 2506.13585): `loss_type="cispo", epsilon_high=5.0`.

    Example::

        GRPO("Qwen/Qwen3-1.7B-Base", rewards=[MathReward()], num_generations=8, max_completion_length=4096)
    """


class DAPO(RLVRModule):
    """Decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, arXiv 2503.14476).

    GRPO with four changes: the upper clip is wider than the lower (`epsilon_high=0.28`, section 3.1), groups without reward spread are
    replaced by fresh prompts (`dynamic_sampling`, 3.2), the loss is averaged over tokens (3.3), and responses that come near the
    length limit are punished (3.4). The paper's overlong filtering, which its released recipe leaves out, is
    `mask_truncated_completions=True`. `reward` and `completions/...` in the logs are of everything that was generated, so
    that they compare with a run without dynamic sampling.

    Args:
        model: hub name or local folder of the policy, in the transformers format.
        rewards: what to reward.
        num_generations: rollouts per prompt, G.
        max_completion_length: longest response in training, in tokens.
        epsilon_high: how far the ratio may rise above 1 before it is clipped.
        dynamic_sampling: replace groups without reward spread by fresh prompts.
        max_generation_rounds: rounds of generation per step.
        overlong_buffer: tokens before the limit over which the punishment grows from 0 to -1; `None` means a fifth of
            `max_completion_length`, as in the paper, and 0 no punishment. Ignored where `rewards` holds an `OverlongReward`.
        options: further arguments of `RLVRModule`.

    Example::

        DAPO("Qwen/Qwen3-1.7B-Base", rewards=[MathReward()], max_completion_length=4096)
    """

    def __init__(
        self,
        model: str,
        rewards: Sequence[Reward | Callable[..., Any] | str],
        num_generations: int = 16,
        max_completion_length: int = 256,
        epsilon_high: float | None = 0.28,
        dynamic_sampling: bool = True,
        max_generation_rounds: int = 10,
        overlong_buffer: int | None = None,
        **options: Any,
    ) -> None:
        if overlong_buffer is None:
            overlong_buffer = max(1, max_completion_length // 5)
        rewards = list(rewards)
        if overlong_buffer and not any(isinstance(reward, OverlongReward) for reward in rewards):
            rewards.append(OverlongReward(max_completion_length, overlong_buffer))
        super().__init__(
            model,
            rewards,
            num_generations=num_generations,
            max_completion_length=max_completion_length,
            epsilon_high=epsilon_high,
            dynamic_sampling=dynamic_sampling,
            max_generation_rounds=max_generation_rounds,
            **options,
        )


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
