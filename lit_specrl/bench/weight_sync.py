"""What handing the policy's weights to the running engine takes."""

from __future__ import annotations

import time
from typing import Literal

import torch

from lit_specrl.allocator import give_back_freed_memory, keep_freed_memory
from lit_specrl.bench.memory import PeakMemory
from lit_specrl.bench.report import Report, check_at_least_one, describe_hardware, resolve_device, spread
from lit_specrl.engines import VLLMEngine
from lit_specrl.models.policy import Policy
from lit_specrl.precision import fast_dtype

_MIB = 2**20


def bench_weight_sync(
    model: str,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    repeats: int = 5,
    lora_rank: int = 0,
    merge_adapters: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Report:
    """Time the hand-over of weights to the engine, and measure the memory that it takes.

    Memory is what goes beyond policy and engine (`PeakMemory`).

    The policy's weights are float32, in this process like the engine. They go over one tensor after the other. Memory
    is measured first; the first hand-over is told apart, because it touches the engine's memory for the first time.
    Others are timed after that, on a CPU with freed memory kept, as in training.

    Args:
        model: hub name or local folder, in the transformers format.
        dtype: of the engine's weights; "auto" is what the device computes fast in.
        repeats: hand-overs whose memory is measured after the first, and as many that are timed.
        lora_rank: of adapters of all linear layers; 0 for a policy that is trained whole.
        merge_adapters: as of `VLLMEngine`.
        device: where policy and engine are; "auto" takes a GPU if there is one.
    """
    check_at_least_one(repeats=repeats)
    device = resolve_device(device)  # type: ignore[assignment]
    if dtype == "auto":
        dtype = fast_dtype(torch.device(device)).name
    if device == "cpu":
        give_back_freed_memory()
    lora = {"r": lora_rank, "target_modules": "all-linear"} if lora_rank else None
    policy = Policy.build(model, lora=lora).to(device)
    engine = VLLMEngine(
        dtype=dtype, cpu_kv_cache_gib=1, max_model_len=256, max_num_seqs=16, merge_adapters=merge_adapters
    )
    engine.start(policy, model, 256, {0})
    sizes = [weight.numel() * weight.element_size() for _, weight in policy.named_weights()]
    layers = [
        sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
        for layer in policy.model.base_model.layers  # type: ignore[union-attr]
    ]
    extra = []
    for version in range(repeats + 1):
        memory = PeakMemory(device)
        engine.load_policy(policy, version)
        extra.append(memory.beyond_start())
    if device == "cpu":
        keep_freed_memory()
        engine.load_policy(policy, repeats + 1)  # touches what the timed ones use again
    seconds = []
    for version in range(repeats + 2, 2 * repeats + 2):
        started_at = time.perf_counter()
        engine.load_policy(policy, version)
        seconds.append(time.perf_counter() - started_at)
    engine.shutdown()
    row = {
        "weights_MiB": sum(sizes) / _MIB,
        "largest_tensor_MiB": max(sizes) / _MIB,
        "layer_MiB": max(layers) / _MIB,
        "peak_beyond_both_MiB_first": extra[0] / _MIB,
        "peak_beyond_both_MiB_max": max(extra[1:]) / _MIB,
        **spread(seconds),
    }
    return Report(
        hardware=describe_hardware(device),
        torch_version=torch.__version__,
        settings={
            "benchmark": "weight-sync",
            "model": model,
            "dtype": dtype,
            "repeats": repeats,
            "lora_rank": lora_rank,
            "merge_adapters": merge_adapters,
            "device": device,
        },
        tables={"measured": [row]},
        notes=["Sizes of weights, tensors and layers are those of the policy, in float32."],
    )
