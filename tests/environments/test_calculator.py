import pytest

from lit_specrl import CalculatorEnvironment, Observation


@pytest.mark.parametrize(
    ("said", "result"),
    [
        ("calc: 12 + 6 * 3", "30"),
        ("First calc: 1\ncalc: (2 + 3) / 4", "1.25"),
        ("calc: 1 / 3", "0.333333"),
        ("calc: two", "not a number"),
        ("calc: 1 / 0", "not a number"),
        ("calc: 9 ^ 9 ^ 9", "not a number"),
        ("calc: 10 ^ 5000", "not a number"),
        ("calc: 2000!", "not a number"),
        ("calc: 10 ^ 400 / 3", "not a number"),
        ("calc: -10 ^ 100", "not a number"),
        ("calc: 10 ^ 99", "1" + "0" * 99),
        ("calc: 1 / 10 ^ 400", "0"),
        ("calc: " + "(" * 5000, "not a number"),
    ],
)
def test_the_last_call_of_a_turn_is_computed(said, result):
    assert CalculatorEnvironment().step(said) == Observation(result)


def test_a_turn_without_a_call_is_the_last():
    assert CalculatorEnvironment().step("Answer: 30") is None
    assert CalculatorEnvironment(r"<(.*)>", error="?", role="tool").step("<x>") == Observation("?", role="tool")
    assert CalculatorEnvironment(r"^calc: (.*)$").step("so calc: 1") is None


def test_a_pattern_needs_a_group():
    with pytest.raises(ValueError, match="pattern must have a group around what to compute, such as"):
        CalculatorEnvironment("calc:.*")
    with pytest.raises(ValueError, match=r"pattern must be a regular expression, got '\('"):
        CalculatorEnvironment("(")
