"""Where questions come from: the interface, and the reading of columns that all sources share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_specrl.answers import extract_answer
from lit_specrl.data.references import reference_text

OWN_COLUMNS = ("question", "messages", "answer", "columns")
"""Keys of a row that mean something to the library."""


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
    needs_answer: bool = True
    """Whether a missing answer column is an error; not where questions are only answered (`predict`)."""

    def download(self) -> None:
        """Fetch what `load` needs; called by one process per node, before any process calls `load`."""

    @abstractmethod
    def load(self) -> list[dict[str, Any]]:
        """Return the rows.

        Each has `question` (text) or `messages` (chat turns with `role` and `content`), `answer` (text or `None`), and
        any further columns, which reach reward functions through `PromptBatch.columns`. Further columns that are called
        like one of these stand in a dict `columns`; beside a `question`, `messages` is a further column.
        """


def read_rows(
    records: Iterable[dict[str, Any]],
    question: str,
    answer: str | None,
    answer_format: str | None,
    origin: str,
    columns: list[str] | dict[str, str] | None = None,
    needs_answer: bool = True,
) -> list[dict[str, Any]]:
    """Bring raw records into the form of `PromptSource.load`.

    Args:
        records: raw rows.
        question: column with the question as text, or as a list of chat messages. `a.b` reads field `b` of column `a`.
        answer: column with the reference answer; `None` when there is none.
        answer_format: how the reference is cut out of the answer column, as in `extract_answer`; `None` takes it whole.
        origin: what error messages call the data.
        columns: further columns to keep, by name, or by name with the name that rewards see; `None` keeps all.
        needs_answer: False lets the answer column, and further ones, be missing.

    Raises:
        ValueError: without rows, for a column that is not there, and for a row whose question or answer cannot be read.

    Example:
        >>> read_rows([{"problem": "2 + 3?", "solution": "#### 5", "level": 1}], "problem", "solution", "hash", "demo")
        [{'level': 1, 'question': '2 + 3?', 'answer': '5'}]
    """
    rows = []
    present: dict[str, None] = {}  # in their order
    for number, record in enumerate(records, start=1):
        where = f"{origin}, row {number}"
        present |= dict.fromkeys(record)
        further = _further_columns(record, {question, answer}, columns)
        row = {name: value for name, value in further.items() if name not in OWN_COLUMNS}
        taken = {name: value for name, value in further.items() if name in OWN_COLUMNS and name != "answer"}
        if taken:
            row["columns"] = taken
        prompt = _column(record, question, where)
        if not isinstance(prompt, str | list):
            raise ValueError(
                f"{where}: expected a question as text or chat messages in column {question!r}, got"
                f" {type(prompt).__name__}: {str(prompt)[:200]}"
            )
        if isinstance(prompt, str):
            row["question"] = prompt
        else:
            row["messages"] = [_without_nothing(turn) for turn in prompt]
        row["answer"] = None
        if answer is not None and (needs_answer or answer.split(".")[0] in record):
            row["answer"] = _reference(_column(record, answer, where), answer_format, where)
        rows.append(row)
    if not rows:
        raise ValueError(f"{origin} is empty; expected at least one row")
    missing = sorted(set(columns or []) - set(present))
    if missing and needs_answer:
        raise ValueError(f"{origin}: no columns {missing} to keep; columns present: {str(list(present))[:500]}")
    if answer != "answer" and "answer" in _further_columns(present, {question, answer}, columns):
        rank_zero_warn(
            f"{origin}: rewards do not see the column 'answer', because their `answer` is"
            + (f" the reference in {answer!r}" if answer else " empty (`answer: null`)")
            + "; to keep it under another name, name the further columns, such as `columns: {answer: given_answer}`."
        )
    return rows


def _without_nothing(turn: Any) -> Any:
    """A turn without the fields, and fields of its tool calls, that are there because other turns have them (Parquet):
    templates ask whether they are there."""
    if isinstance(turn, list):
        return [_without_nothing(entry) for entry in turn]
    if not isinstance(turn, dict):
        return turn
    return {
        name: _without_nothing(value)
        for name, value in turn.items()
        if value is not None or name in ("role", "content")
    }


def _further_columns(
    record: dict[str, Any], used: set[str | None], columns: list[str] | dict[str, str] | None
) -> dict[str, Any]:
    """The columns of a record that only rewards look at, under the names that they see."""
    if columns is None:
        return {name: value for name, value in record.items() if name not in used}
    names = columns if isinstance(columns, dict) else {name: name for name in columns}
    return {seen_as: record[name] for name, seen_as in names.items() if name in record}


def _column(record: dict[str, Any], name: str, where: str) -> Any:
    value: Any = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(
                f"{where}: no column {name!r}; columns present: {', '.join(map(repr, record))[:500]}."
                " Name the right ones with `question` and `answer` (`answer: null` when there is no reference)"
            )
        value = value[part]
    return value


def _reference(value: Any, answer_format: str | None, where: str) -> str | None:
    try:
        text = reference_text(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if text is None or answer_format is None:
        return text
    reference = extract_answer(text, answer_format)
    if reference is None:
        raise ValueError(
            f"{where}: no answer in format {answer_format!r} found in {text[-80:]!r};"
            " correct the row, or choose another `answer_format` (null takes the column whole)"
        )
    return reference
