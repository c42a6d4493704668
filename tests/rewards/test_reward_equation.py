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


def test_a_number_of_equations_is_needed():
    with pytest.raises(ValueError, match="num_equations must be at least 1, got 0"):
        EquationReward(0)
