"""The evaluation prompts of a rank: every prompt once in each pass."""

from __future__ import annotations

from collections.abc import Iterator

from lit_specrl.data.loader import check_batch_size
from lit_specrl.data.order import even_chunks, rank_share, take
from lit_specrl.types import PromptBatch, SamplingConfig


class EvaluationLoader:
    """Yields every prompt once, in the order of the data.

    Ranks yield equally many batches and no batch is empty: the prompts of a rank are spread over its batches so that
    sizes differ by at most one. With one prompt per rank and step, a rank may hold two where the numbers do not divide.

    Args:
        prompts: all prompts of all ranks.
        batch_size: prompts per step over all ranks.
        rank: this rank.
        world_size: number of ranks.
        sampling: how to sample for these prompts; `None` leaves it to the module.

    Raises:
        ValueError: for a batch size that does not divide by the number of ranks, and for fewer prompts than ranks.
    """

    def __init__(
        self,
        prompts: PromptBatch,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        sampling: SamplingConfig | None = None,
    ) -> None:
        check_batch_size(batch_size, world_size)
        if len(prompts) < world_size:
            raise ValueError(f"{len(prompts)} prompts are fewer than {world_size} ranks; add data or use fewer ranks")
        self.batch_size = batch_size
        self.num_prompts = len(prompts)
        self.world_size = world_size
        self.sampling = sampling
        self._prompts = take(prompts, rank_share(prompts.uids, rank, world_size))

    def __len__(self) -> int:
        """Batches per pass, the same on every rank."""
        fewest_of_a_rank = self.num_prompts // self.world_size
        return min(-(-self.num_prompts // self.batch_size), fewest_of_a_rank)

    def __iter__(self) -> Iterator[PromptBatch]:
        for indices in even_chunks(list(range(len(self._prompts))), len(self)):
            yield take(self._prompts, indices, self.sampling)
