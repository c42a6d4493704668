"""How many drafted tokens are accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BLOCK = 64  # drafts that are looked at together for a change
_PRIOR_ACCEPTANCE = (
    0.95  # conditional acceptance of drafts of which nothing is known: what is never tried is never learnt
)
_PRIOR_WEIGHT = 4.0  # real drafts that outweigh the hope


class AcceptanceRates:
    """Acceptance of drafted tokens by position, with more weight on recent drafts.

    Where the latest drafts fare quite differently from those before (another drafter, other text), only they count from
    then on.

    Position k (from 1) is accepted when the k first tokens of a draft all are. What is estimated is the chance of
    position k given that k - 1 was accepted, because a run with short drafts still informs the first
    positions. A position that was never drafted is expected to be accepted often: it is tried then, and a few drafts
    settle it.

    Args:
        max_length: longest draft.
        half_life: drafts after which an old one counts half.

    Example: of 100 drafts of two tokens the first was accepted 80 times, both 40 times:

        >>> rates = AcceptanceRates(max_length=3)
        >>> rates.observe(drafted=[100, 100], accepted=[80, 40])
        >>> rates.by_position.round(2)
        array([0.81, 0.42, 0.4 ])
        >>> round(rates.emitted_tokens(2), 2)  # accepted tokens, and the one that the target adds
        2.23
    """

    def __init__(self, max_length: int, half_life: float = 2000) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {max_length}")
        if not half_life > 0:
            raise ValueError(f"half_life must be positive, got {half_life}")
        self.max_length, self.half_life = max_length, half_life
        self._tried = np.zeros(max_length)  # drafts whose k - 1 first tokens were accepted and that had a k-th
        self._accepted = np.zeros(max_length)
        self._block = np.zeros((2, max_length))  # the same of the latest drafts, without decay

    def observe(self, drafted: Sequence[float], accepted: Sequence[float]) -> None:
        """Take drafts into account.

        Args:
            drafted: drafts that had a k-th token, by position.
            accepted: drafts of which it and all before it were accepted, by position.
        """
        if not drafted or not drafted[0]:
            return
        drafts, hits = np.zeros(self.max_length), np.zeros(self.max_length)
        drafts[: len(drafted)], hits[: len(accepted)] = drafted, accepted
        decay = 0.5 ** (drafts[0] / self.half_life)
        tried = np.minimum(drafts, np.concatenate([drafts[:1], hits[:-1]]))
        self._tried = self._tried * decay + tried
        self._accepted = self._accepted * decay + hits
        self._block += tried, hits
        if self._block[0, 0] >= _BLOCK:
            if self._has_changed():
                self._tried, self._accepted = self._block.copy()
            self._block[:] = 0

    def _has_changed(self) -> bool:
        """Whether the first token of the latest drafts was accepted far more or less often than before."""
        tried, accepted = self._tried[0] - self._block[0, 0], self._accepted[0] - self._block[1, 0]
        if tried < _BLOCK / 2:
            return False
        before, now = accepted / tried, self._block[1, 0] / self._block[0, 0]
        mean = (before + now) / 2
        deviation = np.sqrt(mean * (1 - mean) * (1 / tried + 1 / self._block[0, 0]))
        return bool(abs(now - before) > max(0.1, 4 * deviation))

    @property
    def num_drafts(self) -> float:
        """Drafts that the estimate rests on; old ones count less."""
        return float(self._tried[0])

    @property
    def conditional(self) -> NDArray[np.float64]:
        """Chance that the k-th token of a draft is accepted where all before it are, [max_length]."""
        found: NDArray[np.float64] = (self._accepted + _PRIOR_WEIGHT * _PRIOR_ACCEPTANCE) / (
            self._tried + _PRIOR_WEIGHT
        )
        return found

    @property
    def by_position(self) -> NDArray[np.float64]:
        """Chance that the k first tokens of a draft are accepted, [max_length]."""
        return np.cumprod(self.conditional, dtype=np.float64)

    def emitted_tokens(self, length: int) -> float:
        """Expected tokens per request and step with drafts of this length; 1 without."""
        return 1.0 + float(self.by_position[:length].sum())

    def state_dict(self) -> dict[str, list[float]]:
        return {
            "tried": self._tried.tolist(),
            "accepted": self._accepted.tolist(),
            "block_tried": self._block[0].tolist(),
            "block_accepted": self._block[1].tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        """Continue; positions beyond the present `max_length` are dropped."""
        arrays = {
            "tried": self._tried,
            "accepted": self._accepted,
            "block_tried": self._block[0],
            "block_accepted": self._block[1],
        }
        for name, values in arrays.items():
            saved = state_dict[name][: self.max_length]
            values[:] = 0
            values[: len(saved)] = saved
