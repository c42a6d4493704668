"""Further arms of a comparison: the callbacks in question with other arguments, and all arms side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_specrl.bench.rollout.intervals import Interval
from lit_specrl.bench.rollout.paired import COSTS, LAST, MEAN, Comparison
from lit_specrl.bench.rollout.runs import WITH, WITHOUT
from lit_specrl.cli.fit_config import Configuration, with_arguments, without_callbacks


def further_arms(configuration: Configuration, names: Sequence[str], file: Path) -> dict[str, Configuration]:
    """The configuration with other arguments of the callbacks in question.

    Args:
        configuration: of the runs with the callbacks.
        names: of the callbacks in question.
        file: YAML that holds, by the arm's name, the callback's arguments. Where several callbacks are in question it
            holds the arguments of each that changes, by the callback's name, and `null` for one that the arm leaves
            out.

    Raises:
        ValueError: a callback that is not in question, or a file without arms.
    """
    arms = yaml.safe_load(file.read_text("utf-8"))
    if not isinstance(arms, dict) or not all(isinstance(arguments, dict) for arguments in arms.values()):
        raise ValueError(f"--arms {file} must hold {_wanted(names)}")
    if taken := {WITHOUT, WITH} & set(arms):
        raise ValueError(f"--arms {file}: {taken.pop()} is the name of an arm that is always there; take another one")
    changes = arms if len(names) > 1 else {arm: {names[0]: arguments} for arm, arguments in arms.items()}
    return {str(arm): _arm(configuration, names, of_arm, f"--arms {file}: {arm}") for arm, of_arm in changes.items()}


def _wanted(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f'the arguments of {names[0]} for each arm, by the arm\'s name, as in "twice: {{max_reuses: 2}}"'
    return (
        f"arguments of {', '.join(names)} for each arm, by the names of arm and callback, as in "
        f'"first alone: {{{names[1]}: null}}"; null leaves a callback out'
    )


def _arm(configuration: Configuration, names: Sequence[str], changes: Mapping[str, Any], label: str) -> Configuration:
    for name, arguments in changes.items():
        if name not in names or not (arguments is None or isinstance(arguments, dict)):
            raise ValueError(f"{label} has {name}: {arguments}, but must hold {_wanted(names)}")
    left_out = [name for name, arguments in changes.items() if arguments is None]
    configuration = without_callbacks(configuration, left_out) if left_out else configuration
    for name, arguments in changes.items():
        if arguments is not None:
            configuration = with_arguments(configuration, name, arguments)
    return configuration


def arms_table(comparisons: Mapping[str, Comparison], cost: str, score: float | None) -> list[dict[str, Any]]:
    """What each arm saves and what it costs in learning, each against the runs without the callback.

    Args:
        comparisons: by arm.
        cost: a key of `COSTS`.
        score: validation score that was looked for.
    """
    until = "" if score is None else f"{cost}_to_{score:g}"
    rows = []
    for arm, found in comparisons.items():
        row: dict[str, Any] = {"arm": arm, "seeds": max(each.num_seeds for each in found.ratios.values())}
        row |= {f"{name}_ratio": _text(found.ratios.get(name), "x") for name in COSTS if name in found.ratios}
        row |= {"score_last": _text(found.differences.get(LAST)), "score_mean": _text(found.differences.get(MEAN))}
        if until:
            row |= {until: _text(found.ratios_to_score.get(cost), "x"), "pairs_not_there": found.num_unreached}
        rows.append(row)
    return rows


def _text(interval: Interval | None, unit: str = "") -> str:
    if interval is None:
        return "-"
    return interval.text("{:.2f}x" if unit else "{:+.3f}")
