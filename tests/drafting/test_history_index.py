"""The index of a history by arrays, against one by a loop over all tokens."""

import random
from collections import defaultdict

import numpy as np

from lit_specrl.drafting.history import HistoryReader, TextHistory

WEIGHTS = 0.7 ** np.arange(16)


class LoopedHistory(TextHistory):
    """Remembers the cursors behind every two tokens in a dictionary."""

    def __init__(self, texts):
        super().__init__(texts)
        self.lists, tokens, self.starts = [list(text) for text in texts], [-1] * 16, []
        self.cursors = defaultdict(list)
        for number, text in enumerate(self.lists):
            self.starts.append(len(tokens))
            tokens += [*text, *[-1] * 16]
            for end in range(2, len(text)):
                self.cursors[tuple(text[end - 2 : end])].append((number, end))
        self.tokens = np.array(tokens)

    def find(self, response, own_text, guesses=()):
        tail = [int(token) for token in response[-16:]]
        cursors = self.cursors.get(tuple(tail[-2:]), []) + [
            (text, position) for text, position in guesses if position < len(self.lists[text])
        ]
        if not cursors:
            return None
        ends = np.array([self.starts[text] + position for text, position in cursors])
        before = self.tokens[ends[:, None] - np.arange(1, len(tail) + 1)]
        agreement = np.where(before == tail[::-1], WEIGHTS[: len(tail)], 0.0).sum(-1)
        best = max(
            range(len(cursors)),
            key=lambda at: (agreement[at], cursors[at][0] == own_text, -abs(cursors[at][1] - len(response))),
        )
        return cursors[best]


def test_proposals_are_those_of_the_loop():
    generator = random.Random(0)
    for _ in range(200):
        vocabulary = generator.choice([2, 4, 50_000])
        texts = [[generator.randrange(vocabulary) for _ in range(generator.choice([0, 1, 2, 3, 40]))] for _ in range(4)]
        own_text = generator.choice([None, 0, 3])
        looped, indexed = (HistoryReader(kind(texts), own_text) for kind in (LoopedHistory, TextHistory))
        response = []
        for _ in range(15):
            length = generator.randrange(1, 5)
            expected = looped.propose(response, length)
            assert indexed.propose(np.array(response, np.int32), length) == expected
            said = expected if expected and generator.random() < 0.7 else [generator.randrange(vocabulary)]
            response = response + said[: generator.randrange(1, 4)]


def test_a_history_without_texts_finds_nothing():
    assert TextHistory([]).find([1, 2, 3], None) is None
