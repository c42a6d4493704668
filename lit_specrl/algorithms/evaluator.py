"""Validation, test and prediction: scored rollouts become accuracies, or records."""

from __future__ import annotations

from collections.abc import Sequence
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
        self._meters: dict[int, AccuracyMeter] = {}
        self._num_unscored = 0  # prompts without a score for any row

    def update(self, rollouts: Rollouts, sources: Sequence[str], device: torch.device) -> None:
        """Take in scored rollouts.

        Args:
            rollouts: of one batch.
            sources: names of all data sources of the evaluation.
            device: where the accuracies are summed.
        """
        size = rollouts.request.sampling.num_generations
        if size not in self._meters:
            self._meters[size] = AccuracyMeter(list(sources), size).to(device)
        correct, said = rollouts.rewards[self.reward.name], rollouts.said
        for index, source in enumerate(rollouts.prompts.sources):
            rows = range(index * size, (index + 1) * size)
            if all(correct[row] is None for row in rows):
                self._num_unscored += 1
                continue
            self._meters[size].update(
                source,
                correct=[correct[row] or 0.0 for row in rows],
                answers=[extract_answer(said[row], self.answer_format) for row in rows],
            )

    def compute(self) -> dict[str, float]:
        """Accuracies over all ranks, of the prompts that have a score; every rank must call it."""
        if num_unscored := sum(gather_objects(self._num_unscored)):
            rank_zero_warn(
                f"{num_unscored} prompts of this evaluation have no score: {self.reward.name!r}, the first reward, gave "
                "None for all their responses; they are left out of the accuracies"
            )
        return {name: value for meter in self._meters.values() for name, value in meter.compute().items()}


def prediction_records(batch: PromptBatch, rollouts: Rollouts) -> list[dict[str, Any]]:
    """Responses as one record per row."""
    return [
        {
            "uid": batch.uids[owner],
            "source": batch.sources[owner],
            "prompt": rollouts.prompts.prompts[owner],
            "answer": batch.answers[owner],
            "completion": rollouts.texts[row],
            "completion_length": rollouts.policy_lengths[row],
            "finish_reason": rollouts.finish_reasons[row],
            **({"turns": rollouts.episodes[row].turns} if rollouts.episodes else {}),
        }
        for row in range(rollouts.num_rows)
        for owner in [rollouts.request.prompt_index(row)]
    ]


def source_names(loaders: Any) -> list[str]:
    """Names of the data sources of one loader or several."""
    loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return sorted({source for loader in loaders for source in loader.sources})
