"""Which samples a drafter is trained on, and in which portions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from lit_specrl.drafting.distillation.buffer import DistillationSample
from lit_specrl.drafting.distillation.entropy import policy_entropy

SampleChoice = Literal["random", "entropy", "rejection"]


def is_held_out(sample: DistillationSample, fraction: float) -> bool:
    """Whether a response is for evaluation alone; the same for the same tokens, in every step and run."""
    digest = xxhash.xxh3_64_intdigest(sample.token_ids.numpy().tobytes())
    return digest / 2**64 < fraction


def cut(samples: Sequence[DistillationSample], num_tokens: int) -> list[list[DistillationSample]]:
    """Parts of at least `num_tokens` tokens each, but for the last.

    Example:
        >>> cut([], 10)
        []
    """
    parts: list[list[DistillationSample]] = []
    room = 0
    for sample in samples:
        if room <= 0:
            parts.append([])
            room = num_tokens
        parts[-1].append(sample)
        room -= len(sample)
    return parts


def draw_scores(
    choice: SampleChoice,
    samples: Sequence[DistillationSample],
    rejection: Callable[[Sequence[DistillationSample]], Tensor],
) -> Tensor | None:
    """What the chance of each response to be drawn is in proportion to, [N]; `None` where all are alike.

    Args:
        choice: by what.
        samples: N responses.
        rejection: share of the draft tokens of each that the policy would reject (`DrafterTrainer.rejection`).
    """
    if choice == "random":
        return None
    return mean_entropies(samples) if choice == "entropy" else rejection(samples)


def mean_entropies(samples: Sequence[DistillationSample]) -> Tensor:
    """Mean entropy of the policy at the places of each response that can be drafted.

    Returns:
        [N] nats; 0 for responses in which nothing is drafted.
    """
    places = [policy_entropy(sample.top_logprobs[1:]) for sample in samples]  # [R - 1] each
    return torch.tensor([float(values.sum()) / max(len(values), 1) for values in places])


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def floor_fraction(samples: Sequence[DistillationSample]) -> float:
    """Share of responses that count least, where not all count alike."""
    weights = [sample.weight for sample in samples]
    if not weights or min(weights) == max(weights):
        return 0.0
    return mean([float(weight == min(weights)) for weight in weights])


def copied(state: Any, device: str | None = None) -> Any:
    """A deep copy that the next optimizer step does not reach; its tensors are on `device`, or where they were."""
    if isinstance(state, torch.Tensor):
        return state.to(device or state.device, copy=True)
    if isinstance(state, dict):
        return {name: copied(value, device) for name, value in state.items()}
    return [copied(value, device) for value in state] if isinstance(state, list) else state
