"""The speculation length for every number of active requests, or for every row."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_specrl.drafting.scheduler.acceptance_rates import AcceptanceRates
from lit_specrl.drafting.scheduler.latency_model import LatencyModel
from lit_specrl.drafting.scheduler.row_lengths import row_lengths, row_weights
from lit_specrl.drafting.scheduler.step_cost import StepCost

_SOLVE_EVERY = 16  # steps of the engine
_FEW_DRAFTS = 200
_IDLE = 64  # steps without a draft after which speculation counts as off
_FIRST_AGES = 32  # tokens; then 32 to 63, 64 to 127, and so on


def speed_gains(seconds: NDArray[np.float64], emitted_tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Emitted tokens per second over those without speculation, [batches, lengths]; the best length is the largest.

    Args:
        seconds: [batches, lengths] of an engine step; lengths from 0, in order.
        emitted_tokens: [lengths] or [batches, lengths] expected tokens per request and step, 1 for length 0.

    Example: vLLM's published profile, milliseconds at K = 0, 1, 3 for one request and for 256:

        >>> speed_gains(np.array([[6.52, 7.37, 8.84], [14.49, 27.14, 41.85]]), np.array([1, 1.681, 2.276])).argmax(-1)
        array([2, 0])
    """
    gains: NDArray[np.float64] = emitted_tokens / seconds * seconds[:, :1]
    return gains


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """One step of the engine in which all requests decoded and none was prefilled."""

    num_active: int
    """Requests that took part."""
    length: int
    """Speculation length of the step."""
    seconds: float
    num_tokens: int
    """Tokens emitted."""
    drafted: list[int] = field(default_factory=list)
    """Requests that had a k-th drafted token, by position."""
    accepted: list[int] = field(default_factory=list)
    """Requests of which the k-th and all before it were accepted, by position."""
    is_steady: bool = True
    """Whether the step also drafted as many tokens as it verified, so that its time belongs to that length."""
    age: float = 0.0
    """Tokens that the requests had generated before the step, on average."""
    by_source: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tokens that were drafted, and accepted, by where they were read (`SOURCES`), of drafters that look tokens up."""
    catch_up_s: float = 0.0
    """Time before the step in which the drafter read tokens that were generated without it."""

    @property
    def num_drafted(self) -> int:
        """Drafted tokens that were verified, over all requests."""
        return sum(self.drafted)


@dataclass
class _AgeGroup:
    """Steps whose requests have generated similarly many tokens."""

    acceptance: AcceptanceRates
    lengths: list[int] = field(default_factory=list)
    """Solved, by batch size - 1."""
    decoding_s: float = 0.0
    """In steps where nothing pays."""
    lost_s: float = 0.0
    """By drafting all the same, to watch."""

    def solved(self, num_active: int) -> int:
        return self.lengths[min(num_active, len(self.lengths)) - 1]


class LengthSchedule:
    """Chooses the speculation length that emits the most tokens per second at each number of active requests.

    ReSpec's solver and scheduler (Chen et al. 2025, arXiv 2510.26475), departing from it in four ways: acceptance is
    learnt online, and apart for early and late parts of responses (drafts by look-up are accepted less and less); a
    length is only left for one that is better by a margin; and where speculation pays nowhere it is off but for
    occasional steps that watch whether the drafter has improved.

    Args:
        max_length: longest draft, in tokens.
        hysteresis: predicted gain, as a fraction, for which a length is left for another.
        probe_fraction: share of the decoding time that may be lost by trying a drafter that is off.
        per_row: give each row the length that pays, where the drafter tells what each draft is worth.

    Example::

        schedule = LengthSchedule(max_length=3)
        schedule.profile(steps)     # a few at some batch sizes and lengths
        schedule.length(8, age=20)  # 2
        counts = {"num_tokens": 15, "drafted": [8, 8], "accepted": [5, 2]}
        schedule.observe(DecodeStep(num_active=8, length=2, seconds=0.03, age=20, **counts))
    """

    def __init__(
        self, max_length: int, hysteresis: float = 0.03, probe_fraction: float = 0.01, per_row: bool = False
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {max_length}")
        for name, value in {"hysteresis": hysteresis, "probe_fraction": probe_fraction}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        self.max_length, self.hysteresis, self.probe_fraction = max_length, hysteresis, probe_fraction
        self.per_row = per_row
        self.latency = LatencyModel()
        self.cost = StepCost()
        """Of steps whose rows draft different lengths."""
        self._latest_drafted: deque[tuple[bool, int]] = deque(maxlen=_IDLE)  # by step: was anything found, tokens
        self._has_found = False  # for the next step
        self.num_switches = 0
        """Batch sizes whose length has changed, over all solutions and ages."""
        self._groups = [_AgeGroup(AcceptanceRates(max_length))]
        self._num_unsolved = 0  # steps since the last solution

    def profile(self, steps: Sequence[DecodeStep]) -> None:
        """Learn step times alone from steps that were made for that; then solve for batches up to their largest."""
        self.latency.observe((step.num_active, step.length, step.seconds) for step in steps if step.is_steady)
        for step in steps:
            self.cost.observe(step.num_active, step.num_drafted, step.seconds)
        if steps:
            self._solve(max(step.num_active for step in steps))

    def observe(self, step: DecodeStep) -> None:
        """Learn from a step of the engine; every so often choose anew."""
        self.cost.observe(step.num_active, step.num_drafted, step.seconds)
        self._latest_drafted.append((self._has_found, step.num_drafted))
        if step.is_steady:
            self.latency.observe([(step.num_active, step.length, step.seconds)])
        group = self._group_to_learn(step.age)
        if step.length:  # a row without a draft counts like one whose draft was rejected, unless there was none at all
            group.acceptance.observe([step.num_active] * step.length, step.accepted)
        if group.lengths and not group.solved(step.num_active):
            # as predicted: a step that was disturbed would forbid to look for a long time
            plain, drafting = self.latency.table([step.num_active], [0, step.length])[0].tolist()
            group.decoding_s += plain
            if step.length:
                group.lost_s += step.catch_up_s + max(0.0, drafting - plain * step.num_tokens / step.num_active)
        self._num_unsolved += 1
        # a drafter that little is known about is soon found out
        is_news = step.length and group.acceptance.num_drafts <= _FEW_DRAFTS
        if self._num_unsolved >= (_SOLVE_EVERY // 4 if is_news else _SOLVE_EVERY):
            self._solve(max(step.num_active, len(self._groups[0].lengths)))

    def _group_to_learn(self, age: float) -> _AgeGroup:
        """That of an age; the first time as its younger neighbour is."""
        for _ in range(len(self._groups), _age_group(age) + 1):
            self._groups.append(_AgeGroup(AcceptanceRates(self.max_length), list(self._groups[-1].lengths)))
        return self._groups[_age_group(age)]

    def _solve(self, max_batch: int) -> None:
        self.latency.fit()
        self.cost.fit()
        seconds = self._seconds(range(1, max_batch + 1))  # [batches, lengths]
        at = np.arange(max_batch)
        for group in self._groups:
            gains = speed_gains(seconds, self._emitted_tokens(group))
            present = np.array((group.lengths + group.lengths[-1:] * max_batch + [0] * max_batch)[:max_batch])
            best = gains.argmax(-1)
            pays = gains[at, best] > gains[at, present] * (1 + self.hysteresis)
            moves = pays | (gains[at, present] < 1)  # nothing keeps it from being switched off
            self.num_switches += int(moves.sum()) if group.lengths else 0
            group.lengths = np.where(moves, best, present).tolist()
        self._num_unsolved = 0

    def gains(self, batches: Sequence[int], age: float = 0.0) -> NDArray[np.float64]:
        """Predicted tokens per second over those without speculation, [batches, max_length + 1]."""
        return speed_gains(self._seconds(batches), self._emitted_tokens(self._group(age)))

    def _seconds(self, batches: Sequence[int]) -> NDArray[np.float64]:
        return self.latency.table(list(batches), list(range(self.max_length + 1)))

    def _emitted_tokens(self, group: _AgeGroup) -> NDArray[np.float64]:
        return np.array([group.acceptance.emitted_tokens(length) for length in range(self.max_length + 1)])

    def length(self, num_active: int, age: float = 0.0) -> int:
        """What to draft in a step with so many requests, which have generated `age` tokens on average."""
        if self._solves_rows:
            return self.max_length
        group = self._group(age)
        if not group.lengths or num_active < 1:
            return 0
        return group.solved(num_active) or int(self._may_probe(group, num_active))

    @property
    def _solves_rows(self) -> bool:
        return self.per_row and self.cost.is_known

    def row_lengths(self, chances: NDArray[np.float64], remaining: NDArray[np.float64]) -> NDArray[np.int64] | None:
        """What to draft in each row of the next step, or `None` where all rows get the same.

        Args:
            chances: [N, K] that the k first tokens of each draft are accepted; 0 where there is none.
            remaining: [N] steps that each row will probably still need; NaN where nothing is known.
        """
        self._has_found = bool(chances.any())
        if not self._solves_rows or not chances.size:
            return None
        seconds = self.cost.curve(len(chances), chances.size)
        fixed_fraction = min(1.0, self.cost.seconds(1, 0) / seconds[0])
        return row_lengths(chances, row_weights(remaining, float(fixed_fraction)), seconds, self.hysteresis)

    def predict(self, step: DecodeStep) -> tuple[float, float]:
        """Seconds that a step should have taken, and one of as many requests without drafts."""
        if self._solves_rows:
            return self.cost.seconds(step.num_active, step.num_drafted), self.cost.seconds(step.num_active, 0)
        plain, predicted = self.latency.table([step.num_active], [0, step.length])[0].tolist()
        return predicted, plain

    def _group(self, age: float) -> _AgeGroup:
        """That of an age, or the oldest that is known."""
        return self._groups[min(_age_group(age), len(self._groups) - 1)]

    @property
    def is_off(self) -> bool:
        """Whether speculation pays at no batch size and age; not so where there was nothing to draft."""
        if self._solves_rows:
            found, drafted = zip(*self._latest_drafted, strict=True) if self._latest_drafted else ((), ())
            return len(found) == _IDLE and any(found) and not any(drafted)
        return not any(any(group.lengths) for group in self._groups)

    def acceptance(self, age: float = 0.0) -> AcceptanceRates:
        """What is known of drafts for requests that have generated `age` tokens."""
        return self._group(age).acceptance

    def _may_probe(self, group: _AgeGroup, num_active: int) -> bool:
        """A step that drafts one token may cost what it adds to a step at most, with nothing accepted."""
        plain, probing = self.latency.table([num_active], [0, 1])[0]
        return group.lost_s + max(0.0, probing - plain) <= self.probe_fraction * group.decoding_s

    # ---------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        return {
            "latency": self.latency.state_dict(),
            "cost": self.cost.state_dict(),
            "ages": [
                {
                    "acceptance": group.acceptance.state_dict(),
                    "lengths": list(group.lengths),
                    "decoding_s": group.decoding_s,
                    "lost_s": group.lost_s,
                }
                for group in self._groups
            ],
            "num_switches": self.num_switches,
            "num_unsolved": self._num_unsolved,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue; lengths beyond the present `max_length` are cut to it."""
        self.latency.load_state_dict(state_dict["latency"])
        if "cost" in state_dict:  # of 0.1 it is not
            self.cost.load_state_dict(state_dict["cost"])
        self._groups = []
        for saved in state_dict["ages"]:
            rates = AcceptanceRates(self.max_length)
            rates.load_state_dict(saved["acceptance"])
            lengths = [min(length, self.max_length) for length in saved["lengths"]]
            self._groups.append(_AgeGroup(rates, lengths, saved["decoding_s"], saved["lost_s"]))
        self.num_switches, self._num_unsolved = state_dict["num_switches"], state_dict["num_unsolved"]


def _age_group(age: float) -> int:
    """0 below 32 tokens, 1 below 64, 2 below 128, ..."""
    return int(age // _FIRST_AGES).bit_length()
