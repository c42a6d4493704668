"""The training prompts of a rank as an endless stream that can be left and resumed at any prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import xxhash
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_specrl.checkpoints.identity import identity_of, settings_of
from lit_specrl.data.order import rank_share, take
from lit_specrl.data.schedule import InOrder, PromptSchedule, ScheduledPrompt, Shuffled
from lit_specrl.types import PromptBatch


class PromptLoader:
    """Yields training prompts, epoch after epoch; the position survives a checkpoint.

    A pass (`for batch in loader`) is `len(loader)` batches from wherever the stream was left, so that the n-th batch of
    a run is the same however the run was interrupted. `draw` hands out extra prompts between batches; a pass is as long
    as without them, the stream just moves faster, and its epochs end earlier than the passes do.

    Every rank yields full batches, equally many, and no batch or draw holds a prompt twice: where an epoch has fewer
    prompts left than are asked for, they sit out and the next epoch begins. An epoch has the prompts of the schedule,
    a pass as many batches as the schedule's first epoch. A later epoch with too few prompts for a batch goes without
    pass rates, or visits all prompts.

    Args:
        prompts: all prompts of all ranks.
        batch_size: prompts per step over all ranks.
        seed: decides the order together with the epoch.
        shuffle: new order in each epoch of the stream; otherwise the order of the data.
        schedule: which prompts an epoch has, and their order, in place of `shuffle`.
        rank: this rank.
        world_size: number of ranks.

    Attributes:
        reads_pass_rates: whether `record_pass_rates` is waited for.

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
        schedule: PromptSchedule | None = None,
    ) -> None:
        check_batch_size(batch_size, world_size)
        if len(prompts) < batch_size:
            raise ValueError(
                f"{len(prompts)} prompts are fewer than one step of batch_size={batch_size}; add data or lower "
                "batch_size"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.world_size = world_size
        self._schedule = schedule or (Shuffled() if shuffle else InOrder())
        self._schedule.check(sorted(set(prompts.sources)))
        self._schedule_settings = identity_of(type(self._schedule), settings_of(self._schedule)).rpartition("#")[0]
        self.reads_pass_rates = self._schedule.reads_pass_rates
        self._scheduled = [
            ScheduledPrompt(uid, source, columns)
            for uid, source, columns in zip(prompts.uids, prompts.sources, prompts.columns, strict=True)
        ]
        shares = [rank_share(prompts.uids, number, world_size) for number in range(world_size)]
        self._owner = {prompts.uids[index]: number for number, share in enumerate(shares) for index in share}
        self._rank = rank
        self._prompts = take(prompts, shares[rank])
        self._place = {uid: index for index, uid in enumerate(self._prompts.uids)}
        self._fingerprint = xxhash.xxh3_64_hexdigest("/".join(sorted(prompts.uids)).encode())
        self._pass_rates: dict[str, tuple[float, int]] = {}  # of all ranks: rate and epoch of the last visit
        self._epoch_pass_rates: dict[str, tuple[float, int]] = {}  # when the epoch began
        self._epoch = 0
        self._shuffled_epoch: int | None = None  # of all prompts, for the schedule has too few
        self._num_drawn = 0  # prompts of this rank in this epoch, in batches and in draws
        self._orders: list[list[int]] = []  # of each rank, in the current epoch
        self._ordered_epoch: int | None = None  # epoch that `_orders` belongs to
        self.num_prompts = sum(map(len, self._current_orders()))
        self._per_epoch = self._num_of_rank
        if self._per_epoch < batch_size // world_size:
            raise ValueError(
                f"{self.num_prompts} prompts are fewer than one step of batch_size={batch_size}"
                + (" on each rank" if self.num_prompts >= batch_size else "")
                + "; add data or lower batch_size"
            )

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
        if not 1 <= num_prompts <= self._per_epoch:
            raise ValueError(
                f"num_prompts must be between 1 and {self._per_epoch}, the prompts of a rank in an epoch, got"
                f" {num_prompts}; draw fewer at a time or add data"
            )
        if self._num_drawn + num_prompts > self._num_of_rank:
            self._begin_epoch(num_prompts)
        start = self._num_drawn
        self._num_drawn += num_prompts
        return take(self._prompts, self._current_orders()[self._rank][start : self._num_drawn])

    def record_pass_rates(self, pass_rates: Mapping[str, float]) -> None:
        """Note how well prompts were answered, for the schedule's next epochs.

        Args:
            pass_rates: by uid, of all ranks and the same on every one.
        """
        self._pass_rates |= {uid: (rate, self._epoch) for uid, rate in pass_rates.items() if uid in self._owner}

    def _begin_epoch(self, num_prompts: int) -> None:
        """The next epoch; with more prompts where the schedule leaves too few for what is asked for."""
        self._epoch, self._num_drawn = self._epoch + 1, 0
        self._epoch_pass_rates = dict(self._pass_rates)
        left = self._num_of_rank
        if left >= num_prompts:
            return
        self._epoch_pass_rates, self._ordered_epoch = {}, None
        remedy = "pass rates do not count in it"
        if self._num_of_rank < num_prompts:
            self._shuffled_epoch, self._ordered_epoch = self._epoch, None
            remedy = "it visits all prompts, shuffled"
        rank_zero_warn(
            f"epoch {self._epoch}: {type(self._schedule).__name__} leaves {left} prompts for a rank, a step needs "
            f"{num_prompts}; {remedy}"
        )

    @property
    def _num_of_rank(self) -> int:
        """Prompts that each rank can draw in the current epoch: those of the rank that has the fewest."""
        return min(map(len, self._current_orders()))

    def _current_orders(self) -> list[list[int]]:
        """For each rank the places of its prompts, in the order of the current epoch, sorted once an epoch; of other
        ranks only the number counts."""
        if self._ordered_epoch != self._epoch:
            self._orders = [[] for _ in range(self.world_size)]
            schedule = Shuffled() if self._shuffled_epoch == self._epoch else self._schedule
            for prompt in schedule(self._known(), self._epoch, self.seed):
                self._orders[self._owner[prompt.uid]].append(self._place.get(prompt.uid, -1))
            self._ordered_epoch = self._epoch
        return self._orders

    def _known(self) -> list[ScheduledPrompt]:
        """All prompts, with the pass rates from before the epoch."""
        nothing = None, None
        rates = self._epoch_pass_rates
        if not rates:
            return self._scheduled
        return [
            replace(prompt, pass_rate=rate, last_epoch=epoch)
            for prompt in self._scheduled
            for rate, epoch in [rates.get(prompt.uid, nothing)]
        ]

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, in prompts of all ranks and the same on every rank, and what the order depends on."""
        return {
            "epoch": self._epoch,
            "num_drawn": self._num_drawn * self.world_size,
            "order": self._order_identity(),
            "pass_rates": dict(self._pass_rates),
            "epoch_pass_rates": dict(self._epoch_pass_rates),
            "shuffled_epoch": self._shuffled_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last prompt of the saved run; warns when batches differ from those of the saved settings.

        With another batch size the epoch continues at the very next prompt; only how many sit out at its end may
        change. With another number of ranks it continues after as many prompts over all ranks, rounded down to equally
        many on each. Since ranks then own other prompts, some of the epoch repeat and some are left out; so it is with
        another seed or other data. Where the epoch now has too few prompts to go on, the next one begins.
        """
        now = self._order_identity()
        before = dict(state_dict["order"])
        if before.get("schedule") == type(self._schedule).__name__:  # older ones have no settings
            del before["schedule"]
        changed = [f"{name} {old} -> {now[name]}" for name, old in before.items() if old != now[name]]
        if changed:
            rank_zero_warn(
                f"The order of prompts differs from that of the checkpoint ({', '.join(changed)}): the epoch continues"
                " after as many prompts, but some of its prompts may repeat and some may be left out."
            )
        self._pass_rates = dict(state_dict.get("pass_rates", {}))  # older ones have none
        self._epoch_pass_rates = dict(state_dict.get("epoch_pass_rates", {}))
        self._shuffled_epoch = state_dict.get("shuffled_epoch")
        self._ordered_epoch = None
        self._epoch, self._num_drawn = state_dict["epoch"], state_dict["num_drawn"] // self.world_size

    def _order_identity(self) -> dict[str, Any]:
        """All that the batches depend on, apart from the position."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "schedule": self._schedule_settings,
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
