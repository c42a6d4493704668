import json

import pytest

from lit_specrl.bench.math_reward import bench_math_reward


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    references = ["1/2", "x + 1", "\\frac{3}{4}", None]
    path.write_text("".join(json.dumps({"question": "?", "answer": reference}) + "\n" for reference in references))
    return str(path)


def test_references_are_right_and_those_of_the_next_question_wrong(data_file):
    (rows,) = bench_math_reward(data_file, num_workers=1).tables.values()
    assert [(row["answers"], row["number"], row["right"]) for row in rows] == [
        ("reference", 3, 3),
        ("reference in parentheses", 3, 3),
        ("reference of the next question", 3, 0),
    ]
    assert all(row["answers_per_second"] == row["number"] / row["seconds"] for row in rows)


def test_references_are_needed(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "?", "answer": "1"}) + "\n")
    with pytest.raises(ValueError, match="has 1 references; at least 2 are needed"):
        bench_math_reward(str(path))
