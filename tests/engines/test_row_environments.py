"""Environments of rows are all closed, and what goes wrong in one of them names the row."""

import warnings
from typing import ClassVar

import pytest
from tiny_models import build_tokenizer

from lit_specrl.data import PromptTemplate
from lit_specrl.engines.episodes import TurnTaking
from lit_specrl.engines.row_environments import RowEnvironments
from lit_specrl.environments import Environment, Observation
from lit_specrl.types import PromptBatch, SamplingConfig

GROUP = 2
PROMPTS = PromptBatch(["q0", "q1"], [[5], [6]], ["Hi", "Why?"], ["5", "7"], ["s", "s"])


class Counting(Environment):
    """Counts the copies that are made, and those that are closed; answers what it is given."""

    made: ClassVar[list] = []
    closed: ClassVar[list] = []

    def __init__(self, answer=None):
        self.answer, self.is_reset = answer, False

    def copy(self):
        self.made.append(type(self)(self.answer))
        return self.made[-1]

    def reset(self, row):
        self.is_reset = True

    def step(self, text):
        return self.answer

    def close(self):
        self.closed.append(self)


@pytest.fixture(autouse=True)
def _nothing_counted():
    Counting.made.clear()
    Counting.closed.clear()


def turns(environment, max_length=None):
    return TurnTaking(environment, 4, PromptTemplate(kind="plain"), build_tokenizer(), max_length=max_length)


class CopiesTwice(Counting):
    def copy(self):
        if len(self.made) == 2:
            raise OSError("no more games")
        return super().copy()


class ResetsTwice(Counting):
    def reset(self, row):
        if sum(environment.is_reset for environment in self.made) == 2:
            raise OSError("no more games")
        super().reset(row)


class Threaded(ResetsTwice):
    num_threads = 4


class Differs(Counting):
    def reset(self, row):
        return str(self.made.index(self))


class SaysTooMuch(Counting):
    def reset(self, row):
        return "x" * 30


class SaysNumbers(Counting):
    def reset(self, row):
        return 5


class Interrupted(Counting):
    def reset(self, row):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "num_made", "error", "message"),
    [
        (CopiesTwice, 2, RuntimeError, r"CopiesTwice.copy raised OSError: no more games; in row 0 of .*\(uid q1\)"),
        (ResetsTwice, 4, RuntimeError, r"ResetsTwice.reset raised OSError: no more games; in row 0 of .*\(uid q1\)"),
        (Threaded, 4, RuntimeError, r"Threaded.reset raised OSError: no more games"),
        (Differs, 4, ValueError, "must return the same for all rows of a group"),
        (SaysTooMuch, 4, ValueError, "raise max_prompt_length"),
        (SaysNumbers, 4, TypeError, r"must return a text or None, got 5 of type int; in row 0 of .*\(uid q0\)"),
        (Interrupted, 4, KeyboardInterrupt, ""),
    ],
)
def test_a_beginning_that_fails_closes_what_was_made(kind, num_made, error, message):
    with pytest.raises(error, match=message):
        turns(kind(), max_length=30).begin(PROMPTS, SamplingConfig(GROUP, 10))
    assert len(Counting.made) == num_made
    assert Counting.closed == Counting.made


def begun(environment, prompts=PROMPTS):
    environments = RowEnvironments(environment, prompts, GROUP)
    environments.begin()
    return environments


class ClosesBadly(Counting):
    def close(self):
        super().close()
        if self.made.index(self) in (1, 2):
            raise KeyError("not open")


def test_all_are_closed_also_where_closing_one_raises():
    with pytest.raises(RuntimeError, match=r"ClosesBadly.close raised KeyError: 'not open'; in row 1 of .*\(uid q0\)$"):
        begun(ClosesBadly()).close()
    assert Counting.closed == Counting.made and len(Counting.made) == 4


def test_what_closing_raises_does_not_hide_the_error_before_it():
    class NeverReset(CopiesTwice):
        def close(self):
            super().close()
            if not self.is_reset:
                raise AttributeError("no process")

    with (
        pytest.warns(
            UserWarning, match=r"behind another error: NeverReset.close raised AttributeError: no process; in row 0"
        ),
        pytest.raises(RuntimeError, match=r"NeverReset.copy raised OSError"),
    ):
        turns(NeverReset()).begin(PROMPTS, SamplingConfig(GROUP, 10))
    assert Counting.closed == Counting.made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(Counting()).abandon()  # nothing to tell of


def test_halves_of_surrogate_pairs_are_replaced():
    r"""JSON that the policy writes, such as "\ud83d", brings them into answers; the tokenizer ended the run."""

    class Echo(Counting):
        def reset(self, row):
            return "\ud83d!"

    episodes = turns(Echo("a\ude00 \ud83d\ude00")).begin(PROMPTS, SamplingConfig(GROUP, 10))
    assert episodes.prompts.prompts == ["Hi\ufffd!", "Why?\ufffd!"]
    [answer] = episodes.environments.step({1: "so"})
    assert answer == Observation("a\ufffd \U0001f600")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (5, "Counting.step must return a text, an Observation or None, got 5 of type int"),
        (Observation(5), "the text of Counting.step must be a text or None, got 5 of type int"),
        (Observation("", "much"), "the reward of Counting.step must be a number or None, got 'much' of type str"),
    ],
)
def test_answers_of_another_type_name_the_row(answer, message):
    with pytest.raises(TypeError, match=rf"^{message}; in row 1 of the prompt 'Why\?' \(uid q1\)$"):
        begun(Counting(answer)).step({3: "so"})


def test_an_environment_that_ends_the_process_is_an_error_of_its_row():
    """A tool that runs what the policy writes may be told to `exit()`: the run ended without a word."""

    class Exits(Counting):
        def step(self, text):
            raise SystemExit(0)

    with pytest.raises(RuntimeError, match=r"Exits.step raised SystemExit: 0; in row 0 of .*, on 'exit\(\)'"):
        begun(Exits()).step({0: "exit()"})
