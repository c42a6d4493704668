"""Low-rank adapters by peft: what may be adapted, and what a layer and its adapter are together."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_specrl.distributed.collectives import whole_tensor

_ADAPTER = "default"  # the name that transformers gives to the first adapter

_LORA_ARGUMENTS = {
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
}


def lora_config(lora: dict[str, Any]) -> Any:
    """The `peft.LoraConfig` of arguments as a YAML file gives them.

    Args:
        lora: arguments of `LoraConfig`, such as `{"r": 16, "target_modules": "all-linear"}`.

    Raises:
        ImportError: peft is missing.
        ValueError: an unknown argument, or one that makes the policy something else than its initial weights plus
            scaling * B @ A, with B = 0 at the start.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("lora needs peft; install it with `pip install 'lit_specrl[lora]'`") from error
    known = set(inspect.signature(LoraConfig).parameters)
    if unknown := sorted(set(lora) - known):
        raise ValueError(f"lora got {', '.join(unknown)}; peft's LoraConfig knows {', '.join(sorted(known))}")
    if lora.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout must be 0, got {lora['lora_dropout']}; old and new log-probs must come from the same "
            "function"
        )
    if lora.get("init_lora_weights", True) not in (True, "gaussian"):
        raise ValueError(
            f"init_lora_weights must be true or 'gaussian', got {lora['init_lora_weights']!r}; the initial policy must "
            "be the model itself"
        )
    config, default = LoraConfig(**{"task_type": "CAUSAL_LM"} | lora), LoraConfig(task_type="CAUSAL_LM")
    for name in sorted(set(lora) - _LORA_ARGUMENTS):
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"lora cannot have {name}={lora[name]!r}: the policy must be base + scaling * B @ A, and without "
                f"adapters the initial one; choose among {', '.join(sorted(_LORA_ARGUMENTS))}"
            )
    return config


def add_adapters(model: PreTrainedModel, config: Any) -> None:
    """Freeze a model and give it low-rank adapters, in float32, which change nothing yet.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, as in peft.

    Args:
        model: changed in place.
        config: from `lora_config`.

    Raises:
        ValueError: the config means layers that are missing, not linear, or the head.
    """
    model.add_adapter(config)
    for name, layer in adapted_layers(model).items():
        # the log-probs multiply with the head's own weight, past an adapter
        if not isinstance(layer.base_layer, nn.Linear) or layer is model.get_output_embeddings():
            raise ValueError(
                f"lora adapts linear layers below the head, but its target_modules mean {name} "
                f"({type(layer.base_layer).__name__}) too; name projections, such as [q_proj, v_proj]"
            )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # bfloat16 would round small updates away


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter, by the name of the layer that they took the place of."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


class Adapter(NamedTuple):
    """Of one linear layer, which computes `x @ W.T + x @ down.T @ up.T` with it."""

    layer: str
    """Name of the layer in the model without adapters."""
    down: Tensor
    """[r, in]"""
    up: Tensor
    """[out, r], with the adapter's scaling in it."""


def named_adapters(model: nn.Module) -> Iterator[Adapter]:
    """Adapters, one after the other and whole; shards are gathered as they are asked for."""
    for name, layer in adapted_layers(model).items():
        down, up = whole_tensor(layer.lora_A[_ADAPTER].weight), whole_tensor(layer.lora_B[_ADAPTER].weight)
        yield Adapter(name, down, layer.scaling[_ADAPTER] * up)


def adapter_ranks(model: nn.Module) -> dict[str, int]:
    """Rank of each adapter, by the layer's name."""
    return {name: layer.r[_ADAPTER] for name, layer in adapted_layers(model).items()}


def merged_weight(layer: Any) -> Tensor:
    """What a linear layer and its adapter multiply with together, [out, in]."""
    weight = whole_tensor(layer.base_layer.weight)  # [out, in]
    down, up = (
        whole_tensor(layer.lora_A[_ADAPTER].weight),
        whole_tensor(layer.lora_B[_ADAPTER].weight),
    )  # [r, in], [out, r]
    with torch.autocast(weight.device.type, enabled=False):  # the trainer's would multiply in bfloat16
        return (weight.float() + layer.scaling[_ADAPTER] * (up.float() @ down.float())).to(weight.dtype)
