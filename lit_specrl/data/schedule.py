"""Which prompts an epoch visits, in which order: shuffled, mixed by weight, easy ones first, without solved ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_specrl.data.order import epoch_order


@dataclass(frozen=True)
class ScheduledPrompt:
    """What a schedule knows of a prompt."""

    uid: str
    source: str
    columns: Mapping[str, Any]
    """Further columns of its row."""
    pass_rate: float | None = None
    """Mean of the first reward over the prompt's rows at its last visit; `None` before the first, or where the reward
    does not apply."""
    last_epoch: int | None = None
    """Epoch of that visit."""


class PromptSchedule(ABC):
    """Chooses the prompts of an epoch and their order.

    A schedule of one's own needs `__call__` alone. In YAML it stands at `PromptDataModule(schedule=...)`, by
    `class_path`. All ranks ask with the same arguments, and each goes through its own prompts in this order. A schedule
    must not change what it knows by itself: it is asked again when a run is resumed.

    Example: short questions alone, in the order of the data.

        >>> class Short(PromptSchedule):
        ...     def __call__(self, prompts, epoch, seed):
        ...         return [prompt for prompt in prompts if prompt.columns["length"] < 100]
        >>> prompts = [ScheduledPrompt("a", "demo", {"length": 120}), ScheduledPrompt("b", "demo", {"length": 80})]
        >>> [prompt.uid for prompt in Short()(prompts, epoch=0, seed=0)]
        ['b']
    """

    reads_pass_rates: bool = False
    """Whether the run must note `ScheduledPrompt.pass_rate`."""

    def check(self, sources: Sequence[str]) -> None:
        """Asked once, before the first epoch: whether the data has what the schedule names.

        Args:
            sources: names of the data sources of all prompts.

        Raises:
            ValueError: it has not.
        """

    @abstractmethod
    def __call__(self, prompts: Sequence[ScheduledPrompt], epoch: int, seed: int) -> list[ScheduledPrompt]:
        """The prompts of an epoch.

        Args:
            prompts: of all ranks, in the order of the data.
            epoch: number of the epoch, from 0.
            seed: seed of the data.

        Returns:
            Those that the epoch visits, each once, in their order.

        Raises:
            ValueError: the prompts have not what the schedule needs.
        """


class InOrder(PromptSchedule):
    """All prompts in the order of the data."""

    def __call__(self, prompts: Sequence[ScheduledPrompt], epoch: int, seed: int) -> list[ScheduledPrompt]:
        return list(prompts)


class Shuffled(PromptSchedule):
    """All prompts, in a new order in each epoch."""

    def __call__(self, prompts: Sequence[ScheduledPrompt], epoch: int, seed: int) -> list[ScheduledPrompt]:
        return [prompts[index] for index in epoch_order([prompt.uid for prompt in prompts], seed, epoch)]


class Mixture(PromptSchedule):
    """Sources in fixed shares, spread evenly over an epoch.

    An epoch is as long as it can be without a prompt that comes twice. The source that is shortest for its weight is
    seen whole. Of the others each epoch takes the next part. (`interleave_datasets` of Hugging Face's datasets calls
    this `first_exhausted`, and draws the sources at random.)

    A source of which another schedule has left out all prompts, such as `SkipSolved`, is left out of the epoch.

    Args:
        weights: share of each source by its name; they need not sum to 1.
        shuffle: take a source's prompts in a new order each time that it is gone through, or in the order of the data;
            by the name of the source where sources differ, True for those that are not named.

    Raises:
        ValueError: a weight is not positive; before the first epoch, where the names are not those of the data.

    Example: two prompts of `hard` for each of `easy`::

        PromptDataModule({"easy": "easy.jsonl", "hard": "hard.jsonl"}, schedule=Mixture({"easy": 1, "hard": 2}))
    """

    def __init__(self, weights: dict[str, float], shuffle: bool | dict[str, bool] = True) -> None:
        if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
            raise ValueError(
                f"weights must be positive numbers by the name of a source, got {weights}; leave a source out of the "
                "data to train without it"
            )
        self.weights, self.shuffle = weights, shuffle
        if isinstance(shuffle, dict) and (unknown := sorted(set(shuffle) - set(weights))):
            raise ValueError(f"shuffle names sources without a weight: {unknown}; sources: {sorted(weights)}")

    def __call__(self, prompts: Sequence[ScheduledPrompt], epoch: int, seed: int) -> list[ScheduledPrompt]:
        members = self._members(prompts)
        if not members:
            return []
        length = min(len(found) / self.weights[name] for name, found in members.items())  # of an epoch, by weight
        placed = [
            ((place + 0.5) / len(part), prompt)
            for name, found in members.items()
            for part in [self._part(name, found, max(1, int(self.weights[name] * length + 1e-9)), epoch, seed)]
            for place, prompt in enumerate(part)
        ]
        return [prompt for _, prompt in sorted(placed, key=lambda pair: pair[0])]

    def _members(self, prompts: Sequence[ScheduledPrompt]) -> dict[str, list[ScheduledPrompt]]:
        members: dict[str, list[ScheduledPrompt]] = {}
        for prompt in prompts:
            members.setdefault(prompt.source, []).append(prompt)
        if unknown := sorted(set(members) - set(self.weights)):
            raise ValueError(f"no weight for the sources {unknown}; give one to each of {sorted(members)}")
        return members

    def check(self, sources: Sequence[str]) -> None:
        if without := sorted(set(self.weights) - set(sources)):
            raise ValueError(f"no prompts of the sources {without}, which have weights; sources: {sorted(sources)}")

    def _part(self, name: str, found: list[ScheduledPrompt], size: int, epoch: int, seed: int) -> list[ScheduledPrompt]:
        """The next `size` prompts of a source, without repetition."""
        shuffled = self.shuffle if isinstance(self.shuffle, bool) else self.shuffle.get(name, True)
        order: PromptSchedule = Shuffled() if shuffled else InOrder()
        cycle, start = divmod(epoch * size, len(found))
        part = order(found, cycle, seed)[start : start + size]
        taken = {prompt.uid for prompt in part}
        rest = order(found, cycle + 1, seed) if len(part) < size else []
        return part + [prompt for prompt in rest if prompt.uid not in taken][: size - len(part)]


class Curriculum(PromptSchedule):
    """Easy prompts before hard ones.

    Args:
        column: column that says how hard a prompt is, larger for harder ones: numbers, also as the texts of a CSV file,
            or texts that sort, such as "Level 3". `None` goes by the pass rate that the policy had at the last visit,
            higher for easier ones. A prompt that was not visited yet counts as one half.
        descending: hard prompts first.
        num_epochs: epochs in this order; `None` for all.
        rest: order of the epochs after them, and of prompts that are equally hard; `Shuffled()` by default.

    Raises:
        ValueError: `num_epochs` is below 1; from a call, where a prompt has no such column, or values do not compare.

    Example: one epoch by the level, then shuffled::

        PromptDataModule("math.jsonl", schedule=Curriculum("level", num_epochs=1))
    """

    def __init__(
        self,
        column: str | None = None,
        descending: bool = False,
        num_epochs: int | None = None,
        rest: PromptSchedule | None = None,
    ) -> None:
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1, got {num_epochs}; leave the schedule out for a shuffle")
        self.column, self.descending, self.num_epochs = column, descending, num_epochs
        self.rest = rest or Shuffled()
        self.reads_pass_rates = column is None or self.rest.reads_pass_rates

    def check(self, sources: Sequence[str]) -> None:
        self.rest.check(sources)

    def __call__(self, prompts: Sequence[ScheduledPrompt], epoch: int, seed: int) -> list[ScheduledPrompt]:
        found = self.rest(prompts, epoch, seed)
        if self.num_epochs is not None and epoch >= self.num_epochs:
            return found
        hardness = self._hardness(found)
        try:
            return sorted(found, key=lambda prompt: hardness[prompt.uid], reverse=self.descending)
        except TypeError as error:
            kinds = sorted({type(value).__name__ for value in hardness.values()})
            raise ValueError(
                f"column {self.column!r} holds values that do not compare ({', '.join(kinds)}); Curriculum needs "
                "numbers or texts"
            ) from error

    def _hardness(self, prompts: Sequence[ScheduledPrompt]) -> dict[str, Any]:
        """By uid."""
        if self.column is None:
            return {prompt.uid: -(0.5 if prompt.pass_rate is None else prompt.pass_rate) for prompt in prompts}
        values = _numbers({prompt.uid: prompt.columns.get(self.column) for prompt in prompts})
        for prompt in prompts:
            value = values[prompt.uid]
            if value is None or value != value:  # NaN
                raise ValueError(
                    f"a prompt of {prompt.source!r} has no value in the column {self.column!r}, which Curriculum sorts "
                    f"by; columns: {', '.join(prompt.columns) or 'none'}"
                )
        return values


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Texts as the numbers that they all are, such as cells of a CSV file; anything else as it is."""
    if not all(isinstance(value, str) for value in values.values()):
        return values
    try:
        return {uid: float(value) for uid, value in values.items()}
    except ValueError:
        return values


