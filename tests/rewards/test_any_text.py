"""Whatever a policy writes gives a number, in time linear in the text."""

import math

import pytest

from lit_specrl.answers import ANSWER_FORMATS, extract_answer
from lit_specrl.rewards import (
    EquationReward,
    ExactReward,
    FormatReward,
    MathReward,
    NumericReward,
    OverlongReward,
    RewardSet,
)
from lit_specrl.rewards.exact_number import parse_exact

TEXTS = [
    "",
    " \n\t",
    "\x00",
    "\ud800 \udfff",
    "None",
    "nan",
    "inf",
    "-",
    ".",
    "%",
    "1 + 2 = " + "3" * 4301,
    "9" * 5000 + " + 1 = 1" + "0" * 5000,
    "9" * 200_000,
    "1,111" * 20_000,
    "1e" + "9" * 5000,
    "1e999999999",
    "10^{10^{10}}",
    "2004!!!!",
    "1/0",
    r"\frac{1}{0}",
    r"\frac" * 500,
    r"\boxed{" * 20_000,
    r"\boxed{" + "{" * 20_000 + "}" * 20_000 + "}",
    r"\boxed{" + "(" * 150 + "1" + ")" * 150 + "}",
    r"\boxed{" + "-" * 180 + "1}",
    r"\boxed{" + r"\sqrt" * 30 + "{2}}",
    r"\boxed{" + "=" * 50 + "}",
    r"\boxed{" + "5=" * 100 + "}",
    r"\boxed{0\le}",
    r"\boxed{[1,}",
    r"\boxed{\text{}}",
    r"\boxed{(B)}",
    "\N{SUPERSCRIPT TWO}\N{ARABIC-INDIC DIGIT THREE}\N{FULLWIDTH DIGIT ONE}",
    "\N{ARABIC-INDIC DIGIT THREE} + 1 = 4",
    "Question:\n" * 5000 + r"\boxed{5}" + "\nQuestion:" * 5000,
    "####" * 5000,
    "$" * 20_000,
    r"\(" * 20_000,
    "answer is " * 5000,
    " " * 50_000 + "<think>",
    "1 + " * 20_000,
    "<a>" * 20_000,
]


def check(rewards, prompts, reference):
    columns = {"answer": [reference] * len(TEXTS), "completion_ids": [[0]] * len(TEXTS)}
    scores = rewards(prompts, TEXTS, **columns)
    assert scores.num_unscored == scores.num_nonfinite == 0
    assert all(value is not None and math.isfinite(value) for values in scores.values for value in values)


@pytest.mark.parametrize("prompts", [TEXTS, [""] * len(TEXTS)])
def test_every_reward_gives_every_text_a_number(prompts):
    format_reward = FormatReward("<think>.*</think>.*")
    check(
        RewardSet([EquationReward(1), ExactReward(), format_reward, NumericReward(), OverlongReward(10, 5)]),
        prompts,
        "5",
    )


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:.*answers were not decided")
def test_the_math_reward_gives_every_text_a_number():
    reward = MathReward(timeout_s=1.0)
    check(RewardSet([reward]), [""] * len(TEXTS), "[0,1)")
    reward.close()


@pytest.mark.parametrize("reference", TEXTS)
def test_a_reference_may_be_any_text_too(reference):
    for reward in (ExactReward(), NumericReward()):
        assert len(reward([""], ["5"], answer=[reference])) == 1


@pytest.mark.parametrize("answer_format", [*ANSWER_FORMATS, "Answer: (.+)"])
@pytest.mark.timeout(60)
def test_an_answer_is_looked_for_in_any_text(answer_format):
    for text in TEXTS:
        answer = extract_answer(text, answer_format)
        assert answer is None or answer.strip()
        parse_exact(answer or "")
