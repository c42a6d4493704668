r"""MathReward on reference answers of MATH-500 and GSM8K.

The inline sample always runs; the data sets do where `LIT_SPECRL_DATA`, or `shared/data` beside the project, holds
them.
"""

import copy
import json
import re

import pytest
from math_answers import DATA, SAMPLE

from lit_specrl.rewards import MathReward
from lit_specrl.rewards.math_reward import compare_texts, tidy

WRAPPINGS = [
    r"Hence \[ \boxed{%s} \] as was asked.",
    "Hence $%s$.",
    "The answer is %s.",
    "The final answer is: $%s$. I hope it is correct.",
    "**Answer:** \\(%s\\)",
    "Hence\n#### %s",
    "%s",
]

UNDECIDED: list[str] = []
"""References of MATH-500 that the checker cannot read as mathematics: none."""

OVERLOOKED = [
    ("4210_{5}", "4210_{6}"),
    ("4343_6", "4343_7"),
    ("2516_8", "2516_9"),
    ("204_5", "204_6"),
    ("40_9", "40_10"),
    ("52_8", "52_9"),
    (r"15\mbox{ cm}^2", r"15\mbox{ cm}^3"),
    (r"864 \mbox{ inches}^2", r"864 \mbox{ inches}^3"),
]
"""Changes that math-verify takes for no change: it overlooks the base of a number and its unit."""


@pytest.fixture(scope="module")
def reward():
    reward = MathReward()
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def math500():
    path = DATA / "math500.jsonl"
    return [json.loads(line)["answer"] for line in path.open()] if path.exists() else SAMPLE


@pytest.fixture(scope="module")
def gsm8k():
    path = DATA / "gsm8k_test.jsonl"
    return (
        [json.loads(line)["answer"] for line in path.open()] if path.exists() else ["2 + 3 = 5\n#### 5", "#### 1,200"]
    )


def changed(answer):
    """The answer with its last number increased by one, or another word or term where it has none."""
    numbers = list(re.finditer(r"\d+", answer))
    if numbers:
        last = numbers[-1]
        return f"{answer[: last.start()]}{int(last[0]) + 1}{answer[last.end() :]}"
    return r"\text{other}" if r"\text" in answer else f"{answer} + 1"


def score(reward, texts, references):
    return reward([""] * len(texts), texts, answer=references)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_reference_is_right_in_its_usual_wrappings(reward, math500, gsm8k, wrapping):
    numbers = [solution.rpartition("####")[2].strip() for solution in gsm8k]
    texts = [wrapping % answer for answer in math500 + SAMPLE + numbers]
    scores = score(reward, texts, math500 + SAMPLE + gsm8k)
    assert [text for text, value in zip(texts, scores, strict=True) if value != 1.0] == []
    assert reward.counters == {"timeouts": 0, "crashes": 0, "undecided": 0}


def test_the_checker_itself_finds_every_reference_equal_to_itself(reward, math500):
    """The reward takes equal texts for right without asking; here the checker is asked."""
    answers = [tidy(answer) for answer in math500 + SAMPLE]
    verdicts = reward.pool.check([(answer, answer) for answer in answers])
    unread = [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict != "right"]
    assert unread == UNDECIDED


def test_a_changed_answer_is_wrong(reward, math500, gsm8k):
    answers = math500 + SAMPLE
    scores = score(reward, [rf"\boxed{{{changed(answer)}}}" for answer in answers], answers)
    accepted = {answer for answer, value in zip(answers, scores, strict=True) if value != 0.0}
    assert accepted == {answer for answer, _ in OVERLOOKED} & set(answers)
    assert reward.counters == {"timeouts": 0, "crashes": 0, "undecided": 0}

    numbers = [int(solution.rpartition("####")[2].replace(",", "")) for solution in gsm8k]
    assert score(reward, [f"The answer is {n + 1}." for n in numbers], gsm8k) == [0.0] * len(gsm8k)
    assert score(reward, [f"She has {n}5 apples." for n in numbers], gsm8k) == [0.0] * len(gsm8k)


