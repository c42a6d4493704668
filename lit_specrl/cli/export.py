"""`lit-specrl export`: from a checkpoint to a folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def export_checkpoint(
    checkpoint: str,
    folder: str,
    model: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    adapter_only: bool = False,
    drafter: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the policy of a checkpoint, with its tokenizer, as a HuggingFace folder.

    Args:
        checkpoint: a `.ckpt` of `lit-specrl fit`: a file, or the folder that sharded training writes.
        folder: where the model goes; must not exist. It appears when it is complete.
        model: hub name or folder that the run started from, for architecture and tokenizer; by default as in the
            checkpoint.
        dtype: of the written weights.
        adapter_only: of a run with `lora`, write the adapters for peft instead of the model that they are merged into.
        drafter: a folder for the drafter that `DrafterDistillation` has trained, as `Eagle3Drafter` or `DraftModel` and
            vLLM load it; must not exist either. `None` leaves it out.
        trust_remote_code: run the modelling code that the model brings along, as the run did; not taken from the
            checkpoint, which may be somebody else's.

    Raises:
        ImportError: the run had `lora`, and peft is missing.
        ValueError: no such checkpoint, not one of this library, an existing folder, or weights of another architecture.
    """
    from lit_specrl.cli.exported_policy import write_policy  # imports torch, which the help need not wait for

    return write_policy(checkpoint, folder, model, dtype, adapter_only, drafter, trust_remote_code)
