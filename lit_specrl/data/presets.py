"""Short names for well-known data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse.typing import register_type

from lit_specrl.data.files import READERS, FileSource, file_suffix
from lit_specrl.data.hub import HubSource
from lit_specrl.data.sources import PromptSource

PRESETS: dict[str, PromptSource] = {
    "deepmath": HubSource(
        "zwhe99/DeepMath-103K", answer="final_answer", columns=["difficulty", "topic"], name="deepmath"
    ),
    "gsm8k": HubSource("openai/gsm8k", "main", answer_format="hash", name="gsm8k"),
    "gsm8k_test": HubSource("openai/gsm8k", "main", split="test", answer_format="hash", name="gsm8k_test"),
    "math500": HubSource(
        "HuggingFaceH4/MATH-500", split="test", question="problem", columns=["subject", "level"], name="math500"
    ),
    "dapo_math": HubSource(
        "open-r1/DAPO-Math-17k-Processed", "en", question="prompt", answer="solution", columns=[], name="dapo_math"
    ),
}


class DataName(str):
    """The name of a preset or the path of a file, as the command line takes it.

    jsonargparse reads a string in place of an object as the name of a class (for `train.jsonl` it would import `train`)
    and the file of that name as configuration. It tries the types of a setting in their order, so this one stands
    first; a type that is a path (`__fspath__`) keeps it from opening the file.

    Raises:
        ValueError: for anything else, which may be the name of a class.
    """

    def __new__(cls, text: Any) -> DataName:
        if not isinstance(text, str) or not (text in PRESETS or file_suffix(text) in READERS or Path(text).is_file()):
            raise ValueError(f"expected the name of a preset or the path of a file, got {text!r}")
        return super().__new__(cls, text)

    def __fspath__(self) -> str:
        return str(self)


register_type(DataName, serializer=lambda value: str(DataName(value)), deserializer=DataName)  # of nothing else


def resolve_source(source: PromptSource | str) -> PromptSource:
    """Turn a preset's name or a file's path into a source; a source comes back as it is.

    Raises:
        TypeError: for something else.
        ValueError: for a name that is neither; the message lists the presets.

    Example:
        >>> resolve_source("train.jsonl").name
        'train'
    """
    if isinstance(source, PromptSource):
        return source
    if not isinstance(source, str):
        raise TypeError(
            f"data must be the name of a preset, the path of a file or a source, got {type(source).__name__}; rows in "
            "memory and a Dataset go into RowsSource(...)"
        )
    if source in PRESETS:
        return PRESETS[source]
    if file_suffix(source) in READERS or Path(source).is_dir():
        return FileSource(source)
    raise ValueError(
        f"unknown data {str(source)!r}; expected one of the presets {', '.join(PRESETS)}, a path ending in"
        f" {', '.join(READERS)}, or a source such as FileSource(...) or HubSource(...)"
    )
