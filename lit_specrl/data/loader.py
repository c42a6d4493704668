"""The training prompts of a rank as an endless stream that can be left and resumed at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import xxhash
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_specrl.data.order import epoch_order, even_chunks, rank_share, take
from lit_specrl.types import PromptBatch


class PromptLoader:
    """Yields training prompts, epoch after epoch; the position survives a checkpoint.

    A pass (`for batch in loader`) is `len(loader)` batches from wherever the last pass was left, so that the n-th batch of
    a run is the same however the run was interrupted. Every rank yields full batches, equally many; the remainder of an
    epoch sits out.

    Args:
        prompts: all prompts of all ranks.
        batch_size: prompts per step over all ranks.
        seed: decides the order together with the epoch.
        shuffle: new order in each epoch; otherwise the order of the data.
        rank: this rank.
        world_size: number of ranks.

    Attributes:
        sources: names of the data sources of all prompts, the same on every rank.

    Raises:
        ValueError: for a batch size that does not divide by the number of ranks, and for fewer prompts than a batch.

    Example::

        loader = PromptLoader(prompts, batch_size=8)
        for batch in loader:
            print(batch.uids)
    """

    def __init__(
        self,
        prompts: PromptBatch,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_batch_size(batch_size, world_size)
        if len(prompts) < batch_size:
            raise ValueError(
                f"{len(prompts)} prompts are fewer than one step of batch_size={batch_size}; add data or lower batch_size"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_prompts = len(prompts)
        self.world_size = world_size
        self.sources = sorted(set(prompts.sources))
        self._prompts = take(prompts, rank_share(prompts.uids, rank, world_size))
        self._fingerprint = xxhash.xxh3_64_hexdigest("/".join(sorted(prompts.uids)).encode())
        self._epoch = 0
        self._num_yielded = 0  # batches of this epoch

    @property
    def num_left_over(self) -> int:
        """Prompts of all ranks that sit out an epoch."""
        return self.num_prompts % self.batch_size

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank.

        Without a length Lightning would fetch one batch ahead, and a resumed run would miss that batch.
        """
        return self.num_prompts // self.batch_size

    def __iter__(self) -> Iterator[PromptBatch]:
        batches: list[list[int]] = []
        cut_for: int | None = None  # epoch that `batches` belongs to
        for _ in range(len(self)):
            if self._num_yielded >= len(self):
                self._epoch, self._num_yielded = self._epoch + 1, 0
            if cut_for != self._epoch:
                batches, cut_for = self._batches(), self._epoch
            self._num_yielded += 1
            yield take(self._prompts, batches[self._num_yielded - 1])

    def _batches(self) -> list[list[int]]:
        """Indices of the prompts in each batch of the current epoch."""
        count = len(self._prompts)
        order = epoch_order(self._prompts.uids, self.seed, self._epoch) if self.shuffle else list(range(count))
        return even_chunks(order[: len(self) * self.batch_size // self.world_size], len(self))

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, the same on every rank, and what the order depends on."""
        return {"epoch": self._epoch, "num_yielded": self._num_yielded, "order": self._order_identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last batch of the saved run; warns when the same position now means other prompts."""
        now = self._order_identity()
        changed = [f"{name} {old} -> {now[name]}" for name, old in state_dict["order"].items() if old != now[name]]
        if changed:
            rank_zero_warn(
                f"The order of prompts differs from that of the checkpoint ({', '.join(changed)}): the epoch continues at"
                " the same step, but some of its prompts will repeat and some will be left out."
            )
        self._epoch, self._num_yielded = state_dict["epoch"], state_dict["num_yielded"]

    def _order_identity(self) -> dict[str, Any]:
        """All that the order depends on, apart from the epoch."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "num_prompts": self.num_prompts,
            "fingerprint": self._fingerprint,
        }


def check_batch_size(batch_size: int, world_size: int) -> None:
    """Raise `ValueError` unless every rank gets the same number of prompts of a step, at least one."""
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} prompts per step cannot be divided among {world_size} ranks;"
            f" use a positive multiple of {world_size}"
        )
