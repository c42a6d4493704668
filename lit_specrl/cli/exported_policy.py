"""The policy of a checkpoint, in the format of transformers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as sharded
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from lit_specrl.checkpoints.atomic_files import atomic_folder
from lit_specrl.checkpoints.integrity import OF_ALL_RANKS, check_checkpoint, naming
from lit_specrl.drafting import DraftModel, Eagle3Drafter
from lit_specrl.drafting.networks import DraftNetwork
from lit_specrl.models.lora import adapted_layers, add_adapters, lora_config
from lit_specrl.models.model_name import ModelName, code_options, hub_options
from lit_specrl.models.policy import named_weights
from lit_specrl.models.pretrained import check_model_exists, unreachable_model_message

_PREFIX = "policy.model."


def write_policy(
    checkpoint: str,
    folder: str,
    model: str | None,
    dtype: str,
    adapter_only: bool,
    drafter: str | None,
    trust_remote_code: bool,
) -> Path:
    """What `export_checkpoint` does, with its arguments."""
    source, target = Path(checkpoint), Path(folder)
    for new in [target, *([Path(drafter)] if drafter else [])]:
        if new.exists():
            raise ValueError(f"{new} exists already; export into a new folder")
    if drafter and target.resolve().is_relative_to(Path(drafter).resolve()):
        raise ValueError(
            f"drafter must be a folder of its own, got {drafter}, where the policy goes ({target}); give another one, "
            f"such as {target}-drafter"
        )
    content, state = _read(source)
    run = content.get("rlvr", {})
    lora = run.get("lora")  # earlier checkpoints do not know it, nor a revision
    revision = None if model else run.get("hub_options", {}).get("revision")
    model = ModelName(model or run["model"], revision, trust_remote_code)
    network = None if drafter is None else _drafter(source, content, model)
    if adapter_only and lora is None:
        raise ValueError(f"{source} holds no adapters: the run had no lora; export without adapter_only")
    try:
        config = check_model_exists(model)
        tokenizer = AutoTokenizer.from_pretrained(model, **hub_options(model))
    except OSError as error:
        raise ValueError(unreachable_model_message(model)) from error
    try:
        if lora is None:
            policy = _random_model(model, config, getattr(torch, dtype))
            policy.load_state_dict(state)
        elif adapter_only:
            policy = _cast_adapters(_with_adapters(model, config, lora, state), getattr(torch, dtype))
        else:
            policy = _merged(model, _with_adapters(model, config, lora, state), getattr(torch, dtype))
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {source} do not fit the architecture of {model}: {_some_lines(error)}; give the run's own "
            "by --model"
        ) from error
    with suppress(OSError):  # many base models come without a generation config
        policy.generation_config = GenerationConfig.from_pretrained(model, revision=revision or "main")
    with atomic_folder(target) as partial:
        policy.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    if drafter is not None and network is not None:
        network.save(drafter)
    return target


def _some_lines(error: Exception) -> str:
    """The beginning of a message with a line for each weight."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line if len(line) < 200 else f"{line[:200]}..." for line in lines[:2])


def _read(source: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a checkpoint holds, and the weights of its policy."""
    check_checkpoint(source)
    with naming(source):
        file = source / OF_ALL_RANKS if source.is_dir() else source
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, a checkpoint of Lightning holds a dict")
        weights = _gather_shards(source) if source.is_dir() else content.get("state_dict", {})
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items() if name.startswith(_PREFIX)}
    if not state:
        raise ValueError(f"{source} holds no policy of this library (no weights called {_PREFIX}*)")
    return content, state


def _gather_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the policy in a checkpoint of several ranks."""
    prefix = "state_dict."
    stored = sharded.FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix + _PREFIX) and isinstance(entry, TensorStorageMetadata)
    }
    sharded.load(weights, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


def _drafter(source: Path, content: dict[str, Any], model: str) -> DraftNetwork:
    """The drafter of a checkpoint, with its trained weights."""
    saved = content.get("drafter_distillation")
    if saved is None:
        raise ValueError(f"{source} holds no drafter: the run had no DrafterDistillation; export without drafter")
    origin = dict(saved["origin"])
    kinds = {kind.__name__: kind for kind in (Eagle3Drafter, DraftModel)}
    if origin["kind"] not in kinds:
        raise ValueError(
            f"{source} holds the drafter {origin['kind']}; only an Eagle3Drafter and a DraftModel can be exported. Let "
            "DrafterDistillation write it at the end of the run (output), or export without drafter"
        )
    drafter = kinds[origin.pop("kind")](**origin)
    drafter.prepare(model)
    try:
        network = drafter.network()
    except OSError as error:
        raise ValueError(f"the drafter that the run began with cannot be read: {error}") from error
    network.load_weights(saved["weights"], saved["vocabulary"])
    return network


def _random_model(model: str, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **code_options(model, config))


def _with_adapters(
    name: str, config: PreTrainedConfig, lora: dict[str, Any], state: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """The model of a run with adapters; its weights are those of the checkpoint's file, in no second copy."""
    with torch.device("meta"):
        model = _random_model(name, config)
    add_adapters(model, lora_config(lora))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _cast_adapters(adapted: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for layer in adapted_layers(adapted).values():
        layer.lora_A.to(dtype)
        layer.lora_B.to(dtype)
    return adapted


def _merged(name: str, adapted: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same function without adapters."""
    model = _random_model(name, adapted.config, dtype)
    weights = dict(model.named_parameters())
    for layer, weight in named_weights(adapted):
        weights[layer].data.copy_(weight)
    return model
