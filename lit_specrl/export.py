"""From a checkpoint to a folder that transformers and vLLM load."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_specrl.policy import unreachable_model_message

_PREFIX = "policy.model."


def export_checkpoint(
    checkpoint: str, folder: str, model: str | None = None, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Write the policy of a checkpoint, with its tokenizer, as a HuggingFace folder.

    Args:
        checkpoint: a `.ckpt` file of `lit-specrl fit`.
        folder: where the model goes; must not exist. It appears when it is complete.
        model: hub name or folder that the run started from, for architecture and tokenizer; by default as in the checkpoint.
        dtype: of the written weights.

    Raises:
        ValueError: no such checkpoint, not one of this library, an existing folder, or weights of another architecture.
    """
    source, target = Path(checkpoint), Path(folder)
    if target.exists():
        raise ValueError(f"{target} exists already; export into a new folder")
    state, model = _read(source, model)
    try:
        policy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise ValueError(unreachable_model_message(model)) from error
    with suppress(OSError):  # many base models come without a generation config
        policy.generation_config = GenerationConfig.from_pretrained(model)
    try:
        policy.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights of {source} do not fit the architecture of {model}: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name + ".partial-"))
    try:
        policy.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _read(source: Path, model: str | None) -> tuple[dict[str, torch.Tensor], str]:
    if source.is_dir():
        raise ValueError(
            f"{source} is a folder, as sharded training writes it; make one file of it first: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {source}"
        )
    if not source.is_file():
        raise ValueError(f"there is no checkpoint at {source}")
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source} is not a checkpoint of Lightning: {error}") from error
    state = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in content.get("state_dict", {}).items()
        if name.startswith(_PREFIX)
    }
    if not state:
        raise ValueError(f"{source} holds no policy of this library (no weights called {_PREFIX}*)")
    return state, model or content["rlvr"]["model"]


def export_command(arguments: list[str]) -> None:
    """`lit-specrl export CHECKPOINT FOLDER [--model ...] [--dtype ...]`."""
    try:
        print(auto_cli(export_checkpoint, args=arguments, prog="lit-specrl export"))
    except ValueError as error:
        raise SystemExit(f"lit-specrl export: {error}") from error
