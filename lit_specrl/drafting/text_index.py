"""Growing texts, in which the places behind the same two tokens are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[Any]
"""An array of integers."""

CONTEXT = 16
"""Tokens before a text that may be compared with what stands before a place in it."""
_NONE = 0  # no place: the first ones belong to the context of the first text
_MIX = np.uint64(0xD6E8FEB86659FD93)
_GROUP_MIX = np.uint64(0x9E3779B97F4A7C15)


class TextIndex:
    """Texts in one array, and for each token the last earlier place behind the same two tokens of the same group.

    Hash chains, as in LZ77 coders (Deutsch 1996, RFC 1951, section 4): a table holds the latest place of each hash, and
    each place the one before it. All operations take whole arrays, so that the tokens of all rows of a step are added
    together. A place is the index of a token in `tokens`; 0 is none.

    Memory: 4 bytes a token for itself, 4 for its chain, 4 to 8 for the table, and one for the text that it belongs to:
    at most 17, of room as of tokens.

    Args:
        groups: [texts] of each text; only texts of the same group are found.
        rooms: [texts] tokens that each may have.

    Example: two texts of a group, the second of which grows:

        >>> index = TextIndex(groups=[0, 0], rooms=[4, 4])
        >>> index.append([0, 1], [5, 6, 7, 8, 5, 6], [4, 2])
        >>> (place,) = index.places_behind(np.array([0]), np.array([[5, 6]]), depth=1)[0]
        >>> int(index.tokens[place])
        7
    """

    def __init__(self, groups: Sequence[int] | Ints, rooms: Sequence[int] | Ints) -> None:
        blocks = -(-np.asarray(rooms, dtype=np.int64) // CONTEXT) + 1  # [texts], with the context
        self.groups = np.asarray(groups, dtype=np.int64)
        self.starts = (blocks.cumsum() - blocks + 1) * CONTEXT
        """[texts] place of the first token."""
        self.ends = self.starts.copy()
        """[texts] place behind the last token so far."""
        self.limits = self.starts + np.asarray(rooms, dtype=np.int64)
        size = int(blocks.sum() + 1) * CONTEXT
        self.tokens = np.zeros(size, dtype=np.int32)
        """All texts, each behind its context."""
        self._text_of_block = np.append(np.repeat(np.arange(len(blocks), dtype=np.int32), blocks), -1)
        self._previous = np.zeros(size, dtype=np.int32)
        self._shift = np.uint64(64 - size.bit_length())
        self._latest = np.zeros(1 << size.bit_length(), dtype=np.int32)

    @property
    def num_bytes(self) -> int:
        """Memory for all room, used or not."""
        arrays = self.tokens, self._text_of_block, self._previous, self._latest
        return sum(array.nbytes for array in arrays)

    def texts_at(self, places: Ints) -> Ints:
        """Texts that places belong to."""
        found: Ints = self._text_of_block[places // CONTEXT]
        return found

    def set_context(self, text: int, tokens: Sequence[int] | Ints) -> None:
        """Write what stands before a text, such as the end of its prompt; without, token 0 does."""
        tokens = tokens[-CONTEXT:]
        self.tokens[self.starts[text] - len(tokens) : self.starts[text]] = tokens

    def append(self, texts: Sequence[int] | Ints, tokens: Sequence[int] | Ints, counts: Sequence[int] | Ints) -> None:
        """Add tokens to texts; they must fit their room.

        Args:
            texts: [n] each at most once.
            tokens: [sum of counts] behind one another.
            counts: [n] how many each text gets.
        """
        self.link(self.write(texts, tokens, counts))

    def write(self, texts: Sequence[int] | Ints, tokens: Sequence[int] | Ints, counts: Sequence[int] | Ints) -> Ints:
        """As `append`, but nothing finds the tokens before `link`; returns their places."""
        texts, counts = np.asarray(texts), np.asarray(counts)
        places = ragged(self.ends[texts], counts)
        self.tokens[places] = tokens
        self.ends[texts] += counts
        assert (self.ends[texts] <= self.limits[texts]).all(), "tokens beyond the room of a text"
        return places

    def fill(self, text: int, tokens: Sequence[int] | Ints) -> None:
        """Write a whole text, which nothing finds before `link_texts`."""
        self.ends[text] = self.starts[text] + len(tokens)
        self.tokens[self.starts[text] : self.ends[text]] = tokens

    def link_texts(self, texts: Sequence[int]) -> None:
        """Let all places of texts be found that nothing has found before."""
        self.link(np.concatenate([np.arange(self.starts[text], self.ends[text]) for text in texts]))

    def link(self, places: Ints) -> None:
        """Let places be found by the two tokens before them."""
        if not len(places):
            return
        groups = self.groups[self.texts_at(places)]
        slots = self._slots(groups, self.tokens[places - 2], self.tokens[places - 1])
        # one number holds both, because numbers are sorted faster than indices
        order = np.sort(slots << 32 | places)
        slots, places = order >> 32, order & 0xFFFFFFFF
        is_first = np.append(True, slots[1:] != slots[:-1])
        self._previous[places] = np.where(is_first, self._latest[slots], np.append(_NONE, places[:-1]))
        is_last = np.append(is_first[1:], True)
        self._latest[slots[is_last]] = places[is_last]

    def places_behind(self, groups: Ints, pairs: Ints, depth: int) -> Ints:
        """The latest places behind two tokens, [n, depth]; 0 where there are fewer.

        Hashes collide: some of the places may stand behind other tokens, or in another group.

        Args:
            groups: [n].
            pairs: [n, 2] tokens.
            depth: most places.
        """
        found = np.empty((len(pairs), depth), dtype=np.int64)
        place = self._latest[self._slots(groups, pairs[:, 0], pairs[:, 1])]
        for number in range(depth):
            found[:, number] = place
            place = self._previous[place]
        return found

    def _slots(self, groups: Ints, first: Ints, second: Ints) -> Ints:
        pairs = first.astype(np.uint64) << np.uint64(32) | second.astype(np.uint64)
        mixed = (pairs ^ groups.astype(np.uint64) * _GROUP_MIX) * _MIX
        return (mixed >> self._shift).astype(np.int64)


def ragged(starts: Ints, counts: Ints) -> Ints:
    """The numbers from each start on, so many of each, behind one another.

    Example:
        >>> ragged(np.array([10, 20]), np.array([2, 3]))
        array([10, 11, 20, 21, 22])
    """
    return np.repeat(starts - counts.cumsum() + counts, counts) + np.arange(counts.sum())
