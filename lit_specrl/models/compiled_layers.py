"""Decoder layers that are compiled, where that pays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MOST_VARIANTS = 64  # torch gives up at 8, and runs the code as it is written


def compile_layers(backbone: Any) -> None:
    """Compile each decoder layer in place, for passes over given tokens; names of weights stay what they are.

    All layers are one piece of code, and shapes are variables of it. It is compiled anew for one row and for several,
    with padding and without, with gradient and without, of policy, reference and critic: some ten times in a run,
    however many layers and micro-batches that has. Passes that keep keys and values belong into `uncompiled`.

    Args:
        backbone: a transformers model without a head.
    """
    for layer in backbone.layers:
        layer.compile(dynamic=True, recompile_limit=_MOST_VARIANTS)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled layers run as they are written: a cache that grows would make them compile again and again."""
    with torch.compiler.set_stance("force_eager"):
        yield
