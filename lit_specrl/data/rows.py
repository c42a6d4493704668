"""Questions that are in memory already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from lit_specrl.data.sources import PromptSource, read_rows


class RowsSource(PromptSource):
    """Questions from a list of rows, a `datasets.Dataset`, or anything else that gives mappings when it is iterated.

    Args:
        rows: each with its columns; a generator would be empty the second time.
        question: column with the question, as text or as chat messages. `a.b` reads field `b` of column `a`.
        answer: column with the reference answer; `None` when there is none.
        answer_format: how the reference is cut out of the answer column, as in `FileSource`; `None` takes it whole.
        name: what results are reported under.
        limit: use the first `limit` rows only.
        columns: further columns to keep for reward functions, as in `FileSource`; `None` keeps all.

    Raises:
        TypeError: `rows` is no such thing.
        ValueError: from `load`, for a column that is not there.

    Example:
        >>> RowsSource([{"prompt": "2 + 3?", "answer": 5, "level": 1}], question="prompt").load()
        [{'level': 1, 'question': '2 + 3?', 'answer': '5'}]
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        question: str = "question",
        answer: str | None = "answer",
        answer_format: str | None = None,
        name: str = "rows",
        limit: int | None = None,
        columns: list[str] | dict[str, str] | None = None,
    ) -> None:
        if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable) or iter(rows) is rows:
            hint = "; take one split of it" if isinstance(rows, Mapping) else ""
            raise TypeError(f"rows must be a list of mappings or a Dataset, got {type(rows).__name__}{hint}")
        self.rows, self.question, self.answer = rows, question, answer
        self.answer_format, self.name, self.limit, self.columns = answer_format, name, limit, columns

    def load(self) -> list[dict[str, Any]]:
        records = map(dict, islice(self.rows, self.limit))
        return read_rows(
            records, self.question, self.answer, self.answer_format, self.name, self.columns, self.needs_answer
        )
