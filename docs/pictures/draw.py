"""Draws the curves of docs/results.md from its tables: python docs/pictures/draw.py

The numbers are read from the page, so that a picture cannot say anything else. Curves with a point for each step have
theirs in `reuse_by_step.json`, which `draw.py REPORT.json` writes.
"""

import json
import re
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt

plt.switch_backend("svg")
plt.rcParams.update({"svg.hashsalt": "lit_specrl", "font.size": 10, "axes.spines.top": False})

HERE = Path(__file__).parent
PAGE = (HERE.parent / "results.md").read_text("utf-8")
COLOURS = ["#3056a0", "#c4622d", "#4c8c4a", "#8a5a9e", "#7a7a7a"]


def rows(heading: str, occurrence: int = 0) -> list[list[str]]:
    """Cells of the table whose first line begins with the heading, which may stand above several."""
    lines = PAGE.split(f"| {heading} |")[occurrence + 1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def number(text: str) -> float:
    return float(re.search(r"[-+]?\d*\.?\d+", text.replace(",", ""))[0])


def save(name: str) -> None:
    plt.tight_layout()
    plt.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close()


def quickstart_stages() -> None:
    table = rows("seed | held-out accuracy before -> after")
    plt.figure(figsize=(6, 2.6))
    left = [0.0] * len(table)
    for column, stage, colour in zip((3, 4, 5, 6), ("update", "generation", "weights", "other"), COLOURS, strict=False):
        seconds = [number(row[2]) * number(row[column]) / 100 for row in table]
        plt.barh([f"seed {row[0]}" for row in table], seconds, left=left, label=stage, color=colour)
        left = [start + width for start, width in zip(left, seconds, strict=True)]
    plt.xlabel("seconds a step (20 steps, two CPU cores with bf16)")
    plt.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    save("quickstart_stages")


def reuse_cost() -> None:
    table = rows("reuse | seeds")
    plt.figure(figsize=(7, 4.5))
    for index, row in enumerate(table):
        low, high = (float(bound) for bound in re.search(r"\(([-+.\d]+) to ([-+.\d]+)\)", row[4]).groups())
        saved, middle = number(row[2]), number(row[4])
        colour = plt.get_cmap("tab20")(index)
        plt.errorbar(saved, middle, [[middle - low], [high - middle]], fmt="o", color=colour, capsize=3)
        plt.plot([], [], "o", color=colour, label=row[0].replace("`", ""))
    plt.axhline(0, color="#bbbbbb", linewidth=1)
    plt.xscale("log")
    plt.xticks([1, 1.5, 2, 3, 5, 7], ["1", "1.5", "2", "3", "5", "7"])
    plt.minorticks_off()
    plt.xlabel("times fewer tokens")
    plt.ylabel("score, with - without")
    plt.title("54 steps of the test bed; 95 % intervals over pairs of seeds", fontsize=9)
    plt.legend(fontsize=7, frameon=False)
    save("reuse_cost")


def long_sums_scores() -> None:
    table = rows("learning rate | reuse | tokens generated")
    _, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, rate in zip(axes, ("2e-6", "3e-6"), strict=True):
        runs = [row for row in table if row[0] == rate]
        for row, colour in zip(runs, COLOURS, strict=False):
            scores = [float(score) for score in row[6].split()]
            epochs = [3 * (index + 1) for index in range(len(scores))]
            axis.plot(epochs, scores, "o-", markersize=3, color=colour, label=row[1].replace("`", ""))
        axis.set_title(f"learning rate {rate}, seed 0", fontsize=9)
        axis.set_xlabel("epochs")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("held-out score (128 sums)")
    save("long_sums_scores")


def drain() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    points = ["1", "4", "16", "32", "drain"]
    for axis, title, occurrence in zip(
        axes, ("n-grams, an untrained policy", "history, a trained policy"), (0, 1), strict=True
    ):
        _, *drafting, scheduler = rows("active requests | 1", occurrence)
        for row, colour in zip(drafting, COLOURS, strict=False):
            axis.plot(
                points, [number(cell) for cell in row[1:]], "o-", markersize=3, color=colour, label=row[0].split(",")[0]
            )
        axis.plot(points[-1:], [number(scheduler[-1])], "*", markersize=9, color=COLOURS[3], label="AdaptiveScheduler")
        axis.axhline(1, color="#bbbbbb", linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("active requests, and a drain from 32 to 1")
    axes[0].set_ylabel("speed, without a drafter = 1")
    axes[1].legend(frameon=False, fontsize=8)
    figure.suptitle("Speculation by the number of active requests (two CPU cores)", fontsize=10)
    save("drain")


def reuse_stages() -> None:
    table = rows("| tokens generated | generation and verification | whole run")
    plt.figure(figsize=(6.5, 2.4))
    rollout = [number(row[2]) for row in table]
    rest = [number(row[3]) - seconds for row, seconds in zip(table, rollout, strict=True)]
    names = [row[0].split(" (")[0] for row in table]
    plt.barh(names, rollout, color=COLOURS[0], label="generation and verification")
    plt.barh(names, rest, left=rollout, color=COLOURS[1], label="all else")
    plt.gca().invert_yaxis()
    plt.xlabel("seconds of 40 steps on long sums, seed 0 (two CPU cores)")
    plt.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    save("reuse_stages")


def distillation() -> None:
    table = rows("drafter | step 1")
    plt.figure(figsize=(6.5, 3.2))
    steps = ["1", "2-5", "6-10", "11-15", "16-20"]
    for row, colour in zip(table, COLOURS, strict=False):
        means = [sum(map(float, cell.split(" / "))) / len(cell.split(" / ")) for cell in row[1:]]
        plt.plot(steps, means, "o-", markersize=3, color=colour, label=row[0].replace("`", ""))
    plt.xlabel("steps of training")
    plt.ylabel("tokens a row and step")
    plt.title("quickstart's task, K = 3, mean of seeds 0 and 1", fontsize=9)
    plt.legend(fontsize=6.5, frameon=False)
    save("distillation")


def reuse_by_step() -> None:
    """Means and 95 % half-widths over the ten seeds of the test bed, of the report of its command."""
    arms = json.loads((HERE / "reuse_by_step.json").read_text("utf-8"))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3))
    for (arm, curves), colour in zip(arms.items(), COLOURS, strict=False):
        steps = range(1, len(curves["reward"]) + 1)
        validated = {int(step): pair for step, pair in curves["score"].items()}
        for axis, at, pairs, mark in (
            (axes[0], steps, curves["reward"], ""),
            (axes[1], steps, curves["tokens"], ""),
            (axes[2], list(validated), list(validated.values()), "o"),
        ):
            means, widths = zip(*pairs, strict=True)
            axis.plot(at, means, marker=mark, markersize=3, color=colour, linewidth=1.3, label=arm)
            low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
            axis.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
    for axis, title, unit in zip(
        axes,
        ("reward, mean of the last 6 steps", "tokens generated", "held-out score"),
        ("share of right steps", "tokens a step", "share of 512 sums"),
        strict=True,
    ):
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="step", ylabel=unit)
    axes[1].set_ylim(0, None)
    axes[2].legend(frameon=False, fontsize=8)
    figure.suptitle("Test bed with and without reuse: mean of ten seeds, 95 % bands", fontsize=10)
    save("reuse_by_step")


