"""The runs as curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_specrl.bench.rollout.comparison import SCORE, Pair

_COLORS = {"without": "tab:gray", "with": "tab:blue"}


def draw(pairs: Sequence[Pair], callbacks: str, file: Path) -> None:
    """Rollout time and generated tokens by step, and what was learned by training time; one line for each run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{file} needs matplotlib: pip install 'lit_specrl[bench]'") from error
    figure = Figure(figsize=(13, 4), layout="constrained")
    rollout, tokens, learned = figure.subplots(1, 3)
    validated = any(SCORE in evaluation.metrics for pair in pairs for evaluation in pair.without.evaluations)
    for index, pair in enumerate(pairs):
        for name, run in (("without", pair.without), ("with", pair.with_callbacks)):
            look = {"color": _COLORS[name], "label": None if index else f"{name} {callbacks}"}
            steps = range(1, len(run.steps) + 1)
            rollout.plot(steps, [step.generation_s + step.verification_s for step in run.steps], **look)
            tokens.plot(steps, [step.generated_tokens for step in run.steps], **look)
            if validated:
                evaluations = [evaluation for evaluation in run.evaluations if SCORE in evaluation.metrics]
                points = [(evaluation.training_s, evaluation.metrics[SCORE]) for evaluation in evaluations]
            else:
                seconds = [sum(step.wall_s for step in run.steps[:count]) for count in steps]
                points = [(after, step.metrics["reward"]) for after, step in zip(seconds, run.steps, strict=True)]
            learned.plot(*zip(*points, strict=True), marker="." if validated else None, **look)
    rollout.set(xlabel="step", ylabel="generation + verification, s", ylim=(0, None))
    tokens.set(xlabel="step", ylabel="generated tokens", ylim=(0, None))
    learned.set(xlabel="training time, s", ylabel=SCORE if validated else "reward")
    rollout.legend()
    figure.savefig(file, dpi=150)
