"""What handing the policy's weights to the running engine takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import torch

from lit_specrl.bench.report import Report, check_at_least_one, describe_hardware, resolve_device, spread
from lit_specrl.policy import Policy
from lit_specrl.rollout import VLLMEngine

_MIB = 2**20


def bench_weight_sync(
    model: str,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    repeats: int = 5,
    lora_rank: int = 0,
    merge_adapters: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Report:
    """Time the hand-over of weights to the engine, and measure the memory that it takes beyond what both hold.

    The policy's weights are float32, in this process like the engine. They go over one tensor after the other. The peak is that of the process on a CPU (resident
    memory), of the device on a GPU. The first hand-over is measured and not timed: it touches memory for the first time.

    Args:
        model: hub name or local folder, in the transformers format.
        dtype: of the engine's weights.
        repeats: timed hand-overs.
        lora_rank: of adapters of all linear layers; 0 for a policy that is trained whole.
        merge_adapters: as of `VLLMEngine`.
        device: where policy and engine are; "auto" takes a GPU if there is one.
    """
    check_at_least_one(repeats=repeats)
    device = resolve_device(device)  # type: ignore[assignment]
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
    seconds, extra = [], []
    for version in range(repeats + 1):
        memory = _Memory(device)
        started_at = time.perf_counter()
        engine.load_policy(policy, version)
        if version:
            seconds.append(time.perf_counter() - started_at)
        extra.append(memory.peak_beyond_start())
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


class _Memory:
    """Peak of the memory in use since now."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux then counts its peak from here
            self._start = _of_this_process("VmRSS")

    def peak_beyond_start(self) -> int:
        """Bytes."""
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else _of_this_process("VmHWM")
        return max(0, peak - self._start)


def _of_this_process(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return int(value.split()[0]) * 1024
    raise ValueError(f"this system does not tell {name}; run on Linux, or on a GPU")
