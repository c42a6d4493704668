"""What k answers to a question say about a policy: mean@k, pass@k and maj@k."""

from __future__ import annotations

import re
from collections import defaultdict
from math import comb

import torch
from torch import Tensor
from torchmetrics import Metric

CORRECT = 0.5
"""A response counts as correct for pass@k from this value on; 0/1 verifiers are unaffected."""

NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.\d*)?")


def mean_at_k(correct: list[float]) -> float:
    """Mean correctness of the k responses to one prompt.

    Args:
        correct: [k] correctness, 1 right and 0 wrong.

    Example:
        >>> mean_at_k([1.0, 0.0, 0.0, 0.0])
        0.25
    """
    return sum(correct) / len(correct)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k responses drawn without replacement hold a correct one.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1): `1 - C(n - c, k) / C(n, k)`.

    Args:
        num_samples: responses seen, n.
        num_correct: how many of them are correct, c.
        k: responses drawn, at most n.

    Raises:
        ValueError: for k or c beyond n.

    Example:
        >>> pass_at_k(num_samples=4, num_correct=1, k=2)
        0.5
    """
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k must lie between 1 and num_samples={num_samples}, got {k}; sample more responses per prompt"
        )
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must lie between 0 and num_samples={num_samples}, got {num_correct}")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def maj_at_k(correct: list[float], answers: list[str | None]) -> float:
    """Correctness of the answer most responses agree on.

    Responses without an answer do not vote; without any vote the result is 0. A tie is settled in expectation: the mean
    over the tied answers.

    Args:
        correct: [k] correctness, 1 right and 0 wrong.
        answers: [k] extracted answers, `None` where there was none; compared after `normalise_answer`.

    Example:
        >>> maj_at_k([1.0, 1.0, 0.0, 0.0], ["7", "7.0", "8", None])
        1.0
    """
    votes = defaultdict(list)
    for value, answer in zip(correct, answers, strict=True):
        if answer is not None:
            votes[normalise_answer(answer)].append(value)
    most = max(map(len, votes.values()), default=0)
    winners = [mean_at_k(values) for values in votes.values() if len(values) == most]
    return mean_at_k(winners) if winners else 0.0


def normalise_answer(answer: str) -> str:
    r"""Bring spellings of one answer together: without blanks, dollar signs, final stop, and numbers in one form.

    Example:
        >>> [normalise_answer(answer) for answer in ["1,200.50", "$ 7.0 $", "\\frac{1} {2}.", "(A)"]]
        ['1200.5', '7', '\\frac{1}{2}', '(A)']
    """
    text = re.sub(r"\s", "", answer).lstrip("$").rstrip("$.")
    if not NUMBER.fullmatch(text):
        return text
    text = text.replace(",", "").removeprefix("+")
    return text.rstrip("0").rstrip(".") if "." in text else text


class AccuracyMeter(Metric):
    """Accuracy of a validation run, per data source and over all prompts.

    Sums and counts are kept apart and added over ranks. With N = `num_generations`, `compute` returns

    - `val-core/{source}/acc/mean@N`, `.../pass@N`, `.../maj@N`: means over the prompts of the source;
    - `val-core/{source}/acc/pass@k` for each further k asked for;
    - `val_accuracy`: mean@N over all prompts, whatever their source, the number to monitor.

    Sources without a prompt are left out.

    Args:
        sources: names of the data sources, the same on every rank.
        num_generations: responses per prompt, N.
        pass_ks: further k of pass@k, each at most N.

    Raises:
        ValueError: for k beyond N, and from `update` for an unknown source or another number of responses.

    Example:
        >>> meter = AccuracyMeter(["gsm8k"], num_generations=2)
        >>> meter.update("gsm8k", correct=[1.0, 0.0], answers=["7", "8"])
        >>> meter.compute()["val_accuracy"]
        0.5
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, sources: list[str], num_generations: int, pass_ks: list[int] | None = None) -> None:
        super().__init__()
        self.sources = list(sources)
        self.num_generations = num_generations
        self.pass_ks = sorted({*(pass_ks or []), num_generations})
        if self.pass_ks[0] < 1 or self.pass_ks[-1] > num_generations:
            raise ValueError(f"pass_ks must lie between 1 and num_generations={num_generations}, got {pass_ks}")
        self.statistics = [f"mean@{num_generations}", f"maj@{num_generations}", *(f"pass@{k}" for k in self.pass_ks)]
        shape = len(self.sources), len(self.statistics)
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")  # [sources, statistics]
        self.add_state("counts", torch.zeros(len(self.sources), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, source: str, correct: list[float], answers: list[str | None]) -> None:
        """Count one prompt.

        Args:
            source: data source of the prompt.
            correct: [N] correctness of its responses, 1 right and 0 wrong.
            answers: [N] their extracted answers.
        """
        if source not in self.sources:
            raise ValueError(f"unknown source {source!r}; expected one of {self.sources}")
        if not len(correct) == len(answers) == self.num_generations:
            raise ValueError(
                f"expected num_generations={self.num_generations} responses for each prompt, got {len(correct)} values "
                f"and {len(answers)} answers"
            )
        num_correct = sum(value >= CORRECT for value in correct)
        passes = [pass_at_k(self.num_generations, num_correct, k) for k in self.pass_ks]
        values = [mean_at_k(correct), maj_at_k(correct, answers), *passes]
        self.sums[self.sources.index(source)] += torch.tensor(values, dtype=self.sums.dtype, device=self.sums.device)
        self.counts[self.sources.index(source)] += 1

    def compute(self) -> dict[str, float]:
        """Accuracies by logged name; empty before the first prompt."""
        results = {}
        for source, sums, count in zip(self.sources, self.sums.tolist(), self.counts.tolist(), strict=True):
            if count:
                for statistic, total in zip(self.statistics, sums, strict=True):
                    results[f"val-core/{source}/acc/{statistic}"] = total / count
        num_prompts = self.counts.sum().item()
        if num_prompts:
            results["val_accuracy"] = self.sums[:, 0].sum().item() / num_prompts
        return results
