"""How well the prompts of a step were answered, told to the training data."""

from __future__ import annotations

from typing import Any

from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.engines.episodes import prompt_of
from lit_specrl.types import Rollouts


def pass_rates(rollouts: Rollouts) -> dict[str, float]:
    """Mean of the first reward over the rows of each prompt, by its uid in the data; without prompts that it does not
    apply to.

    Args:
        rollouts: N scored rows.
    """
    values: dict[str, list[float]] = {}
    first = next(iter(rollouts.rewards.values()), [])
    for row, value in enumerate(first):
        if value is not None:
            uid = prompt_of(rollouts.prompts.uids[rollouts.request.prompt_index(row)])
            values.setdefault(uid, []).append(value)
    return {uid: sum(found) / len(found) for uid, found in values.items()}


def record_pass_rates(loader: Any, rollouts: Rollouts) -> None:
    """Tell training data whose schedule reads pass rates those of all ranks.

    Args:
        loader: where the prompts come from, such as a `PromptLoader`.
        rollouts: of this rank, scored.
    """
    if getattr(loader, "reads_pass_rates", False):
        for found in gather_objects(pass_rates(rollouts)):
            loader.record_pass_rates(found)
