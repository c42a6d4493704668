"""Drafts of the rows of a step that were looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SOURCES = ("other", "past", "sibling", "prompt", "own")
"""Where a draft was read: somewhere that its drafter does not tell, an earlier response to the prompt, a response of
the same rollout to the prompt, the prompt, what the row has said itself."""
OTHER, PAST, SIBLING, PROMPT, OWN = range(len(SOURCES))


class Drafts(NamedTuple):
    """What may follow in each of n rows.

    Example: a draft of two tokens, read behind five tokens that agree, and a row without one::

        Drafts(np.array([[7, 8], [0, 0]]), np.array([2, 0]), np.array([SIBLING, OTHER]), np.array([2.77, 0.0]),
               np.array([40.0, np.nan]))
    """

    token_ids: NDArray[Any]
    """[n, K]; those beyond the length of a draft mean nothing."""
    lengths: NDArray[Any]
    """[n] tokens of each draft, 0 to K."""
    sources: NDArray[Any]
    """[n] indices of `SOURCES`."""
    agreement: NDArray[np.float64]
    """[n] how far the words before the draft agree with those before the place where it was read: 1 for the last token
    and 0.7 times as much for each one further back; see `AGREEMENT_DECAY`."""
    remaining: NDArray[np.float64]
    """[n] tokens that each row will probably still need; NaN where nothing tells."""

    def cut(self, lengths: NDArray[Any]) -> Drafts:
        """With at most so many tokens [n] each."""
        return self._replace(lengths=np.minimum(self.lengths, lengths))

    def rows(self, at: NDArray[Any] | slice) -> Drafts:
        """Of some rows."""
        return Drafts(*(values[at] for values in self))

    def as_lists(self) -> list[list[int]]:
        """[n] ragged."""
        rows: list[list[int]] = self.token_ids.tolist()
        return [row[:length] for row, length in zip(rows, self.lengths.tolist(), strict=True)]


AGREEMENT_DECAY = 0.7


def from_lists(drafted: Sequence[Sequence[int]]) -> Drafts:
    """Drafts of which nothing else is known."""
    lengths = np.array([len(tokens) for tokens in drafted], dtype=np.int64)
    token_ids = np.zeros((len(drafted), max([0, *lengths.tolist()])), dtype=np.int64)
    for row, tokens in enumerate(drafted):
        token_ids[row, : len(tokens)] = tokens
    nothing = np.zeros(len(drafted))
    return Drafts(token_ids, lengths, np.full(len(drafted), OTHER), nothing, nothing * np.nan)
