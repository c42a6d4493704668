"""How likely the tokens of a draft are to be accepted, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_specrl.drafting.drafts import AGREEMENT_DECAY, SOURCES, Drafts

_EDGES = np.array([0.5, 1.2, 1.85, 2.1, 2.4, 2.7, 3.0])  # of agreement, which 16 equal tokens bring to 3.32
_PRIOR_CHANCE, _PRIOR_WEIGHT = 0.8, 4.0  # hope for what was never tried: it is tried then
_GROUP_WEIGHT, _ROW_WEIGHT = 8.0, 4.0  # tokens that outweigh what the next wider circle says
_FACTORS = 0.1, 1.25  # a row's acceptance over that of all drafts alike stays between
_HIGHEST = 0.99


class DraftChances:
    """Chance of each drafted token to be accepted where those before it are, learnt from what was accepted.

    By where the draft was read, and how far the words before it agree; a token behind k accepted ones is one behind k
    more that agree. A row whose drafts are accepted more or less often than those like them has its own factor, which
    begins with the group's, as that of the group begins with 1. What was known is forgotten with a half-life, so that
    what has not paid for long is tried again.

    DAS (arXiv 2511.13841) and DSpark (DeepSeek 2026) give rows lengths of their own, too, by classes of length and by
    a head's confidence; a drafter that looks tokens up has its match instead.

    Args:
        half_life: drafted tokens after which an old one counts half.

    Example: of 100 drafts of one token, read behind much that agrees, 90 were accepted:

        >>> from lit_specrl.drafting.drafts import from_lists
        >>> draft = from_lists([[7]] * 100)
        >>> chances = DraftChances()
        >>> chances.start(groups=np.zeros(100, dtype=int))
        >>> chances.observe(np.arange(100), draft, accepted=np.array([1] * 90 + [0] * 10))
        >>> chances.start(groups=np.zeros(1, dtype=int))  # another rollout
        >>> chances.by_position(np.arange(1), draft.rows(slice(1)), 1).round(1)
        array([[0.9]])
    """

    def __init__(self, half_life: float = 4000) -> None:
        if not half_life > 0:
            raise ValueError(f"half_life must be positive, got {half_life}")
        self.half_life = half_life
        self._tried = np.zeros((len(SOURCES), len(_EDGES) + 1))
        self._accepted = np.zeros((len(SOURCES), len(_EDGES) + 1))
        self.start(np.zeros(1, dtype=np.int64))

    def start(self, groups: NDArray[Any]) -> None:
        """A rollout begins; the rows [N] belong to these groups."""
        self._groups = groups
        self._row_emitted, self._row_steps = np.zeros(len(groups)), np.zeros(len(groups))
        self._row_accepted, self._row_expected = np.zeros(len(groups)), np.zeros(len(groups))
        self._group_accepted, self._group_expected = np.zeros(groups.max() + 1), np.zeros(groups.max() + 1)

    def observe(self, rows: NDArray[Any], drafts: Drafts, accepted: NDArray[Any]) -> None:
        """Learn from verified drafts.

        Args:
            rows: [n] rows of the rollout.
            drafts: of these rows.
            accepted: [n] tokens of each that were accepted.
        """
        self._row_emitted[rows] += accepted + 1
        self._row_steps[rows] += 1
        longest = int(drafts.lengths.max(initial=0))
        if not longest:
            return
        kinds, positions = self._kinds(drafts, longest), np.arange(longest)
        tried = positions <= np.minimum(accepted, drafts.lengths - 1)[:, None]  # [n, longest]
        hits = positions < accepted[:, None]
        expected = (self._rates()[kinds] * tried).sum(-1)
        for sums, values in ((self._row_accepted, accepted), (self._row_expected, expected)):
            np.add.at(sums, rows, values)
        for sums, values in ((self._group_accepted, accepted), (self._group_expected, expected)):
            np.add.at(sums, self._groups[rows], values)
        decay = 0.5 ** (float(tried.sum()) / self.half_life)
        for table, values in ((self._tried, tried), (self._accepted, hits)):
            table *= decay
            np.add.at(table, kinds, values)

    def by_position(self, rows: NDArray[Any], drafts: Drafts, longest: int) -> NDArray[np.float64]:
        """Chance that the k first tokens of each draft are accepted, [n, longest]; 0 beyond its end.

        Args:
            rows: [n] rows of the rollout.
            drafts: of these rows.
            longest: positions.
        """
        groups = self._groups[rows]
        ratio = self._group_accepted[groups] + _GROUP_WEIGHT, self._group_expected[groups] + _GROUP_WEIGHT
        prior = _ROW_WEIGHT * ratio[0] / ratio[1]
        factors = (self._row_accepted[rows] + prior) / (self._row_expected[rows] + _ROW_WEIGHT)
        factors = factors.clip(*_FACTORS)
        conditional = np.minimum(self._rates()[self._kinds(drafts, longest)] * factors[:, None], _HIGHEST)
        chances: NDArray[np.float64] = conditional.cumprod(-1)
        return chances * (np.arange(longest) < drafts.lengths[:, None])

    def remaining_steps(self, rows: NDArray[Any], drafts: Drafts) -> NDArray[np.float64]:
        """Steps [n] that the rows will probably still need, at the pace that they have had; NaN where nothing tells."""
        pace = (self._row_emitted[rows] + _ROW_WEIGHT) / (self._row_steps[rows] + _ROW_WEIGHT)
        steps: NDArray[np.float64] = drafts.remaining / pace
        return steps

    def state_dict(self) -> dict[str, list[list[float]]]:
        """What is known of drafts; nothing of the rows of the present rollout."""
        return {"tried": self._tried.tolist(), "accepted": self._accepted.tolist()}

    def load_state_dict(self, state_dict: dict[str, list[list[float]]]) -> None:
        """Go on with what was known; tables of another version's kinds of drafts are left out."""
        tried, accepted = (np.array(state_dict[name]) for name in ("tried", "accepted"))
        if tried.shape == self._tried.shape:
            self._tried, self._accepted = tried, accepted

    def _rates(self) -> NDArray[np.float64]:
        rates: NDArray[np.float64] = (self._accepted + _PRIOR_CHANCE * _PRIOR_WEIGHT) / (self._tried + _PRIOR_WEIGHT)
        return rates

    @staticmethod
    def _kinds(drafts: Drafts, longest: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Where each token is counted: source [n, 1] and class of agreement [n, longest]."""
        decay = AGREEMENT_DECAY ** np.arange(longest)
        agreement = drafts.agreement[:, None] * decay + (1 - decay) / (1 - AGREEMENT_DECAY)
        return drafts.sources[:, None], np.searchsorted(_EDGES, agreement)
