"""Weights and adapters of the policy, handed to a running vLLM."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear

from lit_specrl.checkpoints.locks import ProcessFolder
from lit_specrl.models.lora import Adapter

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_ADAPTER_NAME = "policy"
_PLAIN_METHODS = ("NoneType", "UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
_DERIVING_LAYERS = ("MLAAttention",)  # compute further weights from those that are loaded


def load_weights(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the weights of the running engine and flush its KV prefix cache.

    Each tensor is copied into the engine's own where that is still as it was loaded, as on a GPU. On a CPU vLLM packs
    its weights for the matrix library, and elsewhere those of experts and quantised layers: there vLLM loads again.
    """
    [is_plain] = llm.apply_model(has_plain_weights)
    if is_plain:
        llm.apply_model(lambda model: _copy_weights(model, weights))
    else:
        _reload_weights(llm, weights)
        llm.apply_model(repack_tied_head)
        llm.apply_model(repack_experts)
    _flush(llm)


def has_plain_weights(model: Any) -> bool:
    """Whether all weights of a vLLM model are used in the form in which they are loaded."""
    return all(
        type(getattr(module, "quant_method", None)).__name__ in _PLAIN_METHODS
        and getattr(module, "cpu_linear", linear) is linear
        and type(module).__name__ not in _DERIVING_LAYERS
        for module in model.modules()
    )


def _reload_weights(llm: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """vLLM 0.32 tells its log alone of parameters that it leaves as they were: behind a start, at random."""
    [names] = llm.apply_model(lambda model: [name for name, _ in model.named_parameters()])
    loaded = set[str]()

    def loading(model: Any) -> None:
        own = model.load_weights

        def load(weights: Iterable[tuple[str, Tensor]]) -> Any:
            found = own(weights)
            loaded.update(found)
            return found

        model.load_weights = load

    llm.apply_model(loading)
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    finally:
        llm.apply_model(lambda model: delattr(model, "load_weights"))
    _check_loaded(names, loaded)


@torch.no_grad()
def _copy_weights(model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    loaded = set(model.load_weights(iter(weights)))
    _check_loaded([name for name, _ in model.named_parameters()], loaded)


def _check_loaded(names: Iterable[str], loaded: Collection[str]) -> None:
    """Refuse to generate with parameters that the policy has not given.

    Args:
        names: of the engine's parameters, without adapters.
        loaded: those that were loaded.
    """
    missing = sorted(name for name in names if name not in loaded)
    if missing:
        raise RuntimeError(
            f"the policy has no weights for {len(missing)} parameters of the engine, such as {missing[0]}; is the "
            "engine's model another than the policy's?"
        )


def adapter_options(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine that reads its weights itself, and has adapters beside them.

    Args:
        ranks: by the layer's name.

    Raises:
        ValueError: there are no adapters, or vLLM cannot take them.
    """
    if not ranks:
        raise ValueError(
            "merge_adapters=False is for a policy with adapters; give the module lora, or leave merge_adapters out"
        )
    rank = max(ranks.values())
    taken = next((size for size in _LORA_RANKS if size >= rank), None)
    if taken is None:
        raise ValueError(f"vLLM takes adapters of rank {_LORA_RANKS[-1]} at most, got {rank}; leave merge_adapters out")
    return {
        "load_format": "auto",
        "enable_lora": True,
        "max_lora_rank": taken,
        "max_loras": 1,
        # vLLM would make room for adapters of the head, too, with which it cannot score prompts
        "lora_target_modules": sorted({name.rpartition(".")[-1] for name in ranks}),
    }


def load_adapters(llm: Any, adapters: Iterable[Adapter]) -> Any:
    """Replace the adapters of the running engine and flush its KV prefix cache.

    vLLM reads adapters from a folder alone; this one is gone when the call returns.

    Returns:
        What requests name, to be answered with them.
    """
    from vllm.lora.request import LoRARequest

    tensors, rank = dict[str, Tensor](), 1
    for layer, down, up in adapters:
        name, rank = f"base_model.model.{layer}", max(rank, len(down))
        tensors |= {f"{name}.lora_A.weight": down.contiguous().cpu(), f"{name}.lora_B.weight": up.contiguous().cpu()}
    layers = sorted({name.split(".")[-3] for name in tensors})
    with ProcessFolder("adapters") as folder:
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers, "bias": "none"}
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        if not llm.llm_engine.add_lora(LoRARequest(_ADAPTER_NAME, 1, folder, load_inplace=True)):
            raise RuntimeError(f"vLLM did not take the adapters of {', '.join(layers)}; leave merge_adapters out")
        request = LoRARequest(_ADAPTER_NAME, 1, folder)
    _flush(llm)
    return request


def _flush(llm: Any) -> None:
    if not llm.reset_prefix_cache():
        raise RuntimeError(
            "vLLM could not flush its KV prefix cache: requests of the previous weights are still running"
        )


def repack_tied_head(model: Any) -> None:
    """Rebuild the head's packed copy of a tied embedding.

    On a CPU vLLM 0.32 multiplies with a copy of the head's weight that it packs when the head is loaded. A tied head is
    never loaded, so after a reload it would go on with the previous weights: fluent text, from another policy.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)


def repack_experts(model: Any) -> None:
    """Pack the experts of a model on a CPU.

    vLLM 0.32 packs them when it loads them for the first time alone; behind a reload it multiplies with what is not
    packed.
    """
    for module in model.modules():
        if "w13_weight" not in module._parameters:
            continue
        experts: Any = getattr(getattr(module.quant_method, "moe_kernel", None), "fused_experts", None)
        if type(experts).__module__.endswith(".cpu_moe"):
            experts.process_weights_after_loading(module)
