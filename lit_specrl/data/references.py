"""Reference answers as text, whatever a data set holds them as."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any


def reference_text(value: Any) -> str | None:
    """Return a cell as the text of a reference answer; `None` for a cell without one: null, NaN or blank text.

    A whole number reads the same as an integer and as a float, which is what a column of integers with gaps becomes in
    pandas and Parquet. Numbers are written out without an exponent, truth values as `True` and `False`.

    Raises:
        ValueError: for infinity, and for anything but text and numbers.

    Example:
        >>> [reference_text(value) for value in ("x = 5 ", 5, 5.0, 1e-05, float("nan"), "", None)]
        ['x = 5 ', '5', '5', '0.00001', None, None, None]
    """
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        digits = format(Decimal(str(value)), "f")  # by way of the shortest text of a float, not its binary expansion
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        return "0" if digits == "-0" else digits
    raise ValueError(f"the answer must be text or a number, got {type(value).__name__}: {str(value)[:200]}")
