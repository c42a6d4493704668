"""Validation, test and prediction: scored rollouts become accuracies, or records."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_specrl.algorithms.evaluation import AccuracyMeter
from lit_specrl.answers import extract_answer
from lit_specrl.distributed.collectives import gather_objects
from lit_specrl.rewards import Reward
from lit_specrl.types import PromptBatch, Rollouts


class Evaluator:
    """Accuracies of one evaluation, by number of responses per prompt.

    Args:
        reward: decides what counts as correct.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.answer_format = getattr(reward, "answer_format", "text")
        self.begin()

    def begin(self) -> None:
        """Forget the evaluation before."""
        self._seen: list[tuple[int, str, list[float], list[str | None]]] = []
        self._num_unscored = 0  # prompts without a score for any row

    def update(self, rollouts: Rollouts) -> None:
        """Take in the scored rollouts of one batch."""
        size = rollouts.request.sampling.num_generations
        correct, said = rollouts.rewards[self.reward.name], rollouts.said
        for index, source in enumerate(rollouts.prompts.sources):
            rows = range(index * size, (index + 1) * size)
            if all(correct[row] is None for row in rows):
                self._num_unscored += 1
                continue
            values = [correct[row] or 0.0 for row in rows]
            self._seen.append((size, source, values, [extract_answer(said[row], self.answer_format) for row in rows]))

    def compute(self, device: torch.device) -> dict[str, float]:
        """Accuracies over all ranks, of the prompts that have a score; every rank must call it.

        Args:
            device: where they are summed.
        """
        if num_unscored := sum(gather_objects(self._num_unscored)):
            rank_zero_warn(
                f"{num_unscored} prompts of this evaluation have no score: {self.reward.name!r}, the first reward, gave "
                "None for all their responses; they are left out of the accuracies"
            )
        # of all ranks, for some may have seen no prompt of a source, or none at all
        kinds = {kind for rank in gather_objects({(size, source) for size, source, *_ in self._seen}) for kind in rank}
        found: dict[str, float] = {}
        for size in sorted({size for size, _ in kinds}):
            meter = AccuracyMeter(sorted(source for of, source in kinds if of == size), size).to(device)
            for of, source, values, answers in self._seen:
                if of == size:
                    meter.update(source, values, answers)
            found |= meter.compute()
        return found


def prediction_records(batch: PromptBatch, rollouts: Rollouts) -> list[dict[str, Any]]:
    """Responses as one record per row, with the further columns of the data: `data_NAME` where a name is taken."""
    records = []
    for row in range(rollouts.num_rows):
        owner = rollouts.request.prompt_index(row)
        record: dict[str, Any] = {
            "uid": batch.uids[owner],
            "source": batch.sources[owner],
            "prompt": rollouts.prompts.prompts[owner],
            "answer": batch.answers[owner],
            "completion": rollouts.texts[row],
            "completion_length": rollouts.policy_lengths[row],
            "finish_reason": rollouts.finish_reasons[row],
            **({"turns": rollouts.episodes[row].turns} if rollouts.episodes else {}),
        }
        columns = batch.columns[owner] if batch.columns else {}
        records.append(record | {f"data_{name}" if name in record else name: columns[name] for name in columns})
    return records
