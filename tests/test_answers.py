import time

import pytest

from lit_specrl.answers import extract_answer


@pytest.mark.parametrize(
    ("text", "answer_format", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"\boxed{1}, no, \boxed{2}", "boxed", "2"),
        (r"\boxed{\boxed{5}}", "boxed", "5"),
        (r"\fbox{a{b}c}", "boxed", "a{b}c"),
        (r"\boxed{\{1,2\}}", "boxed", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right\}}", "boxed", r"\left\{ x \right\}"),
        (r"\boxed{1} and \boxed{2", "boxed", "1"),
        (r"a stray } before \boxed{3}", "boxed", "3"),
        (r"\boxed{}", "boxed", None),
        ("no box", "boxed", None),
        ("3 + 4 = <<3+4=7>>7\n#### 7", "hash", "7"),
        ("#### 1\n#### 2\nbecause", "hash", "2"),
        ("#### ", "hash", None),
        ("7", "hash", None),
        ("from 3 to -4.5%.", "number", "-4.5%"),
        ("It is $1,200.50.", "number", "$1,200.50"),
        ("3/4 of them", "number", "3/4"),
        ("3-5", "number", "5"),
        ("7, then", "number", "7"),
        ("none", "number", None),
        ("  two words ", "text", "two words"),
        ("  ", "text", None),
        ("Answer: 5 apples\nAnswer: 6 pears", "Answer: (.+)", "6 pears"),
        ("no answer", "Answer: (.+)", None),
        (r"The answer is 1. No: \boxed{2}", "auto", "2"),
        ("\\boxed{5}\n\nQuestion: 3+4?\nAnswer: \\boxed{7}", "auto", "5"),
        ("\\boxed{5}\n\nQuestion: 3+4?\nAnswer: \\boxed{7}", "boxed", "5"),
        ("\\boxed{4}, no, \\boxed{5}\n\n### Problem 2: 3+4?\n\\boxed{7}", "boxed", "5"),
        ("#### 5\n\nQ: 3+4?\nA: #### 7", "hash", "5"),
        ("The answer is 5.\n\nQuestion: 3+4?\nThe answer is 7.", "auto", "5"),
        ("Answer: 5\nQuestion: 3+4?\nAnswer: 7", "Answer: (.+)", "5"),
        ("Question: 2+3?\nProblem: add them\n\\boxed{5}", "boxed", "5"),
        ("\\boxed{4} is wrong. My question: why?\n\\boxed{5}", "boxed", "5"),
        ("it is \N{MINUS SIGN}5", "number", "-5"),
        ("50 %", "number", "50 %"),
        ("1e-5", "number", "1e-5"),
        ("The answer is 1.\n#### 2", "auto", "2"),
        ("The final answer is 3.5. I hope so.", "auto", "3.5"),
        ("**Answer:** 42", "auto", "42"),
        ("The answer is:\n\\[\nx+1\n\\]\nthat is", "auto", "x+1"),
        ("The answer is $5$ and $6$.", "auto", "$5$ and $6$"),
        (r"so \(x\) is $\frac{1}{2}$ today", "auto", r"\frac{1}{2}"),
        (r"\$18", "auto", r"\$18"),
        ("we answer the question: 3", "auto", "we answer the question: 3"),
    ],
)
def test_the_answer_is_found_where_the_format_says(text, answer_format, answer):
    assert extract_answer(text, answer_format) == answer


@pytest.mark.parametrize("answer_format", ["boxd", "(a)(b)", "(unclosed"])
def test_a_format_that_is_neither_name_nor_pattern_with_one_group_is_refused(answer_format):
    with pytest.raises(ValueError, match="auto, boxed, hash, number, text or a regular expression with one group"):
        extract_answer("5", answer_format)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        "{",
        "9",
        "#",
        "answer ",
        "answer is ",
        "$",
        r"\(",
        r"\[ a",
        "$a ",
        "1,",
        "1/",
        " ",
        "\\",
        "-",
        "answer is $$",
    ],
)
def test_a_huge_text_that_never_closes_takes_linear_time(piece):
    """Quadratic time would be minutes for the larger of these; linear time is milliseconds."""
    text = piece * (200_000 // len(piece))
    started_at = time.perf_counter()
    for answer_format in ("auto", "boxed", "hash", "number"):
        extract_answer(text, answer_format)
    assert time.perf_counter() - started_at < 2.0
