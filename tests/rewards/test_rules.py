import json
from fractions import Fraction

import pytest

from lit_specrl.rewards import ExactReward, FormatReward, NumericReward, OverlongReward, Reward, RewardFunction
from lit_specrl.rewards.numeric import parse_number


def test_exact_compares_the_extracted_answer_and_skips_rows_without_reference():
    reward = ExactReward("Answer: (.+)")
    texts = ["Answer: Paris ", "Answer: paris", "Paris", "Answer: Paris"]
    assert reward(["q"] * 4, texts, answer=["Paris", "Paris", "Paris", None]) == [1.0, 0.0, 0.0, None]
    folding = ExactReward("Answer: (.+)", ignore_case=True)
    assert folding(["q"] * 4, texts, answer=["Paris"] * 3 + [None]) == [1.0, 1.0, 0.0, None]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", (Fraction(42), False)),
        ("$1,234.50", (Fraction(2469, 2), False)),
        (r"\$32,\!348", (Fraction(32348), False)),
        ("-3/4", (Fraction(-3, 4), False)),
        ("+.5", (Fraction(1, 2), False)),
        ("7.", (Fraction(7), False)),
        ("1e-3", (Fraction(1, 1000), False)),
        ("50%.", (Fraction(50), True)),
        ("", None),
        (".", None),
        ("-", None),
        ("1/0", None),
        ("five", None),
        ("1e999999999", None),
        ("9" * 100_000, None),
    ],
)
def test_numbers_are_read_exactly(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("That makes $1,200.", "#### 1200", 1.0),
        ("It is 0.75", "3/4", 1.0),
        ("It is 0.7501", "3/4", 0.0),
        ("Half: 50%", "0.5", 1.0),
        ("Half: 50%", "50", 1.0),
        ("Half: 50%", "5%", 0.0),
        ("Half: 0.5", "50%", 1.0),
        ("Half: 50 %", "0.5", 1.0),
        (r"Half: $50\%$", "0.5", 1.0),
        ("It is \N{MINUS SIGN}5", "-5", 1.0),
        ("It is \N{MINUS SIGN}5", "5", 0.0),
        ("It is -5", "\N{MINUS SIGN}5", 1.0),
        ("It is 1e-3", "0.001", 1.0),
        ("It is 1e-3", "3", 0.0),
        ("It is 10^{-5}", "1e-05", 1.0),
        (r"It is $2.5 \times 10^{8}$.", "250000000", 1.0),
        (r"It is $\frac{3}{4}$.", "0.75", 1.0),
        ("It is 3 / 4.", "0.75", 1.0),
        ("3,4,5", "5", 1.0),
        ("3,4,5", "345", 0.0),
        ("I do not know", "3", 0.0),
        ("3", None, None),
    ],
)
def test_numeric_compares_values(text, reference, score):
    assert NumericReward()(["q"], [text], answer=[reference]) == [score]


def test_numeric_tolerance_is_a_fraction_of_the_reference():
    texts = ["1010", "1011", "-990"]
    assert NumericReward(tolerance=0.01)(["q"] * 3, texts, answer=["1000", "1000", "-1000"]) == [1.0, 0.0, 1.0]


def test_numeric_counts_references_that_are_no_numbers():
    reward = NumericReward()
    assert reward(["q"] * 2, ["5", "5"], answer=["five", "5"]) == [None, 1.0]
    assert reward.counters == {"undecided": 1}


def test_format_asks_for_the_whole_completion():
    reward = FormatReward("<think>.*</think>")
    texts = ["<think>a\nb</think>\n", "4", "so <think></think>", "<think></think> 4"]
    assert reward(["q"] * 4, texts) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("prompt", "completion", "score"),
    [
        ("<|assistant|><think>", "First, 2 plus 2.\n</think>\nThe answer is 4.", 1.0),
        ("<|assistant|><think>\n", "First, 2 plus 2.\n</think>\nThe answer is 4.", 1.0),
        ("<|assistant|><think>", "<think>First</think>4", 1.0),
        ("<|assistant|><think>", "First, 2 plus 2.", 0.0),
        ("<|assistant|>", "First, 2 plus 2.\n</think>\nThe answer is 4.", 0.0),
        ("What is <think>?<|assistant|>", "First</think>4", 0.0),
        ("", "First</think>4", 1.0),
        ("", "<think>First</think>4</think>", 1.0),
        ("", "First</answer>4", 0.0),
        ("<|assistant|></think>", "First</think>4", 0.0),
    ],
)
def test_format_counts_the_tag_that_the_template_has_opened(prompt, completion, score):
    assert FormatReward("<think>.*</think>.*")([prompt], [completion]) == [score]


def test_format_counts_several_opened_tags():
    reward = FormatReward(r"<answer>\s*<step>.*</step>\s*</answer>")
    assert reward(["2+2?\n<answer>\n<step>"], ["4</step></answer>"]) == [1.0]


def test_overlong_falls_linearly_in_the_buffer():
    reward = OverlongReward(max_completion_length=10, overlong_buffer=4)
    ids = [[0] * length for length in (0, 6, 7, 9, 10, 12)]
    assert reward([""] * 6, [""] * 6, completion_ids=ids) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OverlongReward(10, 11), "overlong_buffer must lie between 1 and max_completion_length"),
        (lambda: NumericReward(tolerance=-1), "tolerance must lie in"),
        (lambda: FormatReward("(a"), "pattern must be a regular expression"),
        (lambda: ExactReward("boxd"), "answer_format must be one of"),
        (lambda: ExactReward(weight=float("nan")), "weight must be a finite number"),
    ],
)
def test_impossible_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="'answer' is needed, but the columns are: source"):
        ExactReward()(["q"], ["5"], source=["s"])


def test_rewards_are_named_after_their_class():
    class TidyAnswerReward(Reward):
        def __call__(self, prompts, completions, **columns):
            return [0.0] * len(completions)

    assert (TidyAnswerReward().name, ExactReward().name, ExactReward(name="mine").name) == (
        "tidy_answer",
        "exact",
        "mine",
    )


def test_a_function_gets_only_the_columns_it_names():
    def doubled(completions, level):
        return [2.0 * number for number in level]

    reward = RewardFunction(doubled)
    assert reward.name == "doubled"
    assert reward(["q"], ["a"], level=[3], answer=["x"]) == [6.0]


def test_a_function_with_kwargs_gets_all_columns():
    def names(**kwargs):
        return sorted(kwargs)

    assert RewardFunction(names)(["q"], ["a"], level=[3]) == ["completions", "level", "prompts"]


@pytest.mark.parametrize("path", ["json.dumps", "json:dumps"])
def test_a_function_is_found_by_its_import_path(path):
    assert RewardFunction(path).function is json.dumps


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("dumps", "given as 'package.module.function', got 'dumps'"),
        ("no_such_package.module.f", "there is no module 'no_such_package'"),
        ("json.no_such_module.f", "there is no module 'json.no_such_module'"),
        ("json.no_such_function", "expected a function 'no_such_function' in module 'json', found no such name"),
        ("json.__name__", "found a str"),
    ],
)
def test_a_wrong_import_path_says_what_was_expected(path, message):
    with pytest.raises(ValueError, match=message):
        RewardFunction(path)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="a reward must be a Reward, a function or an import path, got 3"):
        RewardFunction(3)
