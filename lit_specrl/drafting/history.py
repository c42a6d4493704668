"""What followed the same words in the other responses to a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_specrl.drafting.drafts import AGREEMENT_DECAY, OWN, PAST, PROMPT, SIBLING, Drafts
from lit_specrl.drafting.text_index import CONTEXT, Ints, TextIndex, ragged

_MATCHED = 2  # tokens that must agree before a text is followed
_DEPTH = 16  # places behind them that are compared
_WEIGHTS = AGREEMENT_DECAY ** np.arange(CONTEXT)  # of the tokens before a place, the last first
_BACK = np.arange(1, CONTEXT + 1)
_PREFERENCE = np.array([0, 2, 1, 0, 0])  # by source, where two agree equally


@dataclass(frozen=True)
class RolloutTexts:
    """The prompts of a rollout, and earlier responses to them; the rows of a prompt are neighbours.

    Example: two rows for each of two prompts, the third row with an earlier response::

        RolloutTexts(prompt_ids=[[5, 6], [7, 8, 9]], num_generations=2, past_responses={2: [4, 4, 3]},
                     max_completion_length=16)
    """

    prompt_ids: Sequence[Sequence[int]]
    num_generations: int
    """Rows of each prompt."""
    past_responses: Mapping[int, Sequence[int] | NDArray[Any]] = field(default_factory=dict)
    """Row -> tokens of its response of the last visit."""
    max_completion_length: int = 0
    """Most tokens of a response."""

    @property
    def num_rows(self) -> int:
        return len(self.prompt_ids) * self.num_generations

    def row(self, row: int) -> RowHistory | None:
        """What a drafter is told of a single row; `None` where nobody has answered its prompt."""
        first = row // self.num_generations * self.num_generations
        rows = [other for other in range(first, first + self.num_generations) if other in self.past_responses]
        if not rows:
            return None
        texts = [np.asarray(self.past_responses[other]) for other in rows]
        own_text = rows.index(row) if row in rows else None
        return RowHistory(texts, own_text, len(self.prompt_ids[row // self.num_generations]))


@dataclass(frozen=True)
class RowHistory:
    """Earlier responses to the prompt of a row."""

    texts: list[NDArray[Any]]
    """Token ids of each."""
    own_text: int | None
    """The row's own last response, among the texts."""
    prompt_length: int
    """Tokens of the prompt."""