class SkipSolved(PromptSchedule):
    """Leave out prompts that were always right, or always wrong, and come back to them later.

    Their groups have no spread, and teach nothing (GRESO, Zheng et al. 2025, arXiv 2506.02177, leaves them out with a
    probability; DAPO draws others in their place). A pass of the trainer has as many steps as before; the stream of
    prompts moves faster.

    Args:
        low: pass rates up to this one count as always wrong; negative to keep these prompts.
        high: pass rates from this one on count as always right; above 1 to keep these prompts.
        num_epochs: epochs that they sit out.
        rest: order of the others; `Shuffled()` by default.

    Raises:
        ValueError: `low` is not below `high`, or `num_epochs` is below 1.

    Example: back to solved prompts in every fourth epoch, never away from the failed ones::

        PromptDataModule("train.jsonl", schedule=SkipSolved(low=-1, num_epochs=3))
    """

    reads_pass_rates = True

    def __init__(
        self, low: float = 0.0, high: float = 1.0, num_epochs: int = 2, rest: PromptSchedule | None = None
    ) -> None:
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        if num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1, got {num_epochs}; leave the schedule out to skip nothing")
        self.low, self.high, self.num_epochs, self.rest = low, high, num_epochs, rest or Shuffled()

    def check(self, sources: Sequence[str]) -> None:
        self.rest.check(sources)

    def __call__(self, prompts: Sequence[ScheduledPrompt], epoch: int, seed: int) -> list[ScheduledPrompt]:
        return self.rest([prompt for prompt in prompts if not self._sits_out(prompt, epoch)], epoch, seed)

    def _sits_out(self, prompt: ScheduledPrompt, epoch: int) -> bool:
        if prompt.pass_rate is None or prompt.last_epoch is None or self.low < prompt.pass_rate < self.high:
            return False
        return epoch - prompt.last_epoch <= self.num_epochs