def test_what_the_checker_overlooks(reward):
    assert score(reward, [change for _, change in OVERLOOKED], [answer for answer, _ in OVERLOOKED]) == [1.0] * 8


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{34\%}", r"\dfrac{17}{50}", 1.0),
        (r"\boxed{-q + p}", "p - q", 1.0),
        (r"\boxed{q - p}", "p - q", 0.0),
        (r"\boxed{x = 5}", "5", 1.0),
        (r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}", r"1 \pm \sqrt{19}", 1.0),
        (r"\boxed{[3,4]}", "(3,4]", 0.0),
        (r"\boxed{\frac{2}{2\sqrt{3}}}", r"\frac{\sqrt{3}}{3}", 1.0),
        (r"\boxed{58500}", "58,500", 1.0),
        (r"\boxed{evelyn}", r"\text{Evelyn}", 1.0),
        (r"\boxed{Evelny}", r"\text{Evelyn}", 0.0),
        (r"\boxed{C}", r"\text{(C)}", 1.0),
        ("The answer is 42 apples per day.", "42", 1.0),
        ("So she has -3 left over.", "-3", 1.0),
        ("So it costs $1,200.", "1200", 1.0),
        ("She pays $18 dollars and gets 4 back.", "18", 0.0),
        (r"\boxed{2x}", "2", 0.0),
        (r"\boxed{35}", "3 5", 0.0),
        (r"\boxed{1", "1", 0.0),
        ("", "1", 0.0),
        (r"\boxed{\begin{pmatrix} 1 &}", "1", 0.0),
        ("\x00\ud800", "1", 0.0),
    ],
)
def test_answers_are_compared_as_mathematics(reward, text, reference, value):
    assert score(reward, [text], [reference]) == [value]


def test_words_after_a_number_are_dropped_but_functions_are_not():
    assert [tidy(text) for text in ("42 apples per day", "1,200 dollars.", "2 sqrt x", "2 x")] == [
        "42",
        "1,200",
        "2 sqrt x",
        "2 x",
    ]


def test_rows_without_reference_are_not_scored(reward):
    assert score(reward, ["1", "2", "2"], [None, "2", "  "]) == [None, 1.0, None]
    assert reward.counters["undecided"] == 1


def test_huge_answers_are_wrong_without_being_checked(reward, monkeypatch):
    monkeypatch.setattr(reward.pool, "check", lambda pairs: [] if not pairs else pytest.fail("asked the checker"))
    texts = ["9" * 100_000, rf"\boxed{{{'{' * 50_000}{'}' * 50_000}}}", r"\boxed{" * 20_000]
    assert score(reward, texts, ["2x"] * 3) == [0.0] * 3


def test_equal_pairs_are_checked_once(reward, monkeypatch):
    asked = []
    monkeypatch.setattr(reward.pool, "check", lambda pairs: asked.extend(pairs) or ["right"] * len(pairs))
    assert score(reward, [r"\boxed{1+x}", "1+x", "$1+x$.", "x+1.0"], ["x+1"] * 4) == [1.0] * 4
    assert asked == [("x+1", "1+x"), ("x+1", "x+1.0")]


def test_texts_and_numbers_are_decided_without_the_checker():
    assert compare_texts("42", "042") == "right"
    assert compare_texts("1,000", "1000") == "right"
    assert compare_texts("42", "43") == "wrong"
    assert compare_texts("1/2", "0.5") == "right"
    assert compare_texts("x/2", "0.5x") is None


@pytest.mark.timeout(60)
def test_an_answer_that_hangs_scores_zero_is_counted_and_harms_no_other():
    reward = MathReward(timeout_s=1.0)
    texts = [r"\boxed{9^{9^{9}}}", r"\boxed{0.5}", r"\boxed{100000000!}", r"\boxed{2/4}", r"\boxed{0.6}"]
    with pytest.warns(UserWarning, match="2 of 5 answers were not decided within timeout_s=1.0"):
        assert score(reward, texts, [r"\frac{1}{2}"] * 5) == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert reward.counters == {"timeouts": 2, "crashes": 0, "undecided": 0}
    assert score(reward, [r"\boxed{0.5}"], [r"\frac{1}{2}"]) == [1.0]
    assert reward.counters == {"timeouts": 0, "crashes": 0, "undecided": 0}
    reward.close()


def test_a_copy_has_checkers_of_its_own(reward):
    duplicate = copy.deepcopy(reward)
    assert duplicate.pool is not reward.pool
    assert score(duplicate, ["x+1"], ["1+x"]) == [1.0]
    duplicate.close()


def test_without_math_verify_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr("lit_specrl.rewards.math_reward.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        MathReward()
