"""The speculation length for every number of active requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_specrl.speculation.acceptance_rates import AcceptanceRates
from lit_specrl.speculation.latency_model import LatencyModel

_SOLVE_EVERY = 16  # steps of the engine
_FEW_DRAFTS = 200


def speed_gains(seconds: NDArray[np.float64], emitted_tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Emitted tokens per second over those without speculation, [batches, lengths]; the largest of a row is the best length.

    Args:
        seconds: [batches, lengths] of an engine step; lengths from 0, in order.
        emitted_tokens: [lengths] or [batches, lengths] expected tokens per request and step, 1 for length 0.

    Example: vLLM's published profile, milliseconds at K = 0, 1, 3 for one request and for 256:

        >>> speed_gains(np.array([[6.52, 7.37, 8.84], [14.49, 27.14, 41.85]]), np.array([1, 1.681, 2.276])).argmax(-1)
        array([2, 0])
    """
    gains: NDArray[np.float64] = emitted_tokens / seconds * seconds[:, :1]
    return gains


@dataclass(frozen=True)
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


class LengthSchedule:
    """Chooses the speculation length that emits the most tokens per second at each number of active requests.

    ReSpec's solver and scheduler (Chen et al. 2025, arXiv 2510.26475), departing from it in three ways: acceptance is learnt online, a length is
    only left for one that is better by a margin, and where speculation pays nowhere it is off but for occasional steps that watch
    whether the drafter has improved.

    Args:
        max_length: longest draft, in tokens.
        hysteresis: predicted gain, as a fraction, for which a length is left for another.
        probe_fraction: share of the decoding time that may be lost by trying a drafter that is off.

    Example::

        schedule = LengthSchedule(max_length=3)
        schedule.profile(steps)     # a few at some batch sizes and lengths
        schedule.length(8)          # 2
        schedule.observe(DecodeStep(num_active=8, length=2, seconds=0.03, num_tokens=15, drafted=[8, 8], accepted=[5, 2]))
    """

    def __init__(self, max_length: int, hysteresis: float = 0.03, probe_fraction: float = 0.015) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {max_length}")
        for name, value in {"hysteresis": hysteresis, "probe_fraction": probe_fraction}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        self.max_length, self.hysteresis, self.probe_fraction = max_length, hysteresis, probe_fraction
        self.latency, self.acceptance = LatencyModel(), AcceptanceRates(max_length)
        self.num_switches = 0
        """Batch sizes whose length has changed, over all solutions."""
        self._lengths: list[int] = []  # by batch size - 1
        self._num_unsolved = 0  # steps since the last solution
        self._decoding_s = self._lost_s = 0.0  # since speculation was last switched off

    def profile(self, steps: Sequence[DecodeStep]) -> None:
        """Learn step times, and nothing about acceptance, from steps that were made for that; then solve for batches up to their largest."""
        self.latency.observe((step.num_active, step.length, step.seconds) for step in steps if step.is_steady)
        if steps:
            self._solve(max(step.num_active for step in steps))

    def observe(self, step: DecodeStep) -> None:
        """Learn from a step of the engine; every so often choose anew."""
        if step.is_steady:
            self.latency.observe([(step.num_active, step.length, step.seconds)])
        if step.length:  # a row without a draft counts like one whose draft was rejected, unless there was none at all
            self.acceptance.observe([step.num_active] * step.length, step.accepted)
        if self.is_off and self._lengths:
            self._decoding_s += step.seconds
            if step.length:
                plain = self.latency.seconds(step.num_active, 0) * step.num_tokens / step.num_active
                self._lost_s += max(0.0, step.seconds - plain)
        self._num_unsolved += 1
        # a drafter that nothing is known about is soon found out
        if self._num_unsolved >= (_SOLVE_EVERY if self.acceptance.num_drafts > _FEW_DRAFTS else _SOLVE_EVERY // 4):
            self._solve(max(step.num_active, len(self._lengths)))

    def _solve(self, max_batch: int) -> None:
        self.latency.fit()
        gains = self.gains(range(1, max_batch + 1))  # [batches, lengths]
        present = np.array((self._lengths + self._lengths[-1:] * max_batch + [0] * max_batch)[:max_batch])
        best = gains.argmax(-1)
        at = np.arange(max_batch)
        moves = gains[at, best] > gains[at, present] * (1 + self.hysteresis)
        was_off = self.is_off
        self.num_switches += int(moves.sum()) if self._lengths else 0
        self._lengths = np.where(moves, best, present).tolist()
        self._num_unsolved = 0
        if self.is_off and not was_off:
            self._decoding_s = self._lost_s = 0.0

    def gains(self, batches: Sequence[int]) -> NDArray[np.float64]:
        """Predicted tokens per second over those without speculation, [batches, max_length + 1]."""
        lengths = range(self.max_length + 1)
        seconds = self.latency.table(list(batches), list(lengths))
        emitted = np.array([self.acceptance.emitted_tokens(length) for length in lengths])
        return speed_gains(seconds, emitted)

    def length(self, num_active: int) -> int:
        """What to draft in a step with so many requests."""
        if not self._lengths or num_active < 1:
            return 0
        if self.is_off:
            return int(self._may_probe(num_active))
        return self._lengths[min(num_active, len(self._lengths)) - 1]

    @property
    def is_off(self) -> bool:
        """Whether speculation pays at no batch size."""
        return not any(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """For 1, 2, ... requests, as solved last."""
        return list(self._lengths)

    def _may_probe(self, num_active: int) -> bool:
        """A step that drafts one token may cost what it adds to a step at most, with nothing accepted."""
        plain, probing = self.latency.table([num_active], [0, 1])[0]
        return self._lost_s + max(0.0, probing - plain) <= self.probe_fraction * self._decoding_s

    # ---------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        return {
            "latency": self.latency.state_dict(),
            "acceptance": self.acceptance.state_dict(),
            "lengths": self.lengths,
            "num_switches": self.num_switches,
            "num_unsolved": self._num_unsolved,
            "decoding_s": self._decoding_s,
            "lost_s": self._lost_s,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue; lengths beyond the present `max_length` are cut to it."""
        self.latency.load_state_dict(state_dict["latency"])
        self.acceptance.load_state_dict(state_dict["acceptance"])
        self._lengths = [min(length, self.max_length) for length in state_dict["lengths"]]
        self.num_switches, self._num_unsolved = state_dict["num_switches"], state_dict["num_unsolved"]
        self._decoding_s, self._lost_s = state_dict["decoding_s"], state_dict["lost_s"]
