"""How many answers a second MathReward decides."""

from __future__ import annotations

import time

import torch

from lit_specrl.bench.report import Report, describe_hardware
from lit_specrl.data import FileSource
from lit_specrl.rewards import MathReward


def bench_math_reward(
    path: str,
    question: str = "question",
    answer: str = "answer",
    answer_format: str | None = None,
    num_workers: int = 2,
) -> Report:
    """Answers that `MathReward` decides in a second, on the references of your own data.

    Three answers are given to every question: its reference, which is decided by comparing texts; the reference in
    parentheses, which is not (a few, such as sets, are no longer right in parentheses); and the reference of the next
    question. The first call also starts the worker processes and is left out.

    Args:
        path: file with questions and references, as for `FileSource`.
        question: column with the question.
        answer: column with the reference.
        answer_format: how the reference is cut out of that column.
        num_workers: processes that check answers.
    """
    rows = FileSource(path, question, answer, answer_format).load()
    references = [row["answer"] for row in rows if row["answer"] is not None]
    if len(references) < 2:
        raise ValueError(f"{path} has {len(references)} references; at least 2 are needed")
    given = {
        "reference": references,
        "reference in parentheses": [f"\\left({reference}\\right)" for reference in references],
        "reference of the next question": references[1:] + references[:1],
    }
    reward = MathReward(num_workers=num_workers)
    table = []
    try:
        reward([""], ["\\boxed{\\frac{1}{2}}"], answer=["0.5"])  # starts the processes
        for name, answers in given.items():
            started_at = time.perf_counter()
            scores = reward([""] * len(answers), [f"\\boxed{{{text}}}" for text in answers], answer=references)
            elapsed_s = time.perf_counter() - started_at
            table.append(
                {
                    "answers": name,
                    "number": len(answers),
                    "seconds": elapsed_s,
                    "answers_per_second": len(answers) / elapsed_s,
                    "right": sum(score == 1.0 for score in scores),
                    "not_scored": scores.count(None),
                    **{
                        counter: count
                        for counter, count in reward.counters.items()
                        if counter in ("timeouts", "crashes")
                    },
                }
            )
    finally:
        reward.close()
    return Report(
        hardware=describe_hardware("cpu"),
        torch_version=torch.__version__,
        settings={"benchmark": "math-reward", "path": path, "num_workers": num_workers},
        tables={"measured": table},
    )
