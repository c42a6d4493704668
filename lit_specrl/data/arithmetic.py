"""Sums of small numbers: a task that a small model learns in minutes."""

from __future__ import annotations

import random
from typing import Any, Literal

import xxhash

from lit_specrl.data.sources import PromptSource

VALIDATION_SHARE = 5
"""One in this many groups of terms belongs to validation."""


class ArithmeticSource(PromptSource):
    """Distinct questions such as `What is 3 + 5 + 4?` with their sums.

    The terms decide the split, whatever their order and whatever the seed: a sum asked in training never comes up in
    validation, also not with its terms swapped.

    Args:
        num_prompts: number of questions.
        seed: chooses among the questions of the split.
        num_terms: numbers to add.
        max_term: largest number; the smallest is 1.
        split: `train` or `validation`, which share no sum.
        name: what results are reported under.

    Raises:
        ValueError: for settings out of range, and from `load` when the split has fewer distinct questions than asked
            for.

    Example:
        >>> ArithmeticSource(1).load()
        [{'question': 'What is 8 + 8 + 5?', 'answer': '21'}]
    """

    def __init__(
        self,
        num_prompts: int = 256,
        seed: int = 0,
        num_terms: int = 3,
        max_term: int = 9,
        split: Literal["train", "validation"] = "train",
        name: str = "arithmetic",
    ) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        if num_terms < 2:
            raise ValueError(f"num_terms must be at least 2, got {num_terms}")
        if max_term < 1:
            raise ValueError(f"max_term must be at least 1, got {max_term}")
        if split not in ("train", "validation"):
            raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
        self.num_prompts = num_prompts
        self.seed = seed
        self.num_terms = num_terms
        self.max_term = max_term
        self.split = split
        self.name = name

    def load(self) -> list[dict[str, Any]]:
        size = self.max_term**self.num_terms
        # Far more candidates than needed, without repeats; all there are in a small space, so that a shortage is exact.
        num_candidates = min(size, 1000 + 20 * self.num_prompts)
        candidates = map(self._terms, random.Random(self.seed).sample(range(size), num_candidates))
        chosen = [terms for terms in candidates if split_of(terms) == self.split][: self.num_prompts]
        if len(chosen) < self.num_prompts:
            raise ValueError(
                f"num_prompts={self.num_prompts} but the {self.split} split of {self.num_terms} terms up to "
                f"{self.max_term} has only {len(chosen)} distinct questions; ask for fewer, or raise num_terms or "
                "max_term"
            )
        return [{"question": f"What is {' + '.join(map(str, t))}?", "answer": str(sum(t))} for t in chosen]

    def _terms(self, index: int) -> list[int]:
        """The `index`-th expression: its digits in base `max_term`, plus one."""
        return [index // self.max_term**place % self.max_term + 1 for place in range(self.num_terms)]


def split_of(terms: list[int]) -> str:
    """The split that owns a sum, by a hash of its sorted terms."""
    key = "+".join(map(str, sorted(terms)))
    return "train" if xxhash.xxh3_64_intdigest(key.encode()) % VALIDATION_SHARE else "validation"
