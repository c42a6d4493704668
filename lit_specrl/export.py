"""From a checkpoint to a folder that transformers and vLLM load."""

from __future__ import annotations

import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from lit_specrl.lora import adapted_layers, add_adapters, lora_config
from lit_specrl.policy import Policy, unreachable_model_message
from lit_specrl.whole_folder import whole_folder

_PREFIX = "policy.model."


def export_checkpoint(
    checkpoint: str,
    folder: str,
    model: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    adapter_only: bool = False,
) -> Path:
    """Write the policy of a checkpoint, with its tokenizer, as a HuggingFace folder.

    Args:
        checkpoint: a `.ckpt` file of `lit-specrl fit`.
        folder: where the model goes; must not exist. It appears when it is complete.
        model: hub name or folder that the run started from, for architecture and tokenizer; by default as in the checkpoint.
        dtype: of the written weights.
        adapter_only: of a run with `lora`, write the adapters for peft instead of the model that they are merged into.

    Raises:
        ImportError: the run had `lora`, and peft is missing.
        ValueError: no such checkpoint, not one of this library, an existing folder, or weights of another architecture.
    """
    source, target = Path(checkpoint), Path(folder)
    if target.exists():
        raise ValueError(f"{target} exists already; export into a new folder")
    state, model, lora = _read(source, model)
    if adapter_only and lora is None:
        raise ValueError(f"{source} holds no adapters: the run had no lora; export without adapter_only")
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise ValueError(unreachable_model_message(model)) from error
    try:
        if lora is None:
            policy = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            policy.load_state_dict(state)
        elif adapter_only:
            policy = _cast_adapters(_with_adapters(config, lora, state), getattr(torch, dtype))
        else:
            policy = _merged(_with_adapters(config, lora, state), getattr(torch, dtype))
    except RuntimeError as error:
        raise ValueError(f"the weights of {source} do not fit the architecture of {model}: {error}") from error
    with suppress(OSError):  # many base models come without a generation config
        policy.generation_config = GenerationConfig.from_pretrained(model)
    with whole_folder(target) as partial:
        policy.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return target


def _read(source: Path, model: str | None) -> tuple[dict[str, torch.Tensor], str, dict[str, Any] | None]:
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
    run = content.get("rlvr", {})
    return state, model or run["model"], run.get("lora")  # earlier checkpoints do not know `lora`


def _with_adapters(config: PreTrainedConfig, lora: dict[str, Any], state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model of a run with adapters; its weights are those of the checkpoint's file, in no second copy."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    add_adapters(model, lora_config(lora))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _cast_adapters(adapted: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for layer in adapted_layers(adapted).values():
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
    return adapted


def _merged(adapted: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same function without adapters."""
    model = AutoModelForCausalLM.from_config(adapted.config, dtype=dtype)
    weights = dict(model.named_parameters())
    for name, weight in Policy(adapted).named_weights():
        weights[name].data.copy_(weight)
    return model


def export_command(arguments: list[str]) -> None:
    """`lit-specrl export CHECKPOINT FOLDER [--model ...] [--dtype ...] [--adapter_only true]`."""
    try:
        print(auto_cli(export_checkpoint, args=arguments, prog="lit-specrl export"))
    except (ImportError, ValueError) as error:
        raise SystemExit(f"lit-specrl export: {error}") from error
