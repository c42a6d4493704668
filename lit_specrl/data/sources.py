"""Where questions come from: the interface, and the reading of columns that all sources share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from lit_specrl.rewards.answers import extract_answer


class PromptSource(ABC):
    """A named collection of questions with reference answers.

    A subclass sets `name` and returns its rows from `load`. Results are reported under the name.

    Example::

        class Capitals(PromptSource):
            name = "capitals"

            def load(self):
                return [{"question": "Capital of France?", "answer": "Paris", "continent": "Europe"}]
    """

    name: str

    def download(self) -> None:
        """Fetch what `load` needs; called by one process per node, before any process calls `load`."""

    @abstractmethod
    def load(self) -> list[dict[str, Any]]:
        """Return the rows.

        Each has `question` (text) or `messages` (chat turns with `role` and `content`), `answer` (text or `None`), and any
        further columns, which reach reward functions through `PromptBatch.columns`.
        """


def read_rows(
    records: Iterable[dict[str, Any]],
    question: str,
    answer: str | None,
    answer_format: str | None,
    origin: str,
) -> list[dict[str, Any]]:
    """Rename the columns of raw records to those of `PromptSource.load`.

    Args:
        records: raw rows.
        question: column with the question as text, or as a list of chat messages. `a.b` reads field `b` of column `a`.
        answer: column with the reference answer; `None` when there is none.
        answer_format: how the reference is cut out of the answer column, as in `extract_answer`; `None` takes it whole.
        origin: what error messages call the data.

    Raises:
        ValueError: without rows, and for a row that lacks a column or whose answer cannot be read.

    Example:
        >>> read_rows([{"problem": "2 + 3?", "solution": "#### 5", "level": 1}], "problem", "solution", "hash", "demo")
        [{'level': 1, 'question': '2 + 3?', 'answer': '5'}]
    """
    rows = []
    for number, record in enumerate(records, start=1):
        where = f"{origin}, row {number}"
        prompt = _column(record, question, where)
        row = {name: value for name, value in record.items() if name not in (question, answer)}
        row["question" if isinstance(prompt, str) else "messages"] = prompt
        row["answer"] = None if answer is None else _reference(_column(record, answer, where), answer_format, where)
        rows.append(row)
    if not rows:
        raise ValueError(f"{origin} is empty; expected at least one row")
    return rows


def _column(record: dict[str, Any], name: str, where: str) -> Any:
    value: Any = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(
                f"{where}: no column {name!r}; columns present: {', '.join(map(repr, record))}."
                " Name the right ones with `question` and `answer` (`answer: null` when there is no reference)"
            )
        value = value[part]
    return value


def _reference(value: Any, answer_format: str | None, where: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where}: the answer must be text or a number, got {type(value).__name__}: {value!r}")
    if answer_format is None:
        return str(value)
    reference = extract_answer(str(value), answer_format)
    if reference is None:
        raise ValueError(
            f"{where}: no answer in format {answer_format!r} found in {str(value)[-80:]!r};"
            " correct the row, or choose another `answer_format` (null takes the column whole)"
        )
    return reference
