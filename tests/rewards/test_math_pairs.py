# ruff: noqa: RUF001
r"""Pairs of reference and answer as models and data sets write them, and rewritings of whole data sets."""

import json
import re

import pytest
from math_answers import DATA, SAMPLE

from lit_specrl.rewards import MathReward
from lit_specrl.rewards.math_reward import compare_texts, tidy
from lit_specrl.rewards.units import in_one_unit

RIGHT = [
    (r"\frac{1}{3}", r"\frac{1}{3} = 0.33"),
    (r"\frac{14}{3}", r"\frac{14}{3} = 4.67"),
    (r"5\sqrt{2}", r"5\sqrt{2} = 7.07"),
    (r"\frac14", "25 percent"),
    ("0.25", r"25\text{ percent}"),
    ("25", "25 percent of the people"),
    ("2000000", "2 million"),
    ("2000000", r"2\text{ million}"),
    ("2 million", "2,000,000"),
    ("2 million dollars", "$2 million"),
    ("12 thousand", "12,000"),
    ("3", "3 quarters"),
    ("101, 202", "202, 101"),
    ("101, 202", "101 and 202"),
    ("(101, 202)", "(101,202)"),
    (r"\frac{1}{2^{99}}", "2^{-99}"),
    (r"4\sqrt 2", r"4\sqrt{2}"),
    (r"4\sqrt{2}", r"4\sqrt2"),
    ("4√2", r"4\sqrt{2}"),
    (r"4\sqrt{2}", "4√2"),
    ("5", "x = 5"),
    ("5", "2+3=5"),
    ("5", "5=x"),
    ("5", "E = 5"),
    ("5", r"\pi r = 5"),
    ("42", "52_8=42"),
    ("0.33", r"\frac{1}{3} = 0.33"),
    ("x+1", "y=x+1"),
    ("5", r"\sqrt{25}=5"),
    ("5", "f(2) = 5"),
    ("120", "5!=120"),
    ("5", r"\text{Area} = 5"),
    ("5", "a_5 = 5"),
    ("10", r"\binom{5}{2}=10"),
    ("[0,1)", r"0\le x<1"),
    ("(0,1)", "0<x<1"),
    (r"[2,\infty)", r"x \ge 2"),
    (r"(2,\infty)", "x > 2"),
    (r"[2,\infty)", r"2\le x"),
    (r"x \ge 2", r"[2,\infty)"),
    (r"0\le x<1", "[0,1)"),
    (r"0\le x<1", r"1>x\ge 0"),
    (r"[2,\infty)", "x≥2"),
    (r"[2,\infty)", "x >= 2"),
    (r"x<1 \text{ or } x>3", r"(-\infty,1)\cup(3,\infty)"),
    (r"(-\infty,1)\cup(3,\infty)", r"x<1 \text{ or } x>3"),
    (r"x \in [-2,7]", r"-2\le x\le 7"),
    (r"-2\le x\le 7", r"x \in [-2,7]"),
    ("[-2,7]", r"x\in[-2,7]"),
    (r"(2,\infty)", r"\{x\mid x>2\}"),
    (r"(-\infty, 3]", r"x\le 3"),
    ("x<5", "5>x"),
    (r"\sqrt{1/n}", r"1/\sqrt n"),
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{1/n}"),
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{\frac{1}{n}}"),
    ("|x|", r"\sqrt{x^2}"),
    (r"-\ln n", r"\ln\frac{1}{n}"),
    (r"\frac{\sqrt{a}}{\sqrt{b}}", r"\sqrt{\frac{a}{b}}"),
    ("1e-05", "0.00001"),
    ("1e-05", "10^{-5}"),
    ("0.00001", "1e-5"),
    ("1e-05", r"1 \times 10^{-5}"),
    ("2e-1", "-1+2e"),
    ("2e-1", "0.2"),
    ("1e+16", "10^{16}"),
    ("1.5e-7", r"1.5\times10^{-7}"),
    ("1e-10", "0.0000000001"),
    ("5 cm", "50 mm"),
    (r"5 \text{ cm}", r"50\text{ mm}"),
    ("5 cm", "0.05 m"),
    ("5 cm", "5"),
    ("5", "5 cm"),
    (r"5\text{ cm}^2", r"500\text{ mm}^2"),
    (r"90\text{ minutes}", r"1.5\text{ hours}"),
    ("1.5 hours", "90 minutes"),
    ("2 kg", "2000 g"),
    (r"\sqrt{2}\text{ m}", r"100\sqrt{2}\text{ cm}"),
    ("B", "(B) 12."),
    (r"\text{(B)}", "B. 12"),
    ("B", r"\textbf{(B)}\ 12"),
    (r"\textbf{(B)}\ 12", "B"),
    (r"\textbf{(B)}\ 12", "12"),
    ("B", "Option B"),
    ("0.5", "50 %"),
    ("0.5", r"50\%"),
    ("0.5", "50%"),
    ("50", "50%"),
    (r"50\%", "0.5"),
    ("-5", "−5"),
    ("−5", "-5"),
    ("x-1", "x−1"),
    (r"-\frac{1}{2}", "−0.5"),
    ("(-1,2)", "(−1, 2)"),
    (r"\frac{1}{3}", "0.333333"),
    (r"\frac{2}{3}", "0.666667"),
    ("0.333333", r"\frac13"),
    ("0.3", "0.30000000000000004"),
    (r"\sqrt{2}", "1.41421356"),
    (r"\pi", "3.14159265"),
    ("e^{-50}", r"\frac{1}{e^{50}}"),
    (r"137 \frac{1}{2}", "137.5"),
    (r"2\frac12", r"\frac52"),
    (r"2\frac12", "2.5"),
    ("1,000", "1000"),
    ("1{,}000", "1000"),
    (r"10\,000", "10000"),
    (r"\frac{3}{4}", "3/4"),
    (r"\frac{3}{4}", r"75\%"),
    ("0.75", r"\dfrac{3}{4}"),
    ("6", "3!"),
    ("1024", "2^{10}"),
    ("2^{10}", "1024"),
    (r"\binom{10}{3}", "120"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    (r"\frac{1}{2}", r"\tfrac12"),
    ("x^2", "x²"),
    (r"90^\circ", "90°"),
    (r"\infty", "∞"),
    (r"2\pi", "2π"),
    (r"\sqrt{\frac{1}{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"2\sqrt{13}", "2 sqrt(13)"),
    ("1,2,3", "3,2,1"),
    ("18", r"\$18.00"),
    ("5000", r"\$5,000"),
    ("x=2", "2"),
    ("y=2x+3", "y = 3 + 2x"),
    ("2x+3", "y=2x+3"),
    ("{(3,4]}", "(3,4]"),
    ("{x}", "x"),
    (r"\{1,2\}", "{1,2}"),
    (r"\frac{\pi}{4}", r"\frac{\pi}4"),
    (r"\frac{\pi}{4}", "π/4"),
    (r"2.5\times10^{8}", "250000000"),
    (r"2.5\times10^{8}", "2.5*10^8"),
    ("2.5e8", "250,000,000"),
    (r"(-\infty,\infty)", r"\mathbb{R}"),
    (r"\emptyset", r"\varnothing"),
    ("n(n+1)/2", r"\frac{n^2+n}{2}"),
    ("a^2-b^2", "(a-b)(a+b)"),
    (r"\log_2 8", "3"),
    (r"\frac{1}{e}", "e^{-1}"),
    (r"\sqrt[3]{8}", "2"),
    (r"\sqrt[3]{2}", "2^{1/3}"),
    (r"\frac{1}{\sqrt[3]{n}}", "n^{-1/3}"),
    ("C", "c"),
    (r"\text{Yes}", "yes"),
    ("True", "true"),
    (r"\text{6:30 PM}", "6:30 PM"),
    ("1:2", r"\frac{1}{2}"),
    ("x=1,y=2", "(1,2)"),
    ("-1/3", r"\frac{-1}{3}"),
    ("-1/3", r"-\frac13"),
    ("-1/3", r"\frac{1}{-3}"),
    ("1.0", "1"),
    ("1.50", "3/2"),
    ("0.1", "1/10"),
    ("100", "1e2"),
    (r"\frac{22}{7}", "3.142857"),
    ("0", "-0"),
    ("0", "0.0000000"),
    ("2^{31}-1", "2147483647"),
    ("10!", "3628800"),
    (r"\frac{10!}{8!}", "90"),
    ("1/3", r"33.3333\%"),
    (r"x\neq 2", r"(-\infty,2)\cup(2,\infty)"),
    ("(0,1]", r"0<x\leq 1"),
    ("(0,1]", r"0<x\leqslant 1"),
    ("[1,3]", r"1\leq y\leq 3"),
    ("[1,3]", r"|x-2|\le 1"),
    ("-1<x<1", "|x|<1"),
    (r"(-\infty,-1)\cup(1,\infty)", "x<-1 or x>1"),
    (r"[2,\infty)", r"[2,+\infty)"),
    (r"[2,\infty)", r"x\in[2,\infty)"),
    ("k>2", "2<k"),
    (r"12 \text{ cm}", "12"),
    ("12", r"12\,\text{cm}"),
    (r"12\text{ cm}", r"0.12\text{ m}"),
    (r"3\text{ hours}", r"180\text{ min}"),
    ("60 km", "60000 m"),
    ("5 dollars", "500 cents"),
    ("m+5", "5+m"),
    ("5m", "5m"),
    ("5 m", "5"),
    (r"30\%", "0.3"),
    (r"25\%", r"\frac14"),
    ("7", "7."),
    ("7", "7.0"),
    ("7", "07"),
    ("(2,3)", "2,3"),
    ("(2, 3)", r"\left(2,3\right)"),
    ("2,3", "3,2"),
    (r"\{2,3\}", r"\{3,2\}"),
    ("1+i", "i+1"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    ("5", "5 = 5"),
    ("5", "10/2 = 5"),
    ("5", "a = b = 5"),
    ("x=5", "5"),
    ("x=5", "2+3=5"),
    ("x = 5", "x=5."),
    ("9", "3^2 = 9"),
    ("2", r"\frac{4}{2} = 2"),
    ("-2", "x = -2"),
    ("-2", "x = −2"),
    ("(3,4)", "(x,y)=(3,4)"),
    ("(3,4)", "P=(3,4)"),
    ("6", "|x| = 6"),
    ("6", "3! = 6"),
    ("1", r"\sin^2 x+\cos^2 x=1"),
    ("0", r"e^{i\pi}+1=0"),
    ("2x", "f(x) = 2x"),
    ("2x", "y'=2x"),
    ("12", "AB = 12"),
    ("12", r"\angle A = 12"),
    ("12", r"n = 12 \text{ apples}"),
    (r"\frac{1}{2}", r"P(A) = \frac{1}{2}"),
    (r"3\sqrt{2}", r"\sqrt{18}"),
    (r"3\sqrt{2}", r"\sqrt{18} = 3\sqrt{2}"),
]
"""(reference, answer) that are equal."""

WRONG = [
    ("7", "2 + 3 = 5"),
    ("2", "2 + 3 = 5"),
    ("5", "5 million"),
    ("3 million", "3 thousand"),
    ("3", "3 halves"),
    ("3", "3 tenths"),
    ("1234", "1, 234"),
    ("(101, 202)", "101202"),
    ("101, 202", "101,202"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("2^{-99}", "2^{-98}"),
    ("0.0000001", "0.0000002"),
    ("1e-7", "2e-7"),
    ("4", r"4\sqrt 2"),
    ("4", r"4\sqrt{2}"),
    ("4", r"4\foo{2}"),
    ("5", "7 = 5"),
    ("5", "1=2=3=4=5"),
    ("5", "x=7=5"),
    ("5", r"\sqrt{24}=5"),
    ("121", "5!=121"),
    ("[0,1)", "0< x<1"),
    ("[0,1)", r"0\le x\le 1"),
    (r"[2,\infty)", "x > 2"),
    (r"x \ge 2", r"(2,\infty)"),
    (r"(-\infty,1)\cup(3,\infty)", r"x<1 \text{ or } x\ge3"),
    ("x<5", "x>5"),
    ("(0,1)", "[0,1]"),
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{2/n}"),
    ("|x|", "x"),
    ("x", r"\sqrt{x^2}"),
    ("1e-05", "0.0001"),
    ("2e-1", "2e-2"),
    ("1e-10", "0"),
    ("10^{-5}", "10^{-6}"),
    ("5 cm", "5 m"),
    ("5 m", "3 m"),
    ("B", "(C) 12."),
    (r"\textbf{(B)}\ 12", "13"),
    ("A", "A rectangle"),
    ("C", "(B)"),
    ("0.05", "50 %"),
    (r"33\%", "0.34"),
    ("5", "−5"),
    (r"\frac{1}{3}", "0.333"),
    (r"\frac{2}{3}", "0.66666"),
    ("1000000", "1000001"),
    (r"\sqrt{2}", "1.4143"),
    (r"\pi", "3.14"),
    (r"\pi/10^8", r"\pi/10^9"),
    ("(0.0000001, 1)", "(0.0000002, 1)"),
    (r"\{10^{-17},1\}", r"\{10^{-18},1\}"),
    (r"\frac{x}{2^{99}}", r"\frac{x}{2^{98}}"),
    (r"x+\frac{1}{2^{99}}", r"x+\frac{1}{2^{98}}"),
    ("e^{-50}", "e^{-51}"),
    ("12", "1,2"),
    ("3 5", "35"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
    ("(1,2)", "(2,1)"),
    ("x=2", "y=2"),
    (r"\frac{\pi}{4}", r"45^\circ"),
    ("n(n+1)/2", r"\frac{n^2-n}{2}"),
    ("No", "Yes"),
    ("3:4", "3:5"),
    ("0.1", "0.10001"),
    (r"\frac{22}{7}", "3.14"),
    ("0", "0.0000001"),
    (r"\frac{1}{2}", "0.50000001"),
    ("2^{31}", "2147483647"),
    ("1/3", r"33\%"),
    ("[0,1]", "[0,1.0000001]"),
    ("k>2", "k>3"),
    (r"k \ge 2", r"k \ge 2.0000001"),
    ("a>2", "b>2"),
    (r"12\text{ cm}", "0.12"),
    (r"\$5", "500 cents"),
    ("2 m", "2 miles"),
    ("7", "seven"),
    ("[2,3]", "(2,3)"),
    ("1+i", "1-i"),
    ("5", "10/3 = 5"),
    ("x=5", "7=5"),
    ("9", "3^{2}=8"),
    ("9", "8=9=9"),
    (r"3\sqrt{2}", r"\sqrt{17}=3\sqrt{2}"),
]
"""(reference, answer) that are not."""

ONE_WAY = {
    r"4\foo{2}",
    "7 = 5",
    "1=2=3=4=5",
    "x=7=5",
    "7=5",
    "8=9=9",
    r"\sqrt{24}=5",
    "5!=121",
    "10/3 = 5",
    r"\sqrt{17}=3\sqrt{2}",
}
"""Answers that are no reference: they contradict themselves or cannot be read."""


@pytest.fixture(scope="module")
def reward():
    reward = MathReward(timeout_s=60.0)
    yield reward
    reward.close()


def verdicts(reward, pairs):
    """Scores of (reference, answer)."""
    answers = [rf"\boxed{{{answer}}}" for _, answer in pairs]
    scores = reward([""] * len(pairs), answers, answer=[reference for reference, _ in pairs])
    assert reward.counters == {"timeouts": 0, "crashes": 0, "undecided": 0}
    return dict(zip(pairs, scores, strict=True))


def test_equal_answers_are_right(reward):
    assert [pair for pair, score in verdicts(reward, RIGHT).items() if score != 1.0] == []


def test_different_answers_are_wrong_in_both_directions(reward):
    turned = [(answer, reference) for reference, answer in WRONG if answer not in ONE_WAY]
    assert [pair for pair, score in verdicts(reward, WRONG + turned).items() if score != 0.0] == []


REWRITINGS = {
    "dfrac": lambda text: re.sub(r"\\[dt]?frac", r"\\dfrac", text),
    "tfrac": lambda text: re.sub(r"\\[dt]?frac", r"\\tfrac", text),
    "left and right": lambda text: re.sub(
        r"(?<!\\left)(?<!\\right)(?<!\\)[()\[\]]",
        lambda mark: (r"\left" if mark[0] in "([" else r"\right") + mark[0],
        text,
    ),
    "spaces": lambda text: re.sub(r"([-+=,()])", r" \1 ", text),
    "no spaces": lambda text: re.sub(r"(?<=[-+=,()]) | (?=[-+=,()])", "", text),
    "full stop": lambda text: f"{text}.",
    "dollars": lambda text: f"${text}$",
    "braces": lambda text: f"{{{text}}}",
    "displaystyle": lambda text: rf"\displaystyle {text}",
    "text": lambda text: rf"\text{{{text}}}" if re.fullmatch(r"[A-Za-z ]+|\d+", text) else text,
    "mbox": lambda text: re.sub(r"\\text(?=\{)", r"\\mbox", text),
    "minus sign": lambda text: text.replace("-", "\N{MINUS SIGN}"),
    "pi": lambda text: text.replace(r"\pi", "\N{GREEK SMALL LETTER PI}"),
    "money": lambda text: rf"\${text}" if text.isdigit() else text,
    "unit": lambda text: rf"{text}\text{{ cm}}" if text.isdigit() else text,
    "root of one sign": lambda text: re.sub(r"\\sqrt\{(\w)\}", r"\\sqrt \1", text),
}


@pytest.fixture(scope="module")
def answers():
    path = DATA / "math500.jsonl"
    if path.exists():
        return [json.loads(line)["answer"] for line in path.open()]
    return SAMPLE


@pytest.mark.parametrize("rewriting", REWRITINGS)
def test_an_answer_equals_itself_however_it_is_typeset(reward, answers, rewriting):
    rewritten = [REWRITINGS[rewriting](answer) for answer in answers]
    pairs = [*zip(answers, rewritten, strict=True), *zip(rewritten, answers, strict=True)]
    assert [pair for pair, score in verdicts(reward, pairs).items() if score != 1.0] == []


def test_an_answer_does_not_equal_the_next_one(reward, answers):
    others = [
        next(other for other in answers[row + 1 :] + answers if other != answers[row]) for row in range(len(answers))
    ]
    accepted = [
        pair for pair, score in verdicts(reward, list(zip(answers, others, strict=True))).items() if score != 0.0
    ]
    assert [pair for pair in accepted if pair not in RIGHT and pair not in [("5", "x=5")]] == []


def test_numbers_choices_and_words_are_decided_without_the_checker(reward, monkeypatch):
    monkeypatch.setattr(reward.pool, "check", lambda pairs: [] if not pairs else pytest.fail(f"asked about {pairs}"))
    pairs = [
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", 0.0),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", 0.0),
        ("1e-05", r"1.0 \times 10^{-5}", 1.0),
        ("5 cm", "50 mm", 1.0),
        ("0.5", "50 %", 1.0),
        ("B", "(B) 12.", 1.0),
        ("1/3", "0.333333", 1.0),
        ("1/3", "0.33333", 0.0),
        (r"137 \frac{1}{2}", "137.5", 1.0),
    ]
    for reference, answer, score in pairs:
        assert reward([""], [rf"\boxed{{{answer}}}"], answer=[reference]) == [score], (reference, answer)


def test_a_number_that_may_hold_eulers_number_is_left_to_the_checker():
    assert compare_texts("2e-1", "0.2") == "right"
    assert compare_texts("2e-1", "-1+2e") is None


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("5 cm", "50 mm", ("5", r"(50)*\frac{1}{10}")),
        ("5 cm", "50", ("5 cm", "50")),
        ("5 cm", "3 kg", ("5 cm", "3 kg")),
        (r"5\text{ m}^2", r"5\text{ cm}^2", ("5", r"(5)*\frac{1}{10000}")),
        (r"5\text{ m}^2", r"5\text{ m}^3", (r"5\text{ m}^2", r"5\text{ m}^3")),
        ("2x cm", "runs 5 km", ("2x cm", "runs 5 km")),
    ],
)
def test_units_of_a_kind_are_converted(reference, answer, expected):
    assert in_one_unit(reference, answer) == expected


def test_tidying_twice_changes_nothing_more():
    for reference, answer in RIGHT + WRONG:
        for text in (reference, answer):
            assert tidy(tidy(text)) == tidy(text)
