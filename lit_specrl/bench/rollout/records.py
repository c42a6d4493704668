"""What is kept of a run: every step and every validation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class StepRecord:
    """One training step."""

    epoch: int
    wall_s: float
    """From its start to the start of the next one, without validation and without the start of the engine."""
    generated_tokens: int
    """Response tokens that the engine sampled, on all ranks."""
    response_tokens: int
    """Response tokens in all, on all ranks; the rest was reused."""
    metrics: dict[str, float]
    """As logged."""
    decode_steps: int | None = None
    """Tokens of the longest continuation, summed over the rounds of the step, on the rank that has most; what
    generation costs where a batch takes as long as a row. `None` in records of earlier versions."""

    @property
    def generation_s(self) -> float:
        return self.metrics["timing_s/gen"]

    @property
    def verification_s(self) -> float:
        return self.metrics.get("timing_s/verify", 0.0)


@dataclass
class EvaluationRecord:
    """One validation of the whole validation data."""

    step: int
    """Training steps of this run before it."""
    training_s: float
    """Wall time of those steps."""
    metrics: dict[str, float]
    """As logged."""


@dataclass
class RunRecord:
    """One finished run.

    Example: one step in which half of eight tokens were reused, and a validation after it::

        RunRecord(
            settings_hash="53f0", hardware="a CPU", torch_version="2.13.0",
            steps=[StepRecord(0, 1.5, 4, 8, {"timing_s/gen": 0.5, "timing_s/verify": 0.1, "reward": 0.25})],
            evaluations=[EvaluationRecord(1, 1.5, {"val_accuracy": 0.5})],
        )
    """

    settings_hash: str
    """Of everything that decides what the run does."""
    hardware: str
    torch_version: str
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)

    @property
    def training_s(self) -> float:
        return sum(step.wall_s for step in self.steps)

    def save(self, file: Path) -> None:
        """Write all of it or nothing."""
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        unfinished.replace(file)

    @classmethod
    def load(cls, file: Path) -> RunRecord:
        values = json.loads(file.read_text("utf-8"))
        values["steps"] = [StepRecord(**step) for step in values["steps"]]
        values["evaluations"] = [EvaluationRecord(**evaluation) for evaluation in values["evaluations"]]
        return cls(**values)