def reduce_report(report: Path) -> None:
    """Write the means and half-widths that `reuse_by_step` draws, of a report of `lit-specrl bench rollout`."""
    runs = json.loads(report.read_text("utf-8"))["runs"]
    arms = {}
    for label, arm in (("without", "without"), ("e^0.5", "e^0.5"), ("the block", "with")):
        of_arm = [run for run in runs if run["arm"] == arm]
        rewards = [[step["metrics"]["reward"] for step in run["steps"]] for run in of_arm]
        tokens = [[step["generated_tokens"] for step in run["steps"]] for run in of_arm]
        steps = [evaluation["step"] for evaluation in of_arm[0]["evaluations"]]
        scores = [[evaluation["metrics"]["val_accuracy"] for evaluation in run["evaluations"]] for run in of_arm]
        arms[label] = {
            "reward": bands(
                [[statistics.fmean(row[max(0, end - 6) : end]) for end in range(1, 55)] for row in rewards]
            ),
            "tokens": bands(tokens),
            "score": dict(zip(steps, bands(scores), strict=True)),
        }
    lines = ",\n".join(f"{json.dumps(arm)}: {json.dumps(curves)}" for arm, curves in arms.items())
    (HERE / "reuse_by_step.json").write_text(f"{{{lines}}}\n", "utf-8")


def bands(seeds: list[list[float]]) -> list[list[float]]:
    """Mean and 95 % half-width (Student's t) over ten seeds, for each point of a curve."""
    assert len(seeds) == 10, "the quantile is of nine degrees of freedom"
    width = 2.262 / 10**0.5
    return [
        [round(statistics.fmean(point), 4), round(width * statistics.stdev(point), 4)]
        for point in zip(*seeds, strict=True)
    ]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        reduce_report(Path(argument))
    quickstart_stages()
    reuse_cost()
    reuse_by_step()
    reuse_stages()
    long_sums_scores()
    drain()
    distillation()
