import pytest

from lit_specrl.rewards import EquationReward


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("1 + 2 = 3. 3 + 4 = 7. Answer: 7", 1.0),
        ("1+2=3, then 3+4=8", 0.5),
        ("1 + 2 = 3.", 0.5),
        ("1 + 2 = 3. 1 + 2 = 3. 1 + 2 = 3. 1 + 2 = 3.", 0.25),
        ("1 + 2 = 3. 3 + 4 = 7. 7 + 1 = 8. 8 + 1 = 0.", 0.75),
        ("12 + 30 = 42. 42 + 1 = 43", 1.0),
        ("", 0.0),
        ("1 + 2 = ", 0.0),
    ],
)
def test_score_is_the_share_of_equations_that_hold(text, score):
    assert EquationReward(num_equations=2)([""], [text]) == [score]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("1 + 2 = " + "3" * 4301, 0.0),
        ("9" * 5000 + " + 1 = 1" + "0" * 5000, 1.0),
        ("9" * 5000 + " + 1 = 1" + "0" * 4999, 0.0),
        ("1" * 200_000, 0.0),
        ("007 + 1 = 8", 1.0),
    ],
)
def test_numbers_may_have_any_length(text, score):
    assert EquationReward(num_equations=1)([""], [text]) == [score]


def test_leading_zeros_make_no_new_equation():
    assert EquationReward(2)([""], ["1 + 2 = 3. 01 + 2 = 3. 001 + 02 = 03."]) == [1 / 3]


def test_a_number_of_equations_is_needed():
    with pytest.raises(ValueError, match="num_equations must be at least 1, got 0"):
        EquationReward(0)
