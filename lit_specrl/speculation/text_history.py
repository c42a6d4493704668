"""What followed the same words in earlier responses to the same prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_MATCHED = 2  # tokens that must agree before a text is followed
_LONGEST_MATCH = 16  # tokens that are compared to tell better from worse


class TextHistory:
    """The earlier responses to a prompt, searched for continuations.

    Args:
        texts: token ids of each response.

    Example:
        >>> history = TextHistory([[5, 6, 7, 8], [9, 6, 4, 3]])
        >>> follower = Follower(history, own_text=0)
        >>> follower.propose([], 2)          # at the start, what it said last time
        [5, 6]
        >>> follower.propose([9, 6], 2)      # it took the other one's way
        [4, 3]
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.texts = [list(text) for text in texts]
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, text in enumerate(self.texts):
            for end in range(_MATCHED, len(text)):
                self._places[tuple(text[end - _MATCHED : end])].append((number, end))

    def find(self, response: Sequence[int], own_text: int | None) -> tuple[int, int] | None:
        """Where to go on reading: (text, position) behind the longest match of the response's end, or `None`.

        Among equally long matches the row's own text comes first, then the place nearest to the response's length.
        """
        tail = [int(token) for token in response[-_LONGEST_MATCH:]]
        places = self._places.get(tuple(tail[-_MATCHED:]), [])
        if len(tail) < _MATCHED or not places:
            return None
        return max(
            places,
            key=lambda place: (
                self._match_length(tail, place),
                place[0] == own_text,
                -abs(place[1] - len(response)),
            ),
        )

    def _match_length(self, tail: list[int], place: tuple[int, int]) -> int:
        text, end = self.texts[place[0]], place[1]
        longest = min(end, len(tail))
        for length in range(_MATCHED, longest):
            if text[end - 1 - length] != tail[-1 - length]:
                return length
        return longest


@dataclass
class Follower:
    """Reads on in a history beside a growing response.

    First in the row's own text; where the response has gone another way, behind the longest match in any text; where there is none, in the own
    text as if one word had been replaced by another.
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
        if self._place is not None:
            text, position = self._place
            if self.history.texts[text][position : position + len(new)] == new:
                self._place = text, position + len(new)
            else:
                self._place = None
        if self._place is None:
            self._place = self.history.find(response, self.own_text)
        place = self._place
        if place is None:  # a word was replaced, perhaps: as if the rest went on
            place = None if self.own_text is None else (self.own_text, len(response))
        if place is None:
            return []
        text, position = place
        return self.history.texts[text][position : position + length]
