"""Short names for well-known data sets."""

from __future__ import annotations

from pathlib import Path

from lit_specrl.data.files import READERS, FileSource
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


def resolve_source(source: PromptSource | str) -> PromptSource:
    """Turn a preset's name or a file's path into a source; a source comes back as it is.

    Raises:
        ValueError: for a name that is neither; the message lists the presets.

    Example:
        >>> resolve_source("train.jsonl").name
        'train'
    """
    if isinstance(source, PromptSource):
        return source
    if source in PRESETS:
        return PRESETS[source]
    if Path(source).suffix in READERS:
        return FileSource(source)
    raise ValueError(
        f"unknown data {source!r}; expected one of the presets {', '.join(PRESETS)}, a path ending in"
        f" {', '.join(READERS)}, or a source such as FileSource(...) or HubSource(...)"
    )
