"""What followed the same words earlier in the same text."""

from __future__ import annotations

from collections.abc import Sequence


class PromptLookup:
    """A growing text, in which the last tokens are looked for.

    Prompt look-up decoding (Saxena 2023): n-grams of all lengths are remembered by their last place, so that a look-up
    takes the same time in a long text as in a short one.

    Args:
        min_match: tokens that must agree.
        max_match: tokens that are tried first.

    Example:
        >>> text = PromptLookup(min_match=1, max_match=3)
        >>> text.extend([5, 6, 7, 8, 5, 6])
        >>> text.propose(2)
        [7, 8]
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        self._sizes = range(max_match, min_match - 1, -1)
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # n-gram -> what follows it, but for the one at the end

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size <= end:
                    self._places[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def propose(self, length: int) -> list[int]:
        """Up to `length` tokens that followed the longest match of the text's end."""
        for size in self._sizes:
            place = self._places.get(tuple(self._tokens[-size:])) if size <= len(self._tokens) else None
            if place is not None:
                return self._tokens[place : place + length]
        return []


class NGramReader:
    """Proposes for one row, whose index grows with its text; arguments as those of `PromptLookup`."""

    def __init__(self, min_match: int, max_match: int) -> None:
        self._text = PromptLookup(min_match, max_match)

    def propose(self, token_ids: Sequence[int], length: int) -> list[int]:
        """As `LookUpDrafter.propose`."""
        self._text.extend([int(token) for token in token_ids[len(self._text) :]])
        return self._text.propose(length)
