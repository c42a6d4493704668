"""Questions from the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from lit_specrl.data.sources import PromptSource, read_rows


class HubSource(PromptSource):
    """Questions from a dataset of the Hugging Face hub, or from a local folder that `datasets` can read.

    Args:
        path: the dataset, such as `openai/gsm8k`.
        config_name: the dataset's configuration, where it has several.
        split: which split to read.
        question: column with the question, as text or as chat messages. `a.b` reads field `b` of column `a`.
        answer: column with the reference answer; `None` when there is none.
        answer_format: how the reference is cut out of the answer column, a format of `extract_answer` such as `boxed`,
            `hash`, `number` or a regular expression with one group; `None` takes the column whole.
        columns: further columns to keep for reward functions, as a list, or as a dict from their name to the one that
            rewards see, such as `{"source": "origin"}`; `None` keeps all. Long worked solutions cost memory.
        revision: branch, tag or commit of the dataset; the newest by default.
        name: what results are reported under; the last part of `path` by default.
        limit: use the first `limit` rows only.

    Raises:
        ValueError: from `load`, when the hub cannot be reached, the dataset or split does not exist, or a column is
            missing.

    Example::

        HubSource("openai/gsm8k", "main", split="test", answer_format="hash")
    """

    def __init__(
        self,
        path: str,
        config_name: str | None = None,
        split: str = "train",
        question: str = "question",
        answer: str | None = "answer",
        answer_format: str | None = None,
        columns: list[str] | dict[str, str] | None = None,
        revision: str | None = None,
        name: str | None = None,
        limit: int | None = None,
    ) -> None:
        self.path = path
        self.config_name = config_name
        self.split = split
        self.question = question
        self.answer = answer
        self.answer_format = answer_format
        self.columns = columns
        self.revision = revision
        self.name = name or path.rstrip("/").rsplit("/", 1)[-1]
        self.limit = limit

    def download(self) -> None:
        self._dataset()

    def load(self) -> list[dict[str, Any]]:
        dataset = self._dataset()
        if self.columns is not None:
            wanted = [self.question.split(".")[0], (self.answer or "").split(".")[0], *self.columns]
            if set(self.columns) <= set(dataset.column_names):  # otherwise `read_rows` says what is missing
                dataset = dataset.select_columns([name for name in dataset.column_names if name in wanted])
        if self.limit is not None:
            dataset = dataset.select(range(min(self.limit, len(dataset))))
        return read_rows(
            dataset,
            self.question,
            self.answer,
            self.answer_format,
            f"dataset {self.path!r}",
            self.columns,
            self.needs_answer,
        )

    def _dataset(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.path, self.config_name, split=self.split, revision=self.revision)
        except ConnectionError as error:
            raise ValueError(
                f"dataset {self.path!r} is not in the local cache and the hub cannot be reached ({error}). Download it "
                "where there is a connection and copy the cache (HF_HOME), set HF_ENDPOINT to a reachable mirror, or "
                "point a FileSource at a local file"
            ) from error
        except (FileNotFoundError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"dataset {self.path!r} (config_name={self.config_name!r}, split={self.split!r}) cannot be loaded: "
                f"{error}"
            ) from error
