"""The places that arrays find, against those that a loop over all tokens finds."""

import random
from collections import defaultdict

import numpy as np
import pytest

from lit_specrl.drafting import history
from lit_specrl.drafting.history import HistoryReader, RolloutTexts
from lit_specrl.drafting.text_index import CONTEXT, TextIndex

ROOM, PROMPTS = 48, [[3, 1, 2], [1, 2]]


class LoopedGroup:
    """The texts of a group as lists; every place behind two tokens in a dictionary."""

    def __init__(self, prompt, rows, past, siblings):
        self.context = ([0] * CONTEXT + prompt)[-CONTEXT:]
        self.siblings, self.places = siblings, defaultdict(list)
        self.texts = {("row", row): [] for row in rows}
        self.before = {name: self.context for name in self.texts}
        if siblings:
            self.texts["prompt"], self.before["prompt"] = [], [0] * CONTEXT
            self.extend("prompt", prompt)
        for row, text in past.items():
            self.texts["past", row], self.before["past", row] = [], self.context
            self.extend(("past", row), text)
        self.seen = dict.fromkeys(rows, 0)
        self.following = {row: ("past", row, 0) if row in past else None for row in rows}

    def extend(self, name, tokens):
        for token in tokens:
            whole = self.before[name] + self.texts[name]
            self.places[tuple(whole[-2:])].append((name, len(self.texts[name])))
            self.texts[name].append(token)

    def score(self, place, row):
        (name, at), response = place, self.texts["row", row]
        before, tail = self.before[name] + self.texts[name][:at], self.context + response
        agreement = sum(0.7**back for back in range(CONTEXT) if before[-1 - back] == tail[-1 - back])
        is_past = name[0] == "past"
        rest = len(self.texts[name]) - at
        return round(agreement, 9), is_past + (name == ("past", row)), -abs(at - len(response)), rest

    def best(self, row, moved):
        tail = self.context + self.texts["row", row]
        found = [place for place in self.places[tuple(tail[-2:])] if place[1] < len(self.texts[place[0]])]
        own = ("past", row), len(self.texts["row", row])
        for guess in (moved, own):
            if guess and guess[0][0] == "past" and guess[1] < len(self.texts.get(guess[0], [])):
                found.append(guess)
        scores = [self.score(place, row) for place in found]
        return [place for place, score in zip(found, scores, strict=True) if score == max(scores)]


def test_places_are_the_best_of_all(monkeypatch):
    """Every new place is one of the best that a loop over all texts finds, or where reading goes on."""
    monkeypatch.setattr(history, "_DEPTH", 400)  # all of them
    generator = random.Random(0)
    num_found = 0
    for trial in range(60):
        vocabulary, siblings = generator.choice([2, 4, 50_000]), trial % 3 > 0
        past = {
            row: [1 + generator.randrange(vocabulary) for _ in range(generator.choice([0, 1, 2, 40]))]
            for row in generator.sample(range(6), 3)
        }
        reader = HistoryReader(RolloutTexts(PROMPTS, 3, past, ROOM), siblings)
        loops = [
            LoopedGroup(
                PROMPTS[group],
                range(3 * group, 3 * group + 3),
                {row: past[row] for row in sorted(past) if row // 3 == group},
                siblings,
            )
            for group in (0, 1)
        ]
        num_found += follow(reader, loops, vocabulary, generator)
    assert num_found > 1000


def follow(reader, loops, vocabulary, generator):
    num_found = 0
    responses = {row: [] for row in range(6)}
    for _ in range(12):
        before = reader._places.copy()
        rows = sorted(generator.sample(range(6), 4))
        for row in rows:
            said = [1 + generator.randrange(vocabulary) for _ in range(generator.randrange(1, 4))]
            if before[row] and generator.random() < 0.7:
                text = reader.index.texts_at(before[row])
                read = reader.index.tokens[before[row] : reader.index.ends[text]][: len(said)].tolist()
                said = read or said
            responses[row] += said
            if siblings := loops[row // 3].siblings:
                loops[row // 3].extend(("row", row), said)
            else:
                loops[row // 3].texts["row", row] += said
            assert siblings == reader.siblings
        texts = [PROMPTS[row // 3] + responses[row] for row in rows]
        width = max(map(len, texts))
        token_ids = np.array([text + [0] * (width - len(text)) for text in texts], np.int32)
        reader.propose(np.array(rows), token_ids, np.array(list(map(len, texts))), 3)
        for row in rows:
            num_found += check(reader, loops[row // 3], row, before[row])
    return num_found


def name_of(reader, place):
    text = int(reader.index.texts_at(place))
    at = int(place - reader.index.starts[text])
    if text < 6:
        return ("row", text), at
    if text < 8:
        return "prompt", at
    (row,) = np.flatnonzero(reader._past == text)
    return ("past", int(row)), at


def check(reader, loop, row, before):
    new = len(loop.texts["row", row]) - loop.seen[row]
    loop.seen[row] += new
    place, moved = int(reader._places[row]), None
    if before:
        name, at = name_of(reader, before)
        moved = name, at + new
        whole = loop.texts[name]
        if whole[at : at + new] == loop.texts["row", row][-new:] and at + new < len(whole):
            assert name_of(reader, place) == moved  # the text is right so far
            return 1
    best = loop.best(row, moved)
    assert (name_of(reader, place) in best) if place else not best
    return bool(place)


def test_an_index_in_pieces_is_the_index_at_once():
    generator = np.random.default_rng(0)
    texts = [generator.integers(1, 5, size) for size in (40, 0, 7)]
    whole, pieces = (TextIndex([0, 0, 1], [40, 3, 9]) for _ in range(2))
    whole.append([0, 2], np.concatenate([texts[0], texts[2]]), [40, 7])
    for start in range(0, 40, 3):
        pieces.append([0], texts[0][start : start + 3], [len(texts[0][start : start + 3])])
    pieces.append([2], texts[2], [7])
    pairs = np.array([[a, b] for a in range(1, 5) for b in range(1, 5)])
    for group in (0, 1):
        found = [index.places_behind(np.full(16, group), pairs, 20) for index in (whole, pieces)]
        np.testing.assert_array_equal(*found)
        assert (found[0] > 0).any()


def test_the_index_takes_at_most_seventeen_bytes_a_token():
    for room in (1 << 10, (1 << 12) + 16, 100_000):
        assert TextIndex([0] * 8, [room] * 8).num_bytes <= 17 * (8 * (room + CONTEXT)) + 1000


def test_tokens_beyond_the_room_of_a_text_are_refused():
    with pytest.raises(AssertionError, match="beyond the room"):
        TextIndex([0], [2]).append([0], [1, 2, 3], [3])
