"""What rewards see of a prompt beside its text and its answer, as a short digest."""

from __future__ import annotations

from typing import Any

import xxhash

from lit_specrl.types import PromptBatch


def data_digest(prompts: PromptBatch, index: int) -> str:
    """Hash of the source and the further columns of a prompt; prompt and answer are in its uid.

    The same in every process for plain data. An object that shows no more than its address is another one in each.

    Args:
        prompts: [B] prompts.
        index: of one of them.

    Example:
        >>> first, second = (PromptBatch(["a"], [[5]], [""], [None], ["code"], [{"tests": n}]) for n in (1, 2))
        >>> data_digest(first, 0) == data_digest(first, 0), data_digest(first, 0) == data_digest(second, 0)
        (True, False)
    """
    columns = sorted(prompts.columns[index].items()) if prompts.columns else []
    shown = repr((prompts.sources[index], [(name, _plain(value)) for name, value in columns]))
    return xxhash.xxh3_64_hexdigest(shown.encode(errors="backslashreplace"))


def _plain(value: Any) -> Any:
    """Arrays as lists: the text of a long one leaves its middle out."""
    return value.tolist() if hasattr(value, "tolist") else value
