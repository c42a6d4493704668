from decimal import Decimal

import pytest

from lit_specrl.data.references import reference_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("5", "5"),
        ("x = 5 ", "x = 5 "),
        ("nan", "nan"),  # what somebody wrote
        ("", None),
        (" \n", None),
        (None, None),
        (float("nan"), None),
        (Decimal("NaN"), None),
        (5, "5"),
        (10**20, "100000000000000000000"),
        (5.0, "5"),  # an integer in a column with gaps
        (-0.0, "0"),
        (100.0, "100"),
        (0.1, "0.1"),
        (-2.50, "-2.5"),
        (1e-05, "0.00001"),
        (1e22, "10000000000000000000000"),
        (Decimal("5.00"), "5"),
        (Decimal("12345678901234567890123456789.5"), "12345678901234567890123456789.5"),
        (True, "True"),
        (False, "False"),
    ],
)
def test_cells_become_the_text_of_an_answer(value, text):
    assert reference_text(value) == text


@pytest.mark.parametrize("value", [float("inf"), [5], {"value": 5}, b"5"])
def test_other_cells_are_refused(value):
    with pytest.raises(ValueError, match=f"must be text or a number, got {type(value).__name__}: "):
        reference_text(value)


def test_the_message_about_a_long_cell_is_short():
    with pytest.raises(ValueError, match="got list") as refusal:
        reference_text(["word"] * 10_000)
    assert len(str(refusal.value)) < 300
