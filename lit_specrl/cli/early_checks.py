"""What can be known to fail before anything is loaded: settings of the trainer, and files that are named."""

from __future__ import annotations

import difflib
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry

from lit_specrl.checkpoints.integrity import check_checkpoint
from lit_specrl.cli.messages import ConfigurationError
from lit_specrl.precision import unusable

_RESUMED = ("last", "best", "hpc", "registry")  # names that Lightning finds the checkpoint for
_RANKS_OF_A_CORE = 4


def check_settings(settings: Any) -> None:
    """Refuse settings of `lit-specrl fit` and its siblings that cannot work.

    Args:
        settings: the parsed configuration of the command.

    Raises:
        ConfigurationError: what is wrong.
    """
    trainer = settings.trainer
    _check_precision(trainer.precision)
    _check_strategy(trainer.strategy)
    _check_devices(trainer.accelerator, trainer.devices)
    _check_writable(trainer.default_root_dir)
    _check_checkpoint(settings.get("ckpt_path"))


def _check_precision(precision: Any) -> None:
    if complaint := unusable(precision):
        raise ConfigurationError(complaint, "trainer.precision")


def _check_strategy(strategy: Any) -> None:
    known = sorted({*StrategyRegistry.available_strategies(), "auto", "ddp", "fsdp", "deepspeed", "fsdp2"})
    if isinstance(strategy, str) and strategy not in known:
        similar = difflib.get_close_matches(strategy, known, 1)
        hint = f"did you mean {similar[0]}?" if similar else "use auto, ddp or fsdp2"
        raise ConfigurationError(f"there is no strategy {strategy!r}; {hint}", "trainer.strategy")


def _check_devices(accelerator: Any, devices: Any) -> None:
    num_gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and not num_gpus:
        raise ConfigurationError(
            f"accelerator={accelerator} needs a GPU, and torch {torch.__version__} sees none; use accelerator: cpu, or "
            "auto",
            "trainer.accelerator",
        )
    count = int(devices) if str(devices).lstrip("-").isdecimal() else None
    if count is None:
        return
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and num_gpus > 0)
    available = num_gpus if on_gpu else (os.cpu_count() or 1) * _RANKS_OF_A_CORE
    if count == 0 or count < -1:
        raise ConfigurationError(f"devices must be at least 1, or -1 or auto for all, got {count}", "trainer.devices")
    if count > available:
        there = f"{num_gpus} GPUs" if on_gpu else f"{os.cpu_count()} CPU cores, {_RANKS_OF_A_CORE} ranks each at most"
        raise ConfigurationError(f"devices={count} are more than there are: {there}", "trainer.devices")


def _check_writable(folder: str | None) -> None:
    """Before minutes are spent on a run that cannot be kept."""
    path = Path(folder or ".")
    if "://" in str(path):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigurationError(
            f"the output folder {path} cannot be written: {reason}; make it writable, make room, or take another "
            "default_root_dir",
            "trainer.default_root_dir",
        ) from error


def _check_checkpoint(checkpoint: str | None) -> None:
    if not checkpoint or checkpoint in _RESUMED or "://" in checkpoint:
        return
    if Path(checkpoint).is_file() and not zipfile.is_zipfile(checkpoint):
        try:
            check_checkpoint(Path(checkpoint))
        except ValueError as error:
            raise ConfigurationError(str(error), "ckpt_path") from error
    if not Path(checkpoint).exists():
        folder = Path(checkpoint).absolute().parent
        there = sorted(path.name for path in folder.glob("*.ckpt"))[:5] if folder.is_dir() else []
        hint = f"there are {', '.join(there)}" if there else f"looked in {folder}"
        raise ConfigurationError(f"there is no checkpoint {checkpoint}; {hint}", "ckpt_path")
