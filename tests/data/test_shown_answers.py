import pytest

from lit_specrl.data.shown_answers import shows_answer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("turns", "answer"),
    [
        ([user(r"2+3? It is \boxed{5}.")], "5"),
        ([user(r"2+3? It is \boxed{5}. Put your answer within \boxed{}.")], "5"),
        ([user(r"One half? \boxed{\dfrac{1}{2}}")], r"\frac{1}{2}"),
        ([user("2+3?\n2 and 3 make 5.\n#### 5")], "5"),
        ([user("A thousand?\n#### 1,000")], "1000"),
        ([user("2+3?\nThe answer is 5.")], "5"),
        ([user("Capital of France?\nAnswer: Paris")], "paris"),
        ([user("2+3?\nSolution: 2 and 3 make 5.")], "5"),
        ([user("2+3?"), assistant("2 and 3 make 5.")], "5"),
        ([user("2+3?"), assistant("5")], "5"),
        ([user("Point?"), assistant("That is $(0, 3)$.")], "(0,3)"),
        ([user("2+3?"), assistant(r"It is \boxed{5}."), assistant("Next")], "5"),
        (
            [user("2+3?"), assistant(r"It is \boxed{5}.")],
            r"2 + 3 = 5, so \boxed{5}",
        ),  # the worked solution as reference
        ([user("x?"), {"role": "tool", "content": "#### 5"}], "5"),
    ],
)
def test_answers_that_are_given_are_found(turns, answer):
    assert shows_answer(turns, answer)


@pytest.mark.parametrize(
    ("turns", "answer"),
    [
        ([user("5 apples and 0 pears. How many are there?")], "5"),
        ([user("What is the remainder when 55 is divided by 5")], "5"),
        ([user("Is it odd? Answer yes or no")], "no"),
        ([user("Capital of Italy?\nA. Paris\nB. Rome")], "Rome"),
        ([user(r"2+3? Put your answer within \boxed{}.")], "5"),
        ([user(r"2+3? Write \boxed{7} if it is 7.")], "5"),
        ([user("2+3?\nAnswer:")], "5"),
        ([user("2+3?"), assistant("Let me think")], "5"),
        ([user("2+3?"), assistant("The answer is")], "5"),
        ([user("2+3?"), assistant("I get 15")], "5"),
        ([user("1+4?"), assistant(r"\boxed{5}"), user("2+3?")], "5"),  # a solved example
        ([{"role": "system", "content": "The answer is 5"}, user("2+3?")], "5"),
        ([user(r"\boxed{}")], ""),
        ([user("2+3? It is \\boxed{5}.")], None),
    ],
)
def test_questions_that_merely_hold_the_answer_are_not_suspected(turns, answer):
    assert not shows_answer(turns, answer)


WORD_PROBLEMS = [
    ("Ann has 3 apples and buys 2. She had 5 pears. How many apples has she?", "Ann has 3 + 2 = 5.\n#### 5", "5"),
    (r"If $x = 3$, find $x^2 + 1 = \_$.", r"$3^2 + 1 = 10$, so the answer is $\boxed{10}$.", "10"),
]


@pytest.mark.parametrize(("question", "solution", "answer"), WORD_PROBLEMS)
def test_the_solution_makes_the_difference(question, solution, answer):
    assert not shows_answer([user(question)], answer)
    assert shows_answer([user(f"{question}\n{solution}")], answer)
    assert shows_answer([user(question), assistant(solution)], answer)


@pytest.mark.parametrize("text", ["\n", "answer ", "answer: ", r"\boxed{", "####", "$", "= ", "Solution:\n"])
def test_odd_texts_take_no_time_to_speak_of(text):
    assert not shows_answer([user(text * 20_000)], "5")
    assert not shows_answer([user("2+3?"), assistant(text * 20_000)], "5")
