"""Decoupled clip and dynamic sampling policy optimisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_specrl.algorithms.dynamic_sampling import DynamicSampling
from lit_specrl.algorithms.rlvr import RLVRModule
from lit_specrl.rewards import OverlongReward, Reward


class DAPO(RLVRModule):
    """Decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, arXiv 2503.14476).

    GRPO with four changes: the upper clip is wider than the lower (`epsilon_high=0.28`, section 3.1), groups without
    reward spread are replaced by fresh prompts (`dynamic_sampling`, 3.2), the loss is averaged over tokens (3.3), and
    responses that come near the length limit are punished (3.4). The paper's overlong filtering, which its released
    recipe leaves out, is `mask_truncated_completions=True`. `reward` and `completions/...` in the logs are of
    everything that was generated, so that they compare with a run without dynamic sampling.

    Args:
        model: hub name or local folder of the policy, in the transformers format.
        rewards: what to reward.
        num_generations: rollouts per prompt, G.
        max_completion_length: longest response in training, in tokens.
        epsilon_high: how far the ratio may rise above 1 before it is clipped.
        dynamic_sampling: replace groups without reward spread by fresh prompts.
        overlong_buffer: tokens before the limit over which the punishment grows from 0 to -1; `None` means a fifth of
            `max_completion_length`, as in the paper, and 0 no punishment. Ignored where `rewards` holds an
            `OverlongReward`.
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
        dynamic_sampling: bool | DynamicSampling = True,
        overlong_buffer: int | None = None,
        **options: Any,
    ) -> None:
        if overlong_buffer is None:
            overlong_buffer = max(1, max_completion_length // 5)
        rewards = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
        if overlong_buffer and not any(isinstance(reward, OverlongReward) for reward in rewards):
            rewards.append(OverlongReward(max_completion_length, overlong_buffer))
        super().__init__(
            model,
            rewards,
            num_generations=num_generations,
            max_completion_length=max_completion_length,
            epsilon_high=epsilon_high,
            dynamic_sampling=dynamic_sampling,
            **options,
        )
