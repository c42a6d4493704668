"""Numbers as texts write them, read exactly.

Everything here works on fractions of bounded size and takes time linear in the text: it runs in the training process on
whatever a policy writes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lit_specrl.answers import plain_minus

MAX_NUMBER_LENGTH = 200
"""Characters; longer texts are no number, and exact arithmetic on them would cost."""
MAX_BITS = 100_000
"""Of a numerator or denominator; 2004! has 19,000."""
MAX_DEPTH = 20
"""Of brackets inside each other."""
MIN_SIGNIFICANT_DIGITS = 6
"""Digits from which on a decimal may stand for the number that it is rounded from, as 0.333333 for 1/3."""
FLOAT_NOISE = Fraction(1, 10**12)
"""Distance, as a fraction of the number, that a float with all its digits may be off: 0.30000000000000004 is 0.3."""
FLOAT_DIGITS = 15


@dataclass(frozen=True)
class ExactNumber:
    """The value of a text.

    Example: `parse_exact("-12.50%")`::

        ExactNumber(Fraction(-25, 2), is_percentage=True, num_places=2)
    """

    value: Fraction
    is_percentage: bool = False
    num_places: int | None = None
    """Digits after the point, `None` where the text is no plain decimal; of `1.5e-3`, 4."""

    def times(self, power_of_ten: int) -> ExactNumber:
        """The number with the point moved to the right."""
        places = None if self.num_places is None else self.num_places - power_of_ten
        return ExactNumber(self.value * Fraction(10) ** power_of_ten, False, places)

    @property
    def num_significant_digits(self) -> int:
        """Of a plain decimal, without leading zeros; 0 for what is none."""
        if self.num_places is None or self.num_places <= 0:
            return 0
        scaled = abs(self.value) * 10**self.num_places
        return math.floor(math.log10(scaled.numerator)) + 1 if scaled else 0


def parse_exact(text: str) -> ExactNumber | None:
    r"""Return the number that `text` writes, `None` if it is no number or none of a size that is worth computing.

    Understood are signs, `$`, commas between thousands, decimals, `1e-5`, `/`, `\frac`, mixed numbers, `\times`,
    `\cdot`, powers, factorials, sums, brackets and a final `%`.

    Example::

        parse_exact(r"1.5 \times 10^{-3}").value   # Fraction(3, 2000)
        parse_exact(r"\frac{1}{2^{98}}").value     # Fraction(1, 2**98)
        parse_exact(r"2\frac12").value             # Fraction(5, 2)
    """
    if len(text) > MAX_NUMBER_LENGTH or not re.search(r"\d", text):
        return None
    text = _plain(text)
    body = re.sub(r"\s*\\?(?:%|percent)$", "", text)
    decimal = _DECIMAL.fullmatch(body)
    try:
        value = _Reader(body).read()
    except (_NoNumber, ZeroDivisionError):
        return None
    places = len(decimal[1] or "") - int(decimal[2] or 0) if decimal else None
    return ExactNumber(value, body != text, places)


def same_number(answer: ExactNumber, reference: ExactNumber) -> bool:
    """Whether two numbers are equal, or one is the other as a float or rounded to six significant digits or more.

    A percentage is compared as written when both sides have the sign; when one has, both readings count.

    Example::

        same_number(parse_exact("0.333333"), parse_exact("1/3"))    # True
        same_number(parse_exact("2e-7"), parse_exact("1e-7"))       # False
        same_number(parse_exact("50%"), parse_exact("0.5"))         # True
    """
    return any(_agree(reading, reference) for reading in readings(answer, reference))


def readings(answer: ExactNumber, reference: ExactNumber) -> list[ExactNumber]:
    """What `answer` may mean beside `reference`, where one is a percentage and the other is not."""
    if answer.is_percentage and not reference.is_percentage:
        return [answer, answer.times(-2)]
    if reference.is_percentage and not answer.is_percentage:
        return [answer, answer.times(2)]
    return [answer]


def _agree(one: ExactNumber, other: ExactNumber) -> bool:
    if one.value == other.value:
        return True
    if one.value * other.value <= 0:
        return False
    digits = max(one.num_significant_digits, other.num_significant_digits)
    if digits >= FLOAT_DIGITS and abs(one.value - other.value) <= FLOAT_NOISE * abs(other.value):
        return True
    return _is_rounded(one, other) or _is_rounded(other, one)


def _is_rounded(rounded: ExactNumber, exact: ExactNumber) -> bool:
    """Whether one is a decimal that the other, having more digits, is rounded or cut to."""
    if rounded.num_places is None or rounded.num_significant_digits < MIN_SIGNIFICANT_DIGITS:
        return False
    if exact.num_places is not None and not MIN_SIGNIFICANT_DIGITS <= rounded.num_places < exact.num_places:
        return False
    last_place = Fraction(1, 10**rounded.num_places)
    missing = abs(exact.value) - abs(rounded.value)
    return -last_place / 2 <= missing < last_place


_DECIMAL = re.compile(r"[-+]?\d*\.?(\d*)(?:[eE]([-+]?\d{1,4}))?", re.ASCII)
_SIGNS: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dt]?frac(?![a-zA-Z])"), r"\\frac "),
    (re.compile(r"\\! ?|\{,\}(?=\d{3})|\\,(?=\d{3}(?!\d))|\\?\$"), ""),
    (re.compile(r"(?<=\d)\{,\}|\{,\}(?=\d)"), ","),
    (re.compile(r"\\[,;: ]|~"), " "),
    (re.compile(r"\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])|[\u00d7\u00b7\u2219\u22c5]|(?<=\d) ?[xX] ?(?=10\^)"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])|[\u00f7\u2044]"), "/"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<![\d,.])(\d{1,3}(?:,\d{3})++)(?![\d,])"), lambda match: match[1].replace(",", "")),
    (re.compile(r"(?<=[-+*/^({}]) +| +(?=[-+*/^)}{!])"), ""),
]


def _plain(text: str) -> str:
    """The text with one sign for one thing."""
    text = plain_minus(text)
    for pattern, replacement in _SIGNS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    return text.removesuffix(".").strip() if text.count(".") > 1 or re.search(r"[^\d]\.$|^[-+]?\d+\.$", text) else text


class _NoNumber(Exception):
    """The text is no number."""


_TOKEN = re.compile(r" *(\d+(?:\.\d*)?(?:[eE][-+]?\d{1,4})?|\.\d+(?:[eE][-+]?\d{1,4})?|\\frac|[-+*/^!(){}])", re.ASCII)


class _Reader:
    """Arithmetic on fractions: sums of products of powers."""

    def __init__(self, text: str) -> None:
        self._text, self._position, self._depth = text, 0, 0

    def read(self) -> Fraction:
        value = self._sum()
        if self._text[self._position :].strip():
            raise _NoNumber
        return value

    def _peek(self) -> str:
        match = _TOKEN.match(self._text, self._position)
        return match[1] if match else ""

    def _take(self) -> str:
        match = _TOKEN.match(self._text, self._position)
        if match is None:
            raise _NoNumber
        self._position = match.end()
        return match[1]

    def _sum(self) -> Fraction:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _NoNumber
        value = self._product()
        while self._peek() in ("+", "-"):
            value = _bounded(value + self._product() if self._take() == "+" else value - self._product())
        self._depth -= 1
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while self._peek() in ("*", "/"):
            value = _bounded(value * self._signed() if self._take() == "*" else value / self._signed())
        return value

    def _signed(self) -> Fraction:
        sign = 1
        while self._peek() in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        return sign * self._power()

    def _power(self) -> Fraction:
        base = self._factorial()
        if self._peek() != "^":
            return base
        self._take()
        exponent = self._exponent()
        if self._peek() == "^":  # of a tower, no answer is worth computing
            raise _NoNumber
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator != 1 or abs(exponent) * size > MAX_BITS:
            raise _NoNumber
        return base ** int(exponent)

    def _exponent(self) -> Fraction:
        """A group in braces or brackets, or a number with its sign: LaTeX raises one digit only, people mean the
        number."""
        if self._peek() == "-":
            self._take()
            return -self._factorial()
        return self._factorial()

    def _factorial(self) -> Fraction:
        value = self._atom()
        if self._peek() == "!":
            self._take()
            if self._peek() == "!":  # 7!! is 7 * 5 * 3, (7!)! beyond reach
                raise _NoNumber
            if value.denominator != 1 or not 0 <= value <= 3000:
                raise _NoNumber
            value = Fraction(math.factorial(int(value)))
        return value

    def _atom(self) -> Fraction:
        token = self._take()
        if token == r"\frac":
            return self._fraction()
        if token in ("(", "{"):
            value = self._sum()
            if self._take() != {"(": ")", "{": "}"}[token]:
                raise _NoNumber
            return value
        if not token[0].isdigit() and token[0] != ".":
            raise _NoNumber
        value = _bounded(_decimal(token))
        if value.denominator == 1 and self._peek() == r"\frac":
            return value + self._part_of_one()
        mixed = re.compile(r" +(\d+)/(\d+)(?![\d.^!])", re.ASCII).match(self._text, self._position)
        if value.denominator == 1 and mixed and 0 < int(mixed[1]) < int(mixed[2]):
            self._position = mixed.end()
            return value + Fraction(int(mixed[1]), int(mixed[2]))
        return value

    def _fraction(self) -> Fraction:
        return _bounded(self._argument() / self._argument())

    def _part_of_one(self) -> Fraction:
        """The fraction of a mixed number, such as 137 1/2."""
        self._take()
        part = self._fraction()
        if not 0 < part < 1:
            raise _NoNumber
        return part

    def _argument(self) -> Fraction:
        """A group in braces, or one digit as in `\\frac12`."""
        if self._peek() == "{":
            return self._atom()
        match = re.compile(r" *(\d)", re.ASCII).match(self._text, self._position)
        if match is None:
            raise _NoNumber
        self._position = match.end()
        return Fraction(int(match[1]))


def _decimal(token: str) -> Fraction:
    mantissa, _, exponent = token.lower().partition("e")
    if len(mantissa) > MAX_NUMBER_LENGTH or abs(int(exponent or 0)) > 1000:
        raise _NoNumber
    return Fraction(mantissa.rstrip(".")) * Fraction(10) ** int(exponent or 0)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NoNumber
    return value
