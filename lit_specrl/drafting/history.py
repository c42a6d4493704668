"""What followed the same words in earlier responses to the same prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Cursor = tuple[int, int]
"""A text of a history, and how many of its tokens were read."""

_MATCHED = 2  # tokens that must agree before a text is followed
_COMPARED = 16  # tokens before a cursor that tell better from worse
_WEIGHTS = 0.7 ** np.arange(_COMPARED)  # of these, the last first
_GAP = -1  # what stands before and behind a text; agrees with nothing


class TextHistory:
    """The earlier responses to a prompt, searched for continuations.

    Args:
        texts: token ids of each response.

    Example:
        >>> history = TextHistory([[5, 6, 7, 8], [9, 6, 4, 3]])
        >>> follower = HistoryReader(history, own_text=0)
        >>> follower.propose([], 2)          # at the start, what it said last time
        [5, 6]
        >>> follower.propose([9, 6], 2)      # it took the other one's way
        [4, 3]
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.texts = [list(text) for text in texts]
        tokens, self._starts = [_GAP] * _COMPARED, []
        self._cursors: dict[tuple[int, ...], list[Cursor]] = defaultdict(list)
        for number, text in enumerate(self.texts):
            self._starts.append(len(tokens))
            tokens += [*text, *[_GAP] * _COMPARED]
            for end in range(_MATCHED, len(text)):
                self._cursors[tuple(text[end - _MATCHED : end])].append((number, end))
        self._tokens = np.array(tokens)

    def find(self, response: Sequence[int], own_text: int | None, guesses: Iterable[Cursor] = ()) -> Cursor | None:
        """Where to go on reading: the cursor before which the texts agree best with the response's end, or `None`.

        Candidates are the cursors behind the response's last two tokens, and the guesses. They may differ from the response in a word here and there: each
        of the last 16 tokens that agrees counts, the last most, and each one further back 0.7 times as much. Among equals the row's own text
        comes first, then the cursor nearest to the response's length.
        """
        tail = [int(token) for token in response[-_COMPARED:]]
        cursors = self._cursors.get(tuple(tail[-_MATCHED:]), []) + [
            cursor for cursor in guesses if self.is_readable(cursor)
        ]
        if not cursors:
            return None
        ends = np.array([self._starts[text] + position for text, position in cursors])
        before = self._tokens[ends[:, None] - np.arange(1, len(tail) + 1)]  # [cursors, tail], the last first
        agreement = np.where(before == tail[::-1], _WEIGHTS[: len(tail)], 0.0).sum(-1)
        best = max(
            range(len(cursors)),
            key=lambda at: (agreement[at], cursors[at][0] == own_text, -abs(cursors[at][1] - len(response))),
        )
        return cursors[best]

    def read(self, cursor: Cursor, length: int) -> list[int]:
        """Up to so many tokens from a cursor on."""
        text, position = cursor
        return self.texts[text][position : position + length]

    def is_readable(self, cursor: Cursor) -> bool:
        """Whether its text goes on there."""
        return cursor[1] < len(self.texts[cursor[0]])


@dataclass
class HistoryReader:
    """Reads on in a history beside a growing response.

    First in the row's own text; where the response has gone another way, at the cursor that agrees best with it. That may be where it was, as if one word had been
    replaced by another.
    """

    history: TextHistory
    own_text: int | None = None
    """What this row said last time, among the texts."""

    def __post_init__(self) -> None:
        self._seen = 0  # tokens of the response that were looked at
        self._place = None if self.own_text is None else (self.own_text, 0)

    def propose(self, response: Sequence[int], length: int) -> list[int]:
        """Up to `length` tokens that may follow the response (a list or array), which has only grown since the last call."""
        new = [int(token) for token in response[self._seen :]]
        self._seen = len(response)
        guesses = [] if self.own_text is None else [(self.own_text, len(response))]
        if self._place is not None:
            text, position = self._place
            goes_on = self.history.texts[text][position : position + len(new)] == new
            self._place = text, position + len(new)
            if goes_on and self.history.is_readable(self._place):
                return self.history.read(self._place, length)
            guesses.append(self._place)
        self._place = self.history.find(response, self.own_text, guesses)
        return [] if self._place is None else self.history.read(self._place, length)