class HistoryReader:
    """Reads on in other texts beside the growing responses of a rollout, all rows of a step at once.

    A row first reads on in its own last response. Where it has left the text that it follows, it goes on at the place
    that agrees best with its last 16 tokens, each further back counting 0.7 times as much: among the places behind the
    same two tokens in earlier responses to the prompt and, with siblings, in what the group has said so far, the row
    itself included, and in the prompt; and among the places where it would be in its own last response, and where it
    was, as if one word had been replaced by another. Of places that agree equally, the row's own last response comes
    first, then other earlier responses, then siblings; then the place nearest to the response's length, and the text
    that goes on longest.

    Seer (arXiv 2511.14617) shares one compressed suffix tree in a group; here the 16 latest places behind two tokens
    are compared in full, by array operations that all rows of a step share. Earlier responses are sorted in when a
    row of their group is first looked up. Memory as `TextIndex`: at most 17 bytes a token.

    Args:
        texts: of the rollout.
        siblings: read what the rows of a group say in this rollout, and the prompt, too.

    Example: the second row of a group has fallen behind the first:

        >>> reader = HistoryReader(RolloutTexts([[1, 2]], num_generations=2, max_completion_length=8))
        >>> rows, lengths = np.array([0, 1]), np.array([7, 4])
        >>> said = np.array([[1, 2, 5, 6, 7, 8, 9], [1, 2, 5, 6, 0, 0, 0]])
        >>> reader.propose(rows, said, lengths, 2).as_lists()
        [[], [7, 8]]
    """

    def __init__(self, texts: RolloutTexts, siblings: bool = True) -> None:
        self.siblings = siblings
        num_rows, size = texts.num_rows, texts.num_generations
        prompts = [np.asarray(prompt, dtype=np.int64) for prompt in texts.prompt_ids]
        past_rows = np.array(sorted(texts.past_responses), dtype=np.int64)
        past = [np.asarray(texts.past_responses[row]) for row in past_rows.tolist()]
        self._groups = np.arange(num_rows) // size  # [N]
        self._prompt_lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)[self._groups]  # [N]
        self._room = texts.max_completion_length
        # texts are the rows, then the prompts, then the past responses
        rooms = [*[self._room] * num_rows, *map(len, prompts), *map(len, past)]
        groups = np.concatenate([self._groups, np.arange(len(prompts)), past_rows // size])
        self.index = TextIndex(groups, rooms)
        """Of the rows, the prompts and the past responses, in this order."""
        self._sources = np.repeat([SIBLING, PROMPT, PAST], [num_rows, len(prompts), len(past)])  # by text
        self._past = np.full(num_rows, -1)  # [N] text of the row's own last response
        self._past[past_rows] = num_rows + len(prompts) + np.arange(len(past))
        for text in chain(range(num_rows), self._past[past_rows].tolist()):
            self.index.set_context(text, prompts[groups[text]])
        self._seen = np.zeros(num_rows, dtype=np.int64)  # tokens of each response that were looked at
        for text, tokens in enumerate([*prompts, *past], start=num_rows):
            self.index.fill(text, tokens)
        if siblings:
            self.index.link_texts(range(num_rows, num_rows + len(prompts)))
        self._unlinked: dict[int, list[int]] = {}  # group -> texts of its past responses that nothing finds yet
        for row in past_rows.tolist():
            self._unlinked.setdefault(row // size, []).append(int(self._past[row]))
        begins = (self._past >= 0) & (self.index.ends[self._past] > self.index.starts[self._past])
        self._places = np.where(begins, self.index.starts[self._past], 0)  # [N] where each row reads on

    def propose(self, rows: Ints, token_ids: Ints, num_tokens: Ints, length: int) -> Drafts:
        """What may follow the responses, which have only grown since the last call.

        Args:
            rows: [n] of the rollout.
            token_ids: [n, T] prompt and response of each, and anything behind them.
            num_tokens: [n] tokens of prompt and response.
            length: most tokens of a draft.
        """
        new, counts = self._take(rows, token_ids, num_tokens)
        tails = self._tails(rows)
        moved, goes_on = self._follow(rows, new, counts)
        lost = np.flatnonzero(~goes_on)
        places = moved
        if len(lost):
            places = moved.copy()
            places[lost] = self._find(rows[lost], moved[lost], tails[lost])
        self._places[rows] = places
        return self._drafts(rows, places, tails, length)

    def _take(self, rows: Ints, token_ids: Ints, num_tokens: Ints) -> tuple[Ints, Ints]:
        """New tokens of the responses, behind one another, and how many each row has; the index gets them."""
        known = np.minimum(num_tokens - self._prompt_lengths[rows], self._room)
        counts = known - self._seen[rows]
        columns = ragged(self._prompt_lengths[rows] + self._seen[rows], counts)
        new = token_ids[np.repeat(np.arange(len(rows)), counts), columns]
        self._seen[rows] = known
        places = self.index.write(rows, new, counts)
        if self.siblings:
            self.index.link(places)
        return new, counts

    def _tails(self, rows: Ints) -> Ints:
        """[n, 16] last tokens of prompt and response, the last first."""
        tails: Ints = self.index.tokens[self.index.ends[rows][:, None] - _BACK]
        return tails

    def _follow(self, rows: Ints, new: Ints, counts: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Where each row is if it has said what it read, or replaced it word by word; and whether it has said it."""
        places = self._places[rows]
        moved = np.where(places > 0, places + counts, 0)
        moved = np.where(self._is_readable(moved, self.index.texts_at(places)), moved, 0)
        followed = np.where(moved > 0, counts, 0)
        owners = np.repeat(np.arange(len(rows)), counts)
        read = self.index.tokens[ragged(places, followed)]
        differs = read != new[followed[owners] > 0]
        num_wrong = np.bincount(owners[followed[owners] > 0], differs, minlength=len(rows))
        return moved, (moved > 0) & (num_wrong == 0)

    def _is_readable(self, places: Ints, texts: Ints) -> NDArray[np.bool_]:
        """Whether there is a token of the text at a place."""
        inside = (places >= self.index.starts[texts]) & (places < self.index.ends[texts])
        return np.asarray(inside & (texts >= 0))

    def _find(self, rows: Ints, moved: Ints, tails: Ints) -> Ints:
        """[n] places to read on at, 0 for none."""
        groups = self._groups[rows]
        self._link_past(groups)
        looked_up = self.index.places_behind(groups, tails[:, [1, 0]], _DEPTH)  # [n, depth]
        own_past = np.where(self._past[rows] >= 0, self.index.starts[self._past[rows]] + self._seen[rows], 0)
        own_past = np.where(self._is_readable(own_past, self._past[rows]), own_past, 0)
        moved = np.where(self._sources[self.index.texts_at(moved)] == PAST, moved, 0)
        guesses = np.stack([moved, own_past], axis=1)  # [n, 2]
        places = np.concatenate([looked_up, guesses], axis=1)  # [n, depth + 2]
        texts = self.index.texts_at(places)
        agrees = self._agrees(places, tails)
        is_match = agrees[:, :, :_MATCHED].all(-1) & (self.index.groups[texts] == groups[:, None])
        is_match[:, _DEPTH:] = True
        is_match &= (places > 0) & (self.siblings | (self._sources[texts] == PAST))
        return self._best(rows, places, texts, (agrees * _WEIGHTS).sum(-1), is_match)

    def _best(
        self, rows: Ints, places: Ints, texts: Ints, agreement: NDArray[np.float64], candidates: NDArray[np.bool_]
    ) -> Ints:
        preference = _PREFERENCE[self._sources[texts]] + (texts == self._past[rows][:, None])
        distance = np.abs(places - self.index.starts[texts] - self._seen[rows][:, None])
        rest = self.index.ends[texts] - places
        for score in (agreement, preference, -distance, rest):
            known = np.where(candidates, score, -np.inf)
            candidates = candidates & (known == known.max(1, keepdims=True))
        at = np.arange(len(rows)), candidates.argmax(1)
        return np.where(candidates[at], places[at], 0)

    def _agrees(self, places: Ints, tails: Ints) -> NDArray[np.bool_]:
        """[n, ..., 16] whether each token before a place [n, ...] is that of the tail [n, 16]."""
        before = self.index.tokens[np.maximum(places, CONTEXT)[..., None] - _BACK]
        agrees: NDArray[np.bool_] = before == (tails[:, None] if places.ndim > 1 else tails)
        return agrees

    def _link_past(self, groups: Ints) -> None:
        for group in self._unlinked.keys() & set(groups.tolist()) if self._unlinked else ():
            self.index.link_texts(self._unlinked.pop(group))

    def _drafts(self, rows: Ints, places: Ints, tails: Ints, length: int) -> Drafts:
        texts = self.index.texts_at(places)
        found = places > 0
        seen, starts = self._seen[rows], self.index.starts[self._past[rows]]
        rest = self._room - seen - 1  # of which no token need be drafted: the policy adds one itself
        lengths = np.where(found, np.minimum(self.index.ends[texts] - places, np.minimum(rest, length)), 0)
        sources = np.where(texts == rows, OWN, self._sources[texts])
        agreement = (self._agrees(places, tails) * _WEIGHTS).sum(-1) * found
        read = np.minimum(places[:, None] + np.arange(length), len(self.index.tokens) - 1)
        past_lengths = np.where(self._past[rows] >= 0, self.index.ends[self._past[rows]] - starts, 0)
        expected = np.where(past_lengths > seen, past_lengths, self._room) - seen
        return Drafts(
            self.index.tokens[read],
            np.maximum(lengths, 0),
            np.where(found, sources, 0),
            agreement,
            expected.astype(np.float64),
        )
