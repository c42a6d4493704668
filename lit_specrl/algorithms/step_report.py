"""What a training step reports: collected on its way, merged over ranks at its end."""

from __future__ import annotations

import time

from lit_specrl.algorithms.constant_rewards import ConstantRewards
from lit_specrl.distributed.collectives import gather_objects, num_ranks
from lit_specrl.experience import Experience
from lit_specrl.metrics import CriticStatistics, RolloutStatistics, UpdateStatistics, ValueStatistics, merge
from lit_specrl.timing import StageTimer


class StepReport:
    """Statistics of one step, and the metrics that they become.

    Args:
        timer: measures the stages of the step.
    """

    def __init__(self, timer: StageTimer) -> None:
        self.timer = timer
        self.metrics: dict[str, float] = {}
        """Of the latest step, as logged."""
        self._constant_rewards = ConstantRewards()
        self.begin()

    def begin(self) -> None:
        """Forget the step before."""
        self.metrics = {}
        self.generated: list[RolloutStatistics] = []  # all rounds of the step
        self.critic_updates: list[CriticStatistics] = []
        self.updates = UpdateStatistics()
        self._started_at = time.perf_counter()

    def add_values(self, experience: Experience) -> None:
        """Take in the critic's values and returns of this rank."""
        assert experience.values is not None and experience.returns is not None
        values = ValueStatistics.of(experience.values, experience.returns, experience.loss_mask)
        self.metrics |= merge(gather_objects(values)).metrics()

    def finish(self, policy_version: int) -> dict[str, float]:
        """Merge over ranks; every rank must call it.

        Args:
            policy_version: behind the step.

        Returns:
            The metrics, complete.
        """
        seconds = self.timer.pop()
        step_s = time.perf_counter() - self._started_at
        seconds["other"] = step_s - sum(seconds.values())
        ranks = gather_objects({**seconds, "step": step_s})
        timings = {name: sum(rank.get(name, 0.0) for rank in ranks) / len(ranks) for rank in ranks for name in rank}
        generated = merge([merge(rounds) for rounds in gather_objects(self.generated)])
        self._constant_rewards.update(generated.rewards)
        self.metrics |= generated.metrics()
        self.metrics |= merge(gather_objects(self.updates.to("cpu"))).metrics(num_ranks())
        if self.critic_updates:
            self.metrics |= merge(gather_objects(merge(self.critic_updates).to("cpu"))).metrics()
        self.metrics |= {f"timing_s/{stage}": value for stage, value in timings.items()}
        self.metrics["perf/rollout_tokens_per_s"] = (
            generated.num_generated_tokens / max(generated.elapsed_s, 1e-9) * num_ranks()
        )
        if "update_actor" in timings:
            self.metrics["perf/trained_tokens_per_s"] = self.metrics["perf/trained_tokens"] / timings["update_actor"]
        self.metrics["policy_version"] = float(policy_version)
        return self.metrics
