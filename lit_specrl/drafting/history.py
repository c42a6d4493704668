"""What followed the same words in earlier responses to the same prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Cursor = tuple[int, int]
"""A text of a history, and how many of its tokens were read."""

_MATCHED = 2  # tokens that must agree before a text is followed
_COMPARED = 16  # tokens before a cursor that decide between several
_WEIGHTS = 0.7 ** np.arange(_COMPARED)  # of these, the last first
_GAP = np.full(_COMPARED, -1)  # stands before and behind a text; agrees with nothing


class TextHistory:
    """The earlier responses to a prompt, searched for continuations.

    Args:
        texts: token ids of each response, as lists or arrays.

    Example:
        >>> history = TextHistory([[5, 6, 7, 8], [9, 6, 4, 3]])
        >>> reader = HistoryReader(history, own_text=0)
        >>> reader.propose([], 2)          # at the start, the row's own last response
        [5, 6]
        >>> reader.propose([9, 6], 2)      # the response has followed the other text
        [4, 3]
    """

    def __init__(self, texts: Sequence[Sequence[int] | NDArray[Any]]) -> None:
        arrays = [np.asarray(text, dtype=np.int64) for text in texts]
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        self._starts = (
            lengths.cumsum() - lengths + _COMPARED * np.arange(1, len(arrays) + 1)
        )  # [texts] among the tokens
        self._tokens = np.concatenate([_GAP, *(part for array in arrays for part in (array, _GAP))])
        self.texts = [
            self._tokens[start : start + len(array)] for start, array in zip(self._starts, arrays, strict=True)
        ]
        """Token ids of each response, as arrays."""
        ends = [np.arange(start + _MATCHED, start + n) for start, n in zip(self._starts, lengths, strict=True)]
        all_ends = np.concatenate([np.empty(0, np.int64), *ends])  # cursors behind two tokens, as indices of the tokens
        pairs = _pairs(self._tokens[all_ends - 2], self._tokens[all_ends - 1])
        order = pairs.argsort(kind="stable")
        self._pairs, self._ends = pairs[order], all_ends[order]

    def find(self, response: Sequence[int], own_text: int | None, guesses: Iterable[Cursor] = ()) -> Cursor | None:
        """Where to go on reading: the cursor before which a text agrees best with the response's end, or `None`.

        Candidates are the cursors behind the response's last two tokens, and the guesses. Each of the last 16 tokens
        that agrees counts, the last most, and each one further back 0.7 times as much. Among equals the row's own text
        comes first, then the cursor nearest to the response's length.
        """
        tail = np.asarray(response[-_COMPARED:], dtype=np.int64)
        guessed = [int(self._starts[text]) + at for text, at in guesses if self.is_readable((text, at))]
        ends = np.concatenate([self._behind(tail), np.array(guessed, dtype=np.int64)])
        if not len(ends):
            return None
        before = self._tokens[ends[:, None] - np.arange(1, len(tail) + 1)]  # [cursors, tail], the last first
        agreement = np.where(before == tail[::-1], _WEIGHTS[: len(tail)], 0.0).sum(-1)
        texts = np.searchsorted(self._starts, ends, side="right") - 1
        positions = ends - self._starts[texts]
        best = np.arange(len(ends))
        for score in (agreement, texts == own_text, -abs(positions - len(response))):
            best = best[score[best] == score[best].max()]
        return int(texts[best[0]]), int(positions[best[0]])

    def _behind(self, tail: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cursors behind the last two tokens, as indices of the tokens, in order."""
        if len(tail) < _MATCHED:
            return self._ends[:0]
        pair = _pairs(tail[-2], tail[-1])
        return self._ends[np.searchsorted(self._pairs, pair) : np.searchsorted(self._pairs, pair, side="right")]

    def read(self, cursor: Cursor, length: int) -> list[int]:
        """Up to so many tokens from a cursor on."""
        text, position = cursor
        return self.texts[text][position : position + length].tolist()

    def is_readable(self, cursor: Cursor) -> bool:
        """Whether its text goes on there."""
        return cursor[1] < len(self.texts[cursor[0]])


@dataclass
class HistoryReader:
    """Reads on in a history beside a growing response.

    First in the row's own text. Where the response has left the text, at the cursor that agrees best with it. That may
    be the place where it was, as if one word had been replaced by another.
    """

    history: TextHistory
    own_text: int | None = None
    """The row's own last response, among the texts."""

    def __post_init__(self) -> None:
        self._seen = 0  # tokens of the response that were looked at
        self._place = None if self.own_text is None else (self.own_text, 0)

    def propose(self, response: Sequence[int], length: int) -> list[int]:
        """Up to `length` tokens that may follow the response, which has only grown since the last call."""
        new = response[self._seen :]
        self._seen = len(response)
        guesses = [] if self.own_text is None else [(self.own_text, len(response))]
        if self._place is not None:
            text, position = self._place
            goes_on = np.array_equal(self.history.texts[text][position : position + len(new)], new)
            self._place = text, position + len(new)
            if goes_on and self.history.is_readable(self._place):
                return self.history.read(self._place, length)
            guesses.append(self._place)
        self._place = self.history.find(response, self.own_text, guesses)
        return [] if self._place is None else self.history.read(self._place, length)


@dataclass(frozen=True)
class RowHistory:
    """Earlier responses to the prompt of a row."""

    history: TextHistory
    own_text: int | None
    """The row's own last response, among the texts."""
    prompt_length: int
    """Tokens of the prompt."""


def _pairs(first: Any, second: Any) -> Any:
    """Two token ids as one number."""
    return first << 32 | second
