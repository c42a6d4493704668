"""One seed per rollout, decided by what the rollout is for, and the numbers drawn from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor


def rollout_seeds(run_seed: int, purpose: str, uids: Sequence[str], num_generations: int) -> list[int]:
    """Seeds of all rows, [N].

    A seed is a hash of the run's seed, the purpose (which step of the run, or which evaluation), the prompt's uid and
    the sample's index. No generator has to be saved, and neither the order of the prompts nor the number of ranks
    changes what is sampled.

    Args:
        run_seed: seed of the run.
        purpose: such as "train/12"; another purpose gives independent seeds.
        uids: [B] prompt identities.
        num_generations: rollouts per prompt, G.

    Example:
        >>> rollout_seeds(0, "train/0", ["a"], 2) == rollout_seeds(0, "train/0", ["b", "a"], 2)[2:]
        True
    """
    return [_hash(f"{run_seed}/{purpose}/{uid}/{sample}") for uid in uids for sample in range(num_generations)]


def turn_seed(seed: int, turn: int) -> int:
    """Seed of a further turn of a row, which draws other numbers than the turns before.

    Args:
        seed: of the row, and of its first turn.
        turn: turns before.
    """
    return _hash(f"{seed}/turn/{turn}") if turn else seed


def row_uniforms(seeds: Sequence[int], length: int, purpose: str) -> Tensor:
    """One uniform number per row and token, [N, length] float64: a row's draws do not depend on its neighbours.

    Args:
        seeds: [N] one seed per row.
        length: numbers per row.
        purpose: what they are for; the same seeds give independent numbers for another purpose.
    """
    generator = torch.Generator()
    rows = [
        torch.rand(length, generator=generator.manual_seed(_hash(f"{seed}/{purpose}")), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.float64)


def token_uniforms(seeds: Sequence[int], positions: Sequence[int], purpose: str) -> Tensor:
    """One uniform number [N] float64 for each token that is sampled, decided by its row's seed and its position.

    Nothing that happened before, and nothing that is sampled beside it, changes it.

    Args:
        seeds: [N] seed of the token's row.
        positions: [N] place of the token in its row.
        purpose: what the number is for.
    """
    numbers = [_hash(f"{seed}/{position}/{purpose}") for seed, position in zip(seeds, positions, strict=True)]
    return (torch.tensor(numbers, dtype=torch.long) >> 10).double() / 2**53  # 53 of the 63 bits


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1  # engines and generators take signed 64 bits
