"""One seed per rollout, decided by what the rollout is for."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash


def rollout_seeds(run_seed: int, purpose: str, uids: Sequence[str], num_generations: int) -> list[int]:
    """Seeds of all rows, [N].

    A seed is a hash of the run's seed, the purpose (which step of the run, or which evaluation), the prompt's uid and the sample's
    index. No generator has to be saved, and neither the order of the prompts nor the number of ranks changes what is sampled.

    Args:
        run_seed: seed of the run.
        purpose: such as "train/12"; another purpose gives independent seeds.
        uids: [B] prompt identities.
        num_generations: rollouts per prompt, G.

    Example:
        >>> rollout_seeds(0, "train/0", ["a"], 2) == rollout_seeds(0, "train/0", ["b", "a"], 2)[2:]
        True
    """
    return [
        xxhash.xxh3_64_intdigest(f"{run_seed}/{purpose}/{uid}/{sample}".encode()) >> 1  # engines take signed 64 bits
        for uid in uids
        for sample in range(num_generations)
    ]
