"""Questions from a local file."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lit_specrl.data.sources import PromptSource, read_rows


class FileSource(PromptSource):
    """Questions from a local `.jsonl`, `.json` (a list of objects), `.csv` or `.parquet` file.

    Text files are read as UTF-8, also where they end in `.gz`. A `.csv` file has the names of its columns in the first
    line.

    Args:
        path: the file; the extension decides how it is read.
        question: column with the question, as text or as chat messages. `a.b` reads field `b` of column `a`.
        answer: column with the reference answer; `None` when there is none.
        answer_format: how the reference is cut out of the answer column, a format of `extract_answer` such as `boxed`,
            `hash`, `number` or a regular expression with one group; `None` takes the column whole.
        name: what results are reported under; the file's stem by default.
        limit: use the first `limit` rows only.
        columns: further columns to keep for reward functions, as a list, or as a dict from their name to the one that
            rewards see, such as `{"source": "origin"}`; `None` keeps all.

    Raises:
        ValueError: from `load`, for a missing, empty or damaged file, an unknown extension, a line that is not JSON or
            a column that is not there.

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
        columns: list[str] | dict[str, str] | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.question = question
        self.answer = answer
        self.answer_format = answer_format
        self.name = name or self.path.name.removesuffix(".gz").rsplit(".", 1)[0]
        self.limit = limit
        self.columns = columns

    def load(self) -> list[dict[str, Any]]:
        if self.path.is_dir():
            raise ValueError(
                f"{self.path} is a folder; expected a file ending in {', '.join(READERS)}. `HubSource` reads a folder "
                "whole"
            )
        suffix = file_suffix(self.path)
        if suffix not in READERS:
            raise ValueError(
                f"{self.path}: expected a file ending in {', '.join(READERS)}, got {self.path.suffix!r};"
                " convert it into one of these"
            )
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file (looked in {Path.cwd()}); check `path`")
        records = READERS[suffix](self.path)[: self.limit]
        return read_rows(
            records, self.question, self.answer, self.answer_format, str(self.path), self.columns, self.needs_answer
        )


def file_suffix(path: str | Path) -> str:
    """The ending that tells a file's format, in small letters and without `.gz`.

    Example:
        >>> file_suffix("rows.JSONL.gz")
        '.jsonl'
    """
    name = Path(path).name.lower()
    return Path(name.removesuffix(".gz")).suffix if not name.endswith(".parquet.gz") else ".gz"


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    with _text(path) as lines:
        return [_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]


def _read_json(path: Path) -> list[dict[str, Any]]:
    with _text(path) as file:
        text = file.read()
    if not text.strip():
        return []
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); one object per line belongs into a .jsonl file") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(
            f"{path}: expected a list of JSON objects, got {text.strip()[:80]!r}; put the objects between [ and ], or "
            "write one object per line (.jsonl)"
        )
    return records


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default ends at 128 KB, which a worked solution may exceed
    with _text(path) as lines:
        table = csv.reader(lines, strict=True)
        try:
            names = next(table, [])
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"{path}: the first line names several columns {repeated}; give each its own name")
            records = []
            for cells in filter(None, table):
                if len(cells) != len(names):
                    raise ValueError(
                        f"{path}, line {table.line_num}: expected {len(names)} cells, as many as the first line names "
                        f"columns ({', '.join(names)[:200]}), got {len(cells)}; put cells that hold a comma between "
                        "quotes"
                    )
                records.append(dict(zip(names, cells, strict=True)))
        except csv.Error as error:
            raise ValueError(f"{path}, line {table.line_num}: not valid CSV ({error})") from error
    return records


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    if not path.stat().st_size:
        return []
    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a Parquet file, or a damaged one ({' '.join(str(error).split())}); copy or download it once "
            "more"
        ) from error


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """Open a text file, with or without a byte-order mark; failures to read it name the file."""
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix.lower() == ".gz"
            else path.open(encoding="utf-8-sig", newline="") as file
        ):
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 ({error}); convert it with `iconv -t utf-8`") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; check its permissions, or copy it once more") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        remedy = "; a list over several lines belongs into a .json file" if line.strip() == "[" else ""
        raise ValueError(f"{where}: not valid JSON ({error}): {line.strip()[:80]!r}{remedy}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object with named columns, got {line.strip()[:80]!r}")
    return record


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
