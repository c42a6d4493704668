"""Words that came before."""

import random

import pytest

from lit_specrl.drafting.ngram import PromptLookup


def slowly(tokens, min_match, max_match, length):
    """The definition: the longest match of the end that occurs earlier, at its last place."""
    for size in range(max_match, min_match - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if size <= len(tokens) and tokens[start : start + size] == tokens[-size:]:
                return tokens[start + size : start + size + length]
    return []


@pytest.mark.parametrize(("min_match", "max_match"), [(1, 3), (2, 4), (3, 3)])
def test_it_finds_what_the_definition_finds_in_whatever_pieces_the_text_comes(min_match, max_match):
    generator = random.Random(min_match)
    tokens, text = [], PromptLookup(min_match, max_match)
    assert text.propose(3) == []
    found = 0
    for _ in range(200):
        piece = [generator.randrange(4) for _ in range(generator.randrange(4))]
        tokens += piece
        text.extend(piece)
        assert len(text) == len(tokens)
        proposed = text.propose(3)
        assert proposed == slowly(tokens, min_match, max_match, 3)
        found += bool(proposed)
    assert found > 100
