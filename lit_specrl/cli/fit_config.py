"""The user's configuration of `lit-specrl fit`, and what the runs of the benchmark make of it."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lit_specrl.cli.configuration_files import sources
from lit_specrl.cli.messages import ConfigurationError
from lit_specrl.cli.quick_check import check_quickly

_ENGINE_OWNER = "SpeculativeRollout"
Configuration = dict[str, Any]
"""All settings of `fit`, defaults included, as `--print_config` prints them."""


def fit_configuration(arguments: Sequence[str]) -> Configuration:
    """What `lit-specrl fit` makes of its arguments. Wrong ones end the program, with the message of `fit`."""
    if not arguments:
        raise ConfigurationError("a configuration is missing; give one by --config, such as recipes/quickstart.yaml")
    check_quickly("fit", sources(arguments))
    from lit_specrl.cli.fit import train  # imports torch, which the help of a command need not wait for

    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            train(["fit", *arguments, "--print_config"])
    except SystemExit as end:
        if end.code:
            raise
    configuration: Configuration = yaml.safe_load(printed.getvalue())
    if configuration["ckpt_path"] in ("last", "best", "hpc"):
        raise ValueError(
            f"--ckpt_path {configuration['ckpt_path']}: the runs would begin where others have stopped; give a file or "
            "leave it out"
        )
    callbacks = configuration["trainer"]["callbacks"] or []
    configuration["trainer"]["callbacks"] = callbacks if isinstance(callbacks, list) else [callbacks]
    return configuration


def callback_names(configuration: Configuration) -> list[str]:
    """Class names of the trainer's callbacks."""
    return [_name(callback) for callback in configuration["trainer"]["callbacks"]]


def without_callbacks(configuration: Configuration, names: Sequence[str]) -> Configuration:
    """A copy without the named callbacks; `SpeculativeRollout` stays without its drafter, so that the engine is the
    same.

    Raises:
        ValueError: a callback that is not there.
    """
    present = callback_names(configuration)
    for name in names:
        if name not in present:
            raise ValueError(
                f"--without {name}: there is no such callback; trainer.callbacks has {', '.join(present) or 'none'}"
            )
    changed = copy.deepcopy(configuration)
    callbacks = changed["trainer"]["callbacks"]
    for callback in callbacks:
        if _name(callback) == _ENGINE_OWNER and _ENGINE_OWNER in names:
            callback["init_args"]["drafter"] = None
    changed["trainer"]["callbacks"] = [
        callback for callback in callbacks if _name(callback) not in names or _name(callback) == _ENGINE_OWNER
    ]
    return changed


def with_arguments(configuration: Configuration, name: str, arguments: dict[str, Any]) -> Configuration:
    """A copy whose callback of this name has these arguments, and the defaults of all others.

    Raises:
        ConfigurationError: arguments that the callback does not take.
    """
    changed = copy.deepcopy(configuration)
    for callback in changed["trainer"]["callbacks"]:
        if _name(callback) == name:
            callback["init_args"] = arguments
    with TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(changed, sort_keys=False), "utf-8")
        return fit_configuration(["--config", str(file)])


def with_seed(configuration: Configuration, seed: int) -> Configuration:
    """A copy whose module, data module and global generators have this seed, where they take one."""
    changed = copy.deepcopy(configuration)
    for section in ("model", "data"):
        arguments = (changed[section] or {}).get("init_args") or {}
        if "seed" in arguments:
            arguments["seed"] = seed
    if changed["seed_everything"] is not False:
        changed["seed_everything"] = seed
    return changed


def _name(callback: dict[str, Any]) -> str:
    return callback["class_path"].rpartition(".")[-1]
