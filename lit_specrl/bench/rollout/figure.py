"""The runs as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_specrl.bench.rollout.comparison import SCORE, Pair
from lit_specrl.bench.rollout.paired import COSTS, MEAN, Comparison

_LOOKS: dict[str, dict[str, Any]] = {
    "without": {"color": "tab:orange", "linewidth": 3.5, "alpha": 0.5},  # wide below narrow: equal curves both show
    "with": {"color": "tab:blue", "linewidth": 1.2},
}


def draw(pairs: Sequence[Pair], callbacks: str, file: Path) -> None:
    """Rollout time and generated tokens by step, and what was learned by training time; one line for each run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(file, 13)
    rollout, tokens, learned = figure.subplots(1, 3)
    validated = any(SCORE in evaluation.metrics for pair in pairs for evaluation in pair.without.evaluations)
    for index, pair in enumerate(pairs):
        for name, run in (("without", pair.without), ("with", pair.with_callbacks)):
            look = {**_LOOKS[name], "label": None if index else f"{name} {callbacks}"}
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
    seeds = f"{len(pairs)} seed{'s' * (len(pairs) > 1)}, a line for each run"
    figure.suptitle(f"The same training with and without {callbacks}: {seeds}")
    rollout.set(title="time of rollouts", xlabel="step", ylabel="generation + verification, s", ylim=(0, None))
    tokens.set(title="tokens of rollouts", xlabel="step", ylabel="generated tokens", ylim=(0, None))
    learned.set(title="what was learned", xlabel="training time, s", ylabel=SCORE if validated else "reward")
    rollout.legend()
    figure.savefig(file, dpi=150)


def draw_frontier(comparisons: Mapping[str, Comparison], cost: str, file: Path) -> None:
    """What each arm saves against what it costs in learning, with 95 % intervals; up and to the right is better.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(file, 8)
    axes = figure.subplots()
    for arm, found in comparisons.items():
        saved, lost = found.ratios.get(cost), found.differences.get(MEAN)
        if saved is None or lost is None:
            continue
        bars = {
            axis: [[each.mean - each.low], [each.high - each.mean]] if each.is_bounded else None
            for axis, each in (("xerr", saved), ("yerr", lost))
        }
        axes.errorbar([saved.mean], [lost.mean], **bars, marker="o", capsize=2, label=arm)
    axes.axhline(0, color="tab:gray", linewidth=1)
    axes.set(title="What each arm saves and what it costs in learning, with 95 % intervals")
    axes.set(xlabel=f"{COSTS[cost][0]}, without / with (x)", ylabel=f"{MEAN}, with - without")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def _figure(file: Path, width: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{file} needs matplotlib: pip install 'lit_specrl[bench]'") from error
    return Figure(figsize=(width, 4), layout="constrained")
