"""Attention masks made without asking the device what is padded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

_NAME = "sdpa"


@contextmanager
def known_padding(is_padded: bool) -> Iterator[None]:
    """Inside, models with "sdpa" attention are told whether the mask that they are given has padding.

    transformers 5.19 looks at the mask itself: without padding it needs none, and SDPA takes a faster kernel. On a GPU
    the host then waits, in every pass, for all that was asked of the device before. The masks are the same either way.

    Args:
        is_padded: whether any entry of the attention mask is False.
    """
    before = ALL_MASK_ATTENTION_FUNCTIONS[_NAME]

    def mask(*arguments: Any, **options: Any) -> Tensor | None:
        known = {"allow_is_causal_skip": False} if is_padded else {"attention_mask": None}
        return sdpa_mask(*arguments, **options | known)

    ALL_MASK_ATTENTION_FUNCTIONS[_NAME] = mask
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS[_NAME] = before
