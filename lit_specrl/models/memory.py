"""How much memory a run will need, before any weights are read."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from lit_specrl.models.lora import add_adapters, lora_config
from lit_specrl.models.model_name import code_options
from lit_specrl.models.pretrained import check_model_exists

_FLOAT32 = 4  # bytes; of adapters, whatever the weights are


class ModelSize(NamedTuple):
    """Parameters of a policy."""

    num_parameters: int
    num_trained: int
    """Those that an optimizer changes: all, or the adapters."""


def model_size(model: str, lora: dict[str, Any] | None = None) -> ModelSize:
    """Count the parameters of a model from its configuration; no weights are read.

    Args:
        model: hub name or folder.
        lora: arguments of peft's `LoraConfig`, of a run that trains adapters.

    Example:
        >>> model_size("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
        ModelSize(num_parameters=134515008, num_trained=134515008)
    """
    config = check_model_exists(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, **code_options(model, config))
        if lora is not None:
            add_adapters(network, lora_config(lora))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return ModelSize(sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained))


def training_memory(
    size: ModelSize,
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer,
    num_shards: int = 1,
    num_frozen_copies: int = 0,
) -> dict[str, int]:
    """What training keeps on a device for the whole run, in bytes; activations come on top.

    Args:
        size: of the model.
        dtype: of its weights.
        optimizer: of the kind that will train it.
        num_shards: ranks that the weights are cut over.
        num_frozen_copies: further models of this size that are not trained (the reference).

    Example: a billion float32 parameters under AdamW, on one device, take 16 GB:

        >>> plan = training_memory(ModelSize(10**9, 10**9), torch.float32, torch.optim.AdamW([torch.zeros(1)]))
        >>> plan["weights"], plan["gradients"], plan["optimizer"]
        (4000000000, 4000000000, 8000000000)
    """
    width = dtype.itemsize
    weights = size.num_parameters * width
    trained = size.num_trained * (width if size.num_trained == size.num_parameters else _FLOAT32)
    parts = {
        "weights": weights,
        "gradients": trained,
        "optimizer": trained * moments(optimizer),
        "reference": num_frozen_copies * weights,
    }
    return {name: math.ceil(part / num_shards) for name, part in parts.items() if part}


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Numbers that an optimizer keeps for each parameter: two for Adam and what is like it."""
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.SGD):
        return int(group["momentum"] != 0)
    return 2 + int(bool(group.get("amsgrad")))


def device_memory(device: torch.device) -> int:
    """Memory of a device, in bytes; of the host, shared by all ranks on it, for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
