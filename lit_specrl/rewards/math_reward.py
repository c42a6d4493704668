"""Reward for an answer that is mathematically equal to the reference."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from lit_specrl.answers import check_answer_format, extract_answer, plain_minus
from lit_specrl.rewards import math_checker
from lit_specrl.rewards.base import Reward, column
from lit_specrl.rewards.checker_pool import CheckerPool, Verdict
from lit_specrl.rewards.exact_number import parse_exact, same_number
from lit_specrl.rewards.units import in_one_unit

MAX_ANSWER_LENGTH = 1000
"""Characters; a longer answer is wrong unless it is the reference to the letter."""
TIMEOUT_WARNING_FRACTION = 0.05


class MathReward(Reward):
    r"""1 where the answer equals the reference as mathematics, 0 elsewhere.

    Equal texts and numbers are decided on the spot and exactly: 2e-7 is not 1e-7, while 0.333333 is 1/3 rounded to six
    digits. Everything else is decided by math-verify in processes of their own. Of two units of a kind one is
    converted, 50 mm is 5 cm. An inequality is the interval of what fulfils it. An equation whose sides disagree, such
    as `7 = 5`, is wrong. An answer that is still undecided at the deadline scores 0 and is counted (`timeouts`), as is
    one that brings its process down twice (`crashes`). Rows without a reference are not scored, nor are those whose
    reference is no mathematics and is not repeated to the letter (`undecided`). math-verify is generous: it overlooks
    units of different kinds or on one side only, degree signs, the base in 52_8, and the difference between `x = 5` and
    `5`.

    Args:
        answer_format: where a completion gives its answer, see `extract_answer`.
        timeout_s: time for one answer, in seconds.
        num_workers: processes that check answers, per training process.
        weight: factor of this reward in the total.
        name: name in the logs, "math" by default.

    Raises:
        ImportError: math-verify is not installed.

    Example::

        reward = MathReward()
        completions = [r"\boxed{\frac12}", "The answer is 0.5.", "#### 2"]
        reward(["Half?"] * 3, completions, answer=["1/2"] * 3)  # [1.0, 1.0, 0.0]
        reward.close()
    """

    needs_answer = True

    def __init__(
        self,
        answer_format: str = "auto",
        timeout_s: float = 5.0,
        num_workers: int = 2,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        check_answer_format(answer_format)
        if find_spec("math_verify") is None:
            raise ImportError("MathReward needs math-verify; install it by: pip install math-verify")
        self.answer_format = answer_format
        self.pool = CheckerPool(num_workers, timeout_s)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        pairs = [
            None if reference is None else self._pair(text, reference)
            for text, reference in zip(completions, column(columns, "answer"), strict=True)
        ]
        verdicts = {pair: compare_texts(*pair) for pair in pairs if pair is not None}
        open_pairs = [pair for pair, verdict in verdicts.items() if verdict is None]
        verdicts.update(zip(open_pairs, self.pool.check(open_pairs), strict=True))
        row_verdicts = [None if pair is None else verdicts[pair] for pair in pairs]
        self._count(row_verdicts)
        return [None if verdict in (None, "undecided") else float(verdict == "right") for verdict in row_verdicts]

    def _made_by(self) -> dict[str, Any]:
        """Return what the verdicts depend on: not the number of processes, but the checker that runs in them."""
        return {
            "answer_format": self.answer_format,
            "timeout_s": self.pool.timeout_s,
            "math_verify": version("math-verify"),
            "checker": math_checker.judge,
        }

    def close(self) -> None:
        """End the checker processes."""
        self.pool.close()

    def _pair(self, text: str, reference: str) -> tuple[str, str]:
        expected = _tidy_with_unit(extract_answer(reference, "auto") or "")
        given = _tidy_with_unit(extract_answer(text, self.answer_format) or "")
        choice = _CHOICE.match(expected)
        if choice and choice[3] and not _choice(given):  # the text of the choice instead of its letter
            expected = choice[3]
        expected, given = in_one_unit(expected, given)
        return tidy(expected), tidy(given)

    def _count(self, row_verdicts: list[Verdict | None]) -> None:
        counted: dict[str, Verdict] = {"timeouts": "timeout", "crashes": "crash", "undecided": "undecided"}
        self.counters = {counter: row_verdicts.count(verdict) for counter, verdict in counted.items()}
        if self.counters["timeouts"] > TIMEOUT_WARNING_FRACTION * len(row_verdicts):
            warnings.warn(
                f"{self.counters['timeouts']} of {len(row_verdicts)} answers were not decided within "
                f"timeout_s={self.pool.timeout_s} and scored 0; raise num_workers, or lower timeout_s to lose less "
                "time",
                stacklevel=3,
            )


_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textbf)\{\(?([^{}]*?)\)?\}")
_CHOICE = re.compile(
    r"(?:\\(?:text|mbox|mathrm|textbf)\{)? ?(?:\(([A-J])\)|([A-J])[).:]) ?\}?(?:\\[ ,;:])*(.*)", re.DOTALL
)
_MAY_HOLD_EULER = re.compile(r"\de")
_LETTER = re.compile(r"(?:[Oo]ption|[Cc]hoice)? ?\(?([A-J])\)?")


def compare_texts(reference: str, answer: str) -> Verdict | None:
    """Decide what needs no mathematics: equal texts, words, choices, numbers, answers too long to check; else `None`.

    Args:
        reference: tidy reference answer.
        answer: tidy answer.
    """
    if not reference:
        return "undecided"
    if reference == answer:
        return "right"
    if not answer or len(answer) > MAX_ANSWER_LENGTH or len(reference) > MAX_ANSWER_LENGTH:
        return "wrong"
    letters = _choice(reference), _choice(answer)
    if None not in letters:
        return "right" if letters[0] == letters[1] else "wrong"
    words = _WORDS.fullmatch(reference)
    if words:
        return "right" if _as_words(answer) == words[1].strip().casefold() else "wrong"
    if _as_words(answer) == _as_words(reference):
        return "right"
    expected, given = parse_exact(reference), parse_exact(answer)
    if expected is None or given is None:
        return None
    if same_number(given, expected):
        return "right"
    return None if _MAY_HOLD_EULER.search(reference + answer) else "wrong"


def _choice(answer: str) -> str | None:
    """The letter of a choice: "B", "(B)", "(B) 12", "B. 12"; `None` for anything else, such as "A rectangle"."""
    words = _WORDS.fullmatch(answer)
    match = _LETTER.fullmatch(words[1].strip() if words else answer) or _CHOICE.match(answer)
    return next((letter for letter in match.groups()[:2] if letter), None) if match else None


def _as_words(answer: str) -> str:
    words = _WORDS.fullmatch(answer)
    return (words[1] if words else answer.strip("()")).strip().casefold()


_FORMULA = re.compile(r"\$([^$]+)\$|\$\$([^$]+)\$\$|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]", re.DOTALL)
_BRACES = re.compile(r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+)(?<!\\)\}")
_PROSE = re.compile(r"[A-Za-z]{2,} [A-Za-z]{2,}")
_TIDYING = [
    (re.compile(r"\s++|~|(?<!\\)\\ |\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])\s?"), ""),
    (re.compile(r"\\[!,;:]\s?"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"(?:√|(?<![a-zA-Z\\])sqrt) ?(?:\(([^()]*+)\)|(\d++)(?!\.))"), r"\\sqrt{\1\2}"),
    (re.compile("√"), r"\\sqrt "),
    # A float as Python writes it; "2e-1" may also be twice Euler's number less 1.
    (re.compile(r"(?<![\w.,])(\d++(?:\.\d++)?)[eE]([-+]0\d|\+\d++)(?![\w.])"), r"\1\\cdot 10^{\2}"),
    (re.compile(r"^\\?\$(?=[-+\d.])"), ""),  # an amount: $18, \$18
]
_PARTS = r"(?:hal(?:f|ves)|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?)(?![a-z])"
# "42 apples per day": a number with words after it is that number; "2 sqrt" and "3 tenths" are others.
_WORDS_AFTER_NUMBER = re.compile(
    rf"^([-+]?\d[\d,]*+(?:\.\d++)?(?:\\cdot 10\^\{{\d++\}}|%)?+) ?(?<=[ %}}])(?!sqrt|sinh|cosh|tanh|arc|{_PARTS})"
    r"[A-Za-z]{4,}[A-Za-z ]*+$"
)
# "2 million", "25 percent"
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"^(\D{{0,3}}[\d,.]*\d)(?: |\\text\{{ ?)({'|'.join(_SCALES)})s?\b\}}?")
_PER_CENT = re.compile(r"^([-+]?[\d,.]*\d) ?(?:\\text\{ ?)?per ?cent\b\}?")
# a list such as 101, 202, which without its space would be a number
_LIST_OF_HUNDREDS = re.compile(r"(?<=\d), +(?=\d{3}(?!\d))")
_SYMBOLS = {
    **{
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∞": r"\infty ",
        "\u222a": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "π": r"\pi ",
    },
    **{
        "\u00d7": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "\u2044": "/",
        "±": r"\pm ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
    },
    **{"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}"},
}
_UNICODE = str.maketrans(_SYMBOLS)
_SPACE_AT_SYMBOL = re.compile(r"(?<!\w) | (?!\w)")


def tidy(answer: str) -> str:
    r"""Remove what makes no difference: outer `$...$`, `\left`, `\!`, a final full stop, spaces that separate nothing.

    Example::

        tidy(r"$\left( 3, \dfrac{\pi}{2} \right)$.")  # "(3,\\frac{\\pi}{2})"
    """
    return _WORDS_AFTER_NUMBER.sub(r"\1", _tidy_with_unit(answer))


def _tidy_with_unit(answer: str) -> str:
    answer = plain_minus(answer).translate(_UNICODE).strip().removesuffix(".").strip()
    formula = _FORMULA.fullmatch(answer)
    if formula:
        answer = formula[formula.lastindex or 0].strip()
    braces = _BRACES.fullmatch(answer)
    if braces:
        answer = braces[1].strip()
    for pattern, replacement in _TIDYING:
        answer = pattern.sub(replacement, answer)
    answer = _SCALED.sub(lambda match: rf"{match[1]}\cdot 10^{{{_SCALES[match[2]]}}}", answer)
    answer = _LIST_OF_HUNDREDS.sub(r",\\quad ", _PER_CENT.sub(r"\1%", answer))
    if not _PROSE.search(answer):  # in prose the checker looks for numbers between spaces
        answer = _SPACE_AT_SYMBOL.sub("", answer)
    return answer.strip()
