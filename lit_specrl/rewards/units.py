"""Two answers in units of the same kind, brought to the same unit."""

from __future__ import annotations

import re
from fractions import Fraction

_BASE_UNITS: dict[str, list[tuple[str, Fraction | int]]] = {
    "length": [
        ("nm nanometer nanometre", Fraction(1, 10**9)),
        ("mm millimeter millimetre", Fraction(1, 1000)),
        ("cm centimeter centimetre", Fraction(1, 100)),
        ("dm decimeter decimetre", Fraction(1, 10)),
        ("m meter metre", 1),
        ("km kilometer kilometre", 1000),
        ("in inch inches", Fraction(254, 10_000)),
        ("ft foot feet", Fraction(3048, 10_000)),
        ("yd yard", Fraction(9144, 10_000)),
        ("mi mile", Fraction(1_609_344, 1000)),
    ],
    "mass": [
        ("mg milligram", Fraction(1, 1000)),
        ("g gram", 1),
        ("kg kilogram", 1000),
        ("t ton tonne", 1_000_000),
        ("oz ounce", Fraction(28_349_523_125, 10**9)),
        ("lb lbs pound", Fraction(45_359_237, 10**5)),
    ],
    "time": [
        ("ms millisecond", Fraction(1, 1000)),
        ("s sec second", 1),
        ("min minute", 60),
        ("h hr hour", 3600),
        ("day", 86_400),
        ("week", 604_800),
    ],
    "volume": [("ml mL milliliter millilitre", 1), ("l L liter litre", 1000)],
    "money": [("cent ¢", 1), ("dollar", 100)],
}
_UNITS = {
    name: (kind, Fraction(factor))
    for kind, units in _BASE_UNITS.items()
    for names, factor in units
    for word in names.split()
    for name in (word, f"{word}s" if len(word) > 2 else word)
}
_UNIT = re.compile(
    r"^(?P<number>.*?[\d})])(?:\\[,;: ]|~|\s)*"
    r"(?:\\(?:text|mbox|mathrm|textrm|rm)\{\s*(?P<marked>[A-Za-z¢]+)\.?\s*(?P<inner>\^?[23])?\s*\}|(?P<plain>[A-Za-z¢]{2,})|(?<=\s)(?P<letter>[a-zA-Z]))"
    r"(?P<outer>\^\{?[23]\}?)?$"
)

_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def in_one_unit(reference: str, answer: str) -> tuple[str, str]:
    r"""Return both answers as numbers in the unit of the reference; as they are unless both have units of the same
    kind.

    Example::

        in_one_unit("5 cm", "50 mm")   # ("5", "(50)*\\frac{1}{10}")
        in_one_unit("5 cm", "50")      # ("5 cm", "50")
        in_one_unit("5 cm", "3 kg")    # ("5 cm", "3 kg")
    """
    expected, given = _split(reference), _split(answer)
    if expected is None or given is None or expected[1] != given[1]:
        return reference, answer
    factor = given[2] / expected[2]
    number = given[0] if factor == 1 else rf"({given[0]})*\frac{{{factor.numerator}}}{{{factor.denominator}}}"
    return expected[0], number


def _split(text: str) -> tuple[str, tuple[str, int], Fraction] | None:
    """The number, the kind of its unit with the power, and the unit's size."""
    match = _UNIT.match(text) if len(text) <= 200 else None
    if match is None or _WORD.search(match["number"]):
        return None
    name = match["marked"] or match["plain"] or match["letter"]
    unit = _UNITS.get(name) or _UNITS.get(name.lower() if len(name) > 2 else name)
    if unit is None:
        return None
    power = int(re.sub(r"\D", "", match["inner"] or match["outer"] or "1"))
    return match["number"].strip(), (unit[0], power), unit[1] ** power
