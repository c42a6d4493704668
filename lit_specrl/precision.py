"""Which dtype a device multiplies fast in: bfloat16 where it has instructions for it, float32 elsewhere."""

from __future__ import annotations

import os
import time
from functools import cache
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

Dtype = Literal["bfloat16", "float32"]
PrecisionName = Literal["bf16-mixed", "32-true"]

_BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # of x86, and of ARM
# levels of oneDNN, which multiplies matrices on a CPU; below these it uses no instructions for bfloat16
_LEVELS_WITHOUT_BFLOAT16 = {
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"),
    *("AVX512_MIC", "AVX512_MIC_4OPS"),
}


class FastDtype(NamedTuple):
    """The dtype of matrix products that `auto` stands for, with the reason."""

    name: Dtype
    reason: str


def fast_dtype(device: torch.device) -> FastDtype:
    """bfloat16 where the device has instructions for it, otherwise float32.

    A CPU without them emulates bfloat16; `bfloat16_slowdown` measures what that costs.

    Args:
        device: a CPU or a CUDA device. On others float32 is taken.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return FastDtype("bfloat16", "the GPU has bf16 instructions")
        return FastDtype("float32", "the GPU has no bf16 instructions")
    if device.type != "cpu":
        return FastDtype("float32", f"bf16 has not been tried on {device.type}")
    level = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if level in _LEVELS_WITHOUT_BFLOAT16:
        return FastDtype("float32", f"ONEDNN_MAX_CPU_ISA={level} allows no bf16 instructions")
    found = [name for name in _BFLOAT16_INSTRUCTIONS if torch.cpu.get_capabilities().get(name)]
    if found:
        return FastDtype("bfloat16", f"the processor has {found[0]}")
    return FastDtype("float32", "the processor has no bf16 instructions")


def auto_precision(accelerator: str = "auto") -> PrecisionName:
    """The precision of a `Trainer` that is fast on this machine: "bf16-mixed", or "32-true" where bf16 is emulated.

    Args:
        accelerator: of the `Trainer`; "auto" is the GPU if there is one.

    Example::

        L.Trainer(precision=auto_precision())
    """
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    dtype, _ = fast_dtype(torch.device("cuda" if on_gpu else "cpu"))
    return "bf16-mixed" if dtype == "bfloat16" else "32-true"


class Trainer(L.Trainer):
    """Lightning's trainer, which also takes `precision="auto"`: what `auto_precision` says. The command line uses it.

    Args:
        precision: "auto", or as of Lightning's trainer.
        options: further arguments of Lightning's trainer.
    """

    def __init__(self, *, precision: str | int | None = "auto", **options: Any) -> None:
        if precision == "auto":
            accelerator = options.get("accelerator", "auto")
            precision = auto_precision(accelerator if isinstance(accelerator, str) else "auto")
        super().__init__(precision=precision, **options)  # type: ignore[arg-type]


def warn_if_slow(setting: str, dtype: str, device: torch.device) -> None:
    """Warn of bfloat16 on a device that emulates it, with the measured factor.

    Args:
        setting: what the user wrote, such as "precision='bf16-mixed'".
        dtype: that it leads to; a name of torch's.
        device: that computes.
    """
    if dtype != "bfloat16" or fast_dtype(device).name == "bfloat16":
        return
    rank_zero_warn(
        f"{setting} computes in bfloat16, but {fast_dtype(device).reason}: a matrix product takes "
        f"{bfloat16_slowdown(device):.0f} times as long as in float32. Use 'auto', which takes float32 here"
    )


@cache
def bfloat16_slowdown(device: torch.device) -> float:
    """How many times as long a matrix product takes in bfloat16 as in float32, measured once in some milliseconds."""
    left, right = (
        torch.ones(64, 512, device=device),
        torch.ones(512, 512, device=device),
    )  # no random numbers of the run
    seconds = {dtype: _seconds(left.to(dtype), right.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    left @ right  # the first product also prepares
    durations = []
    for _ in range(3):
        started_at = time.perf_counter()
        (left @ right).sum().item()
        durations.append(time.perf_counter() - started_at)
    return min(durations)


def unusable(precision: object) -> str | None:
    """What to say of a precision of Lightning's trainer that training cannot have; `None` for the others."""
    told = f"precision={str(precision)!r}"
    if str(precision) in ("16", "16-mixed"):
        return f"{told} scales the loss, which manual gradient clipping does not know of; use 'bf16-mixed' or '32-true'"
    if str(precision) in ("16-true", "bf16-true", "64-true", "64"):
        return (
            f"{told} lets torch make every new tensor in that type, log-probs and advantages too; use 'bf16-mixed', or "
            "'32-true' with dtype='bfloat16' of the module for weights in bfloat16"
        )
    return None
