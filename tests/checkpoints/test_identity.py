import os
import re
import subprocess
import sys
from functools import cache, partial

import pytest

from lit_specrl.rewards import (
    EquationReward,
    ExactReward,
    FormatReward,
    MathReward,
    NumericReward,
    OverlongReward,
    Reward,
    RewardFunction,
    RewardSet,
)

RULES = """
import enum, functools, re

class Level(enum.Enum):
    EASY = 1

THRESHOLD = 200
WORDS = {"one", "two", "three", "four"}
PATTERN = re.compile("a+")
STEPS = 0

def helper(text):
    return len(text) < THRESHOLD

def indirect(text):
    return helper(text)

def short(completions, level=Level.EASY, **columns):
    global STEPS
    STEPS += 1
    return [float(indirect(text) and text not in {"x", "y", "z"} and not PATTERN.match(text) and text in WORDS) for text in completions]

class Judge:
    def __init__(self, threshold):
        self.threshold = threshold
        self._client = object()
    def score(self, completions, **columns):
        return [float(len(text) < self.threshold) for text in completions]
    __call__ = score

def made(threshold):
    def closed(completions):
        return [float(len(text) < threshold) for text in completions]
    return closed

half = functools.partial(short, level=3)
judged = Judge(3).score
closed = made(3)
"""


def rules(source=RULES):
    """Names of a module of this source."""
    names = {"__name__": "rules"}
    exec(source, names)
    return names


def identity(reward):
    return RewardSet([RewardFunction(reward, name="given") if not isinstance(reward, Reward) else reward]).identity()


@pytest.mark.parametrize("name", ["short", "half", "judged", "closed"])
def test_the_same_source_has_the_same_identity_wherever_it_stands(name):
    moved = "# a comment\n\n" + RULES.replace("def short", "\n\ndef short")
    assert identity(rules()[name]) == identity(rules()[name]) == identity(rules(moved)[name])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("short", "THRESHOLD = 200", "THRESHOLD = 201"),
        ("short", "< THRESHOLD", "<= THRESHOLD"),
        ("short", "return helper(text)", "return not helper(text)"),
        ("short", 'text not in {"x", "y", "z"}', 'text not in {"x", "y"}'),
        ("short", '"a+"', '"a*"'),
        ("short", '"three", ', ""),
        ("short", "EASY = 1", "EASY = 2"),
        ("short", "[float(indirect", "[2 * float(indirect"),
        ("half", "level=3", "level=4"),
        ("judged", "Judge(3)", "Judge(4)"),
        ("judged", "< self.threshold", "<= self.threshold"),
        ("closed", "made(3)", "made(4)"),
        ("closed", "< threshold", "> threshold"),
    ],
)
def test_another_code_or_constant_under_the_same_name_has_another_identity(name, old, new):
    assert old in RULES
    assert identity(rules()[name]) != identity(rules(RULES.replace(old, new))[name])


def test_what_the_function_counts_is_no_setting():
    names = rules()
    rewards = RewardSet([names["short"]])
    before = rewards.identity()
    rewards([""], [""])
    assert names["STEPS"] == 1
    assert rewards.identity() == before == RewardSet([names["short"]]).identity()


def test_functions_of_one_name_differ_by_their_numbers():
    def first(completions, **columns):
        return [float(len(set(text))) for text in completions]

    def second(completions, **columns):
        return [100.0 + len(set(text)) for text in completions]

    second.__name__, second.__qualname__ = first.__name__, first.__qualname__
    assert identity(first) != identity(second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: MathReward(), lambda: MathReward("boxed")),
        (lambda: MathReward(), lambda: MathReward(timeout_s=1.0)),
        (lambda: NumericReward(), lambda: NumericReward(tolerance=0.01)),
        (lambda: ExactReward(), lambda: ExactReward(ignore_case=True)),
        (lambda: FormatReward("a"), lambda: FormatReward("b")),
        (lambda: EquationReward(1), lambda: EquationReward(2)),
        (lambda: OverlongReward(10, 4), lambda: OverlongReward(10, 5)),
        (lambda: ExactReward("text", name="a"), lambda: NumericReward("text", name="a")),
        (lambda: RewardFunction(len), lambda: RewardFunction(len, timeout_s=1.0)),
        (lambda: RewardFunction("json.dumps"), lambda: RewardFunction("json.loads", name="dumps")),
    ],
)
def test_settings_are_part_of_the_identity(one, other):
    assert one().identity() == one().identity()
    assert one().identity() != other().identity()


def test_weight_and_number_of_processes_are_no_part_of_it():
    assert MathReward(num_workers=1, weight=0.5, name="m").identity() == MathReward().identity()


def test_a_constructor_argument_counts_also_where_the_attribute_is_private():
    class KeptReward(Reward):
        def __init__(self, limit):
            super().__init__()
            self._limit = limit
            self._calls = object()

        def __call__(self, prompts, completions, **columns):
            return [float(len(text) < self._limit) for text in completions]

    assert KeptReward(3).identity() == KeptReward(3).identity()
    assert KeptReward(3).identity() != KeptReward(4).identity()


def test_the_code_of_a_class_and_of_its_bases_counts():
    def build(factor, sign):
        class Base(Reward):
            def number(self, text):
                return len(text) * (3 if factor == 3 else 2)

        class PlainReward(Base):
            sign_of_it = sign

            def __call__(self, prompts, completions, **columns):
                return [self.number(text) for text in completions]

        return PlainReward().identity()

    assert build(3, 1) == build(3, 1)
    assert len({build(3, 1), build(2, 1), build(3, -1)}) == 3


def test_a_set_names_each_reward_on_a_line():
    rewards = RewardSet([FormatReward("a"), ExactReward(name="to_the_letter")])
    assert re.fullmatch(
        r"format: lit_specrl\.rewards\.format\.FormatReward\(pattern=re\.compile\('a', \d+\)\)#[0-9a-f]{16}\n"
        r"to_the_letter: lit_specrl\.rewards\.exact\.ExactReward\(answer_format='text', ignore_case=False\)#[0-9a-f]{16}",
        rewards.identity(),
    )


def test_it_is_the_same_in_every_process():
    script = "import sys; sys.path[:0] = sys.argv[1:]; import test_identity as t; t.print_identities()"
    found = [
        subprocess.run(
            [sys.executable, "-c", script, os.path.dirname(__file__), os.getcwd()],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] and found[0].count("\n") == 7


def print_identities():
    names = rules()
    for reward in (MathReward(), RewardFunction("json.dumps"), RewardFunction(cache(names["short"]), name="cached")):
        print(identity(reward))
    for name in ("short", "half", "judged", "closed"):
        print(identity(names[name]))


def test_nothing_in_reach_of_a_function_breaks_it():
    loop = []
    loop.append(loop)
    strange = {"loop": loop, "long": 10**5000, "lone": "\ud800", "bytes": b"\0", "object": object(), "cell": print}
    empty = partial(lambda completions, kept: [0.0], kept=strange)
    assert "RewardFunction" in identity(empty)

    def recursive(completions):
        return recursive(completions) if later else []

    assert "recursive" in identity(recursive)
    later = 1


@pytest.mark.parametrize(
    ("reward", "needs"),
    [
        (MathReward(), True),
        (NumericReward(), True),
        (ExactReward(), True),
        (FormatReward("a"), False),
        (EquationReward(1), False),
        (OverlongReward(10, 4), False),
        (RewardFunction(len), False),
    ],
)
def test_rewards_say_whether_they_need_a_reference_answer(reward, needs):
    assert reward.needs_answer is needs
