"""Questions from a local file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_specrl.data.sources import PromptSource, read_rows


class FileSource(PromptSource):
    """Questions from a local `.jsonl`, `.json` (a list of objects) or `.parquet` file.

    Args:
        path: the file; the extension decides how it is read.
        question: column with the question, as text or as chat messages. `a.b` reads field `b` of column `a`.
        answer: column with the reference answer; `None` when there is none.
        answer_format: how the reference is cut out of the answer column, a format of `extract_answer` such as `boxed`,
            `hash`, `number` or a regular expression with one group; `None` takes the column whole.
        name: what results are reported under; the file's stem by default.
        limit: use the first `limit` rows only.

    Raises:
        ValueError: from `load`, for a missing or empty file, an unknown extension, a line that is not JSON or a column
            that is not there.

    Example::

        FileSource("gsm8k_train.jsonl", answer_format="hash", name="gsm8k")
        FileSource("verl_train.parquet", question="prompt", answer="reward_model.ground_truth")
    """

    def __init__(
        self,
        path: str,
        question: str = "question",
        answer: str | None = "answer",
        answer_format: str | None = None,
        name: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.question = question
        self.answer = answer
        self.answer_format = answer_format
        self.name = name or self.path.stem
        self.limit = limit

    def load(self) -> list[dict[str, Any]]:
        if self.path.suffix not in READERS:
            raise ValueError(f"{self.path}: expected a file ending in {', '.join(READERS)}, got {self.path.suffix!r}")
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file (looked in {Path.cwd()}); check `path`")
        records = READERS[self.path.suffix](self.path)[: self.limit]
        return read_rows(records, self.question, self.answer, self.answer_format, origin=str(self.path))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); one object per line belongs into a .jsonl file") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(
            f"{path}: expected a list of JSON objects; for other layouts write one object per line (.jsonl)"
        )
    return records


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error}): {line.strip()[:80]!r}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object with named columns, got {line.strip()[:80]!r}")
    return record


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
