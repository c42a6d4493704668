"""The training prompts of a rank as an endless stream that can be left and resumed at any prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import xxhash
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_specrl.data.order import epoch_order, rank_share, take
from lit_specrl.types import PromptBatch


class PromptLoader:
    """Yields training prompts, epoch after epoch; the position survives a checkpoint.

    A pass (`for batch in loader`) is `len(loader)` batches from wherever the stream was left, so that the n-th batch of
    a run is the same however the run was interrupted. `draw` hands out extra prompts between batches; a pass is as long
    as without them, the stream just moves faster, and its epochs end earlier than the passes do.

    Every rank yields full batches, equally many, and no batch or draw holds a prompt twice: where an epoch has fewer
    prompts left than are asked for, they sit out and the next epoch begins.

    Args:
        prompts: all prompts of all ranks.
        batch_size: prompts per step over all ranks.
        seed: decides the order together with the epoch.
        shuffle: new order in each epoch of the stream; otherwise the order of the data.
        rank: this rank.
        world_size: number of ranks.

    Attributes:
        sources: names of the data sources of all prompts, the same on every rank.

    Raises:
        ValueError: for a batch size that does not divide by the number of ranks, and for fewer prompts than a batch.

    Example::

        loader = PromptLoader(prompts, batch_size=8)
        for batch in loader:
            print(batch.uids, loader.draw(2).uids)
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
        self._num_drawn = 0  # prompts of this rank in this epoch, in batches and in draws
        self._order: list[int] = []
        self._ordered_epoch: int | None = None  # epoch that `_order` belongs to

    @property
    def uids(self) -> list[str]:
        """Identities of the prompts that this rank owns."""
        return self._prompts.uids

    @property
    def num_left_over(self) -> int:
        """Prompts of all ranks that sit out an epoch that is handed out in batches alone."""
        return self.num_prompts % self.batch_size

    def __len__(self) -> int:
        """Batches per pass, the same on every rank: those of an epoch that is handed out in batches alone.

        Without a length Lightning would fetch one batch ahead, and a resumed run would miss that batch.
        """
        return self.num_prompts // self.batch_size

    def __iter__(self) -> Iterator[PromptBatch]:
        for _ in range(len(self)):
            yield self.draw(self.batch_size // self.world_size)

    def draw(self, num_prompts: int) -> PromptBatch:
        """The next `num_prompts` prompts of this rank from the stream, ahead of the next batch.

        All ranks must draw the same numbers in the same order, so that they begin each epoch together. A prompt occurs
        once in a draw, but an epoch that ends between a batch and a draw may bring it back in the same training step.

        Args:
            num_prompts: how many, at most an epoch's worth of a rank.

        Raises:
            ValueError: for less than one prompt, and for more than every rank has.

        Example::

            loader = PromptLoader(prompts, batch_size=2, shuffle=False)
            iterator = iter(loader)
            next(iterator)  # prompts 0 and 1
            loader.draw(3)  # prompts 2, 3 and 4
            next(iterator)  # prompts 5 and 6
        """
        per_epoch = self.num_prompts // self.world_size  # some ranks have one more, which would bring them out of step
        if not 1 <= num_prompts <= per_epoch:
            raise ValueError(
                f"num_prompts must be between 1 and {per_epoch}, the prompts of a rank in an epoch, got {num_prompts};"
                " draw fewer at a time or add data"
            )
        if self._num_drawn + num_prompts > per_epoch:
            self._epoch, self._num_drawn = self._epoch + 1, 0
        start = self._num_drawn
        self._num_drawn += num_prompts
        return take(self._prompts, self._current_order()[start : self._num_drawn])

    def _current_order(self) -> list[int]:
        """Indices of the prompts of this rank in the order of the current epoch, sorted once an epoch."""
        if self._ordered_epoch != self._epoch:
            uids = self._prompts.uids
            self._order = epoch_order(uids, self.seed, self._epoch) if self.shuffle else list(range(len(uids)))
            self._ordered_epoch = self._epoch
        return self._order

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, in prompts of all ranks and the same on every rank, and what the order depends on."""
        return {
            "epoch": self._epoch,
            "num_drawn": self._num_drawn * self.world_size,
            "order": self._order_identity(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last prompt of the saved run; warns when batches differ from those of the saved settings.

        With another batch size the epoch continues at the very next prompt; only how many sit out at its end may
        change. With another number of ranks it continues after as many prompts over all ranks, rounded down to equally
        many on each. Since ranks then own other prompts, some of the epoch repeat and some are left out; so it is with
        another seed or other data. Where the epoch now has too few prompts to go on, the next one begins.
        """
        now = self._order_identity()
        changed = [f"{name} {old} -> {now[name]}" for name, old in state_dict["order"].items() if old != now[name]]
        if changed:
            rank_zero_warn(
                f"The order of prompts differs from that of the checkpoint ({', '.join(changed)}): the epoch continues"
                " after as many prompts, but some of its prompts may repeat and some may be left out."
            )
        self._epoch, self._num_drawn = state_dict["epoch"], state_dict["num_drawn"] // self.world_size

    def _order_identity(self) -> dict[str, Any]:
        """All that the batches depend on, apart from the position."""
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
