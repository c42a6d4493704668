"""Which prompts a rank owns, in which order an epoch visits them, and how they are cut into batches.

All pure functions; ownership and shuffling depend on the uids alone, not on the order of the data or on a generator.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import xxhash

from lit_specrl.types import PromptBatch, SamplingConfig


def rank_share(uids: list[str], rank: int, world_size: int) -> list[int]:
    """Indices of the prompts that belong to a rank, in the order of the data.

    Ranks own neighbouring stretches of the sorted uids, of lengths that differ by at most one. Uids are hashes, so a
    stretch is a random sample; when data is added or taken away, few prompts change their rank.

    Args:
        uids: [B] identities of all prompts.
        rank: this rank.
        world_size: number of ranks.

    Example:
        >>> [rank_share(["d", "a", "c", "b"], rank, world_size=2) for rank in range(2)]
        [[1, 3], [0, 2]]
    """
    by_uid = sorted(range(len(uids)), key=lambda index: uids[index])
    start, stop = (len(uids) * r // world_size for r in (rank, rank + 1))
    return sorted(by_uid[start:stop])


def epoch_order(uids: list[str], seed: int, epoch: int) -> list[int]:
    """Indices of the prompts in the order of an epoch, a fresh shuffle for each seed and epoch.

    Sorting by a hash that includes seed and epoch needs no generator, and any subset of the prompts keeps its order.

    Args:
        uids: [B] identities of the prompts to shuffle.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
    """
    return sorted(
        range(len(uids)), key=lambda index: xxhash.xxh3_128_hexdigest(f"{seed}/{epoch}/{uids[index]}".encode())
    )


def even_chunks(indices: list[int], num_chunks: int) -> list[list[int]]:
    """Cut a list into chunks whose lengths differ by at most one.

    Example:
        >>> even_chunks([0, 1, 2, 3, 4], 2)
        [[0, 1], [2, 3, 4]]
    """
    edges = [len(indices) * chunk // num_chunks for chunk in range(num_chunks + 1)]
    return [indices[start:stop] for start, stop in pairwise(edges)]


def take(prompts: PromptBatch, indices: list[int], sampling: SamplingConfig | None = None) -> PromptBatch:
    """The prompts at these indices, in that order.

    Args:
        prompts: where to take from.
        indices: which ones.
        sampling: becomes `sampling` of the result.
    """
    return replace(prompts.select(indices), sampling=sampling)
