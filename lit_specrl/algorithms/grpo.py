"""Group relative policy optimisation."""

from __future__ import annotations

from lit_specrl.algorithms.rlvr import RLVRModule


class GRPO(RLVRModule):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300).

    The clipped surrogate of PPO with the group's mean reward as baseline, and the group's standard deviation as scale.
    Departs from the paper where today's practice does, as TRL's defaults do: the loss is averaged over all tokens of
    the step (`loss_type="dapo"`; the paper's mean of row means is "grpo"), there is no KL penalty (`beta=0`), and the
    engine's rounding is corrected for (`importance_sampling`). Arguments are those of `RLVRModule`; with them it is
    also

    - Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): `loss_type="dr_grpo", scale_rewards="none"`;
    - RLOO (Ahmadian et al. 2024, arXiv 2402.14740): `advantage_estimator="rloo", scale_rewards="none",
      kl=KLPenalty("k1", in_reward=True), beta=0.05`;
    - GSPO (Zheng et al. 2025, arXiv 2507.18071): `loss_type="gspo", epsilon=3e-4, epsilon_high=4e-4`;
    - CISPO (MiniMax 2025, arXiv 2506.13585): `loss_type="cispo", epsilon_high=5.0`.

    Example::

        GRPO("Qwen/Qwen3-1.7B-Base", rewards=[MathReward()], num_generations=8, max_completion_length=4096)
    """
