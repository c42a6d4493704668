"""The runs of the benchmark: a process and a folder for each."""

from __future__ import annotations

import copy
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from lightning.pytorch.callbacks import Checkpoint

from lit_specrl import __version__
from lit_specrl.bench.rollout.progress import STEPS_FILE, ProgressTeller
from lit_specrl.bench.rollout.records import RunRecord
from lit_specrl.callbacks import RolloutJournal
from lit_specrl.cli.fit_config import Configuration, with_seed, without_callbacks

WITHOUT, WITH = "without", "with"
"""The two arms that every comparison has."""
_TAIL_LINES = 5  # of what a failed run has written


class RunFailedError(Exception):
    """A run that did not come to its end."""


@dataclass(frozen=True)
class Run:
    """One training run, with the callbacks in question or without them."""

    seed: int
    arm: str
    configuration: Configuration
    folder: Path

    @property
    def record_file(self) -> Path:
        return self.folder / "run.json"

    @property
    def settings_hash(self) -> str:
        """Of the configuration and of the code that runs it."""
        settings = [self.configuration, __version__, torch.__version__]
        return xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())

    def finished(self) -> RunRecord | None:
        """Its record, if it ran before.

        Raises:
            ValueError: the folder holds a run with other settings.
        """
        if not self.record_file.exists():
            return None
        record = RunRecord.load(self.record_file)
        if record.settings_hash != self.settings_hash:
            raise ValueError(f"{self.folder} holds a run with other settings or versions; take another --output")
        return record

    def execute(self) -> RunRecord:
        """`lit-specrl fit` in a process of its own.

        Raises:
            RunFailedError: it failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        config_file, output, errors = (self.folder / name for name in ("config.yaml", "stdout.txt", "stderr.txt"))
        config_file.write_text(yaml.safe_dump(self._recorded_configuration(), sort_keys=False), "utf-8")
        command = [sys.executable, "-m", "lit_specrl.cli", "fit", "--config", str(config_file)]
        progress = ProgressTeller(self.folder / STEPS_FILE)
        with progress, output.open("w") as stdout, errors.open("w") as stderr:
            code = subprocess.run(command, stdout=stdout, stderr=stderr, check=False).returncode
        if code or not self.record_file.exists():
            self.record_file.unlink(missing_ok=True)
            tail = errors.read_text("utf-8", "replace").splitlines()[-_TAIL_LINES:]
            lines = "\n".join(["", *tail])
            raise RunFailedError(
                f"the run with seed {self.seed}, {self.arm}, ended with code {code}. Finished runs are kept: the same "
                f"command goes on after them. The last lines of {errors}:{lines}"
            )
        return RunRecord.load(self.record_file)

    def _recorded_configuration(self) -> Configuration:
        recorder = {
            "class_path": "lit_specrl.bench.rollout.recorder.RunRecorder",
            "init_args": {"file": str(self.record_file.absolute()), "settings_hash": self.settings_hash},
        }
        trainer = copy.deepcopy(self.configuration["trainer"])
        for callback in trainer["callbacks"]:
            if _is_a(RolloutJournal, callback):  # rows that an interrupted run has left would cost this one nothing
                callback["init_args"] = (callback.get("init_args") or {}) | {"load_rows": False}
        changed: Configuration = {"callbacks": [recorder, *trainer["callbacks"]], "default_root_dir": str(self.folder)}
        if trainer["enable_checkpointing"] is None and not any(
            _is_a(Checkpoint, each) for each in trainer["callbacks"]
        ):
            changed["enable_checkpointing"] = False  # gigabytes for each run, which nobody reads
        return self.configuration | {"trainer": trainer | changed}


def _is_a(kind: type, callback: dict[str, Any]) -> bool:
    return issubclass(pkgutil.resolve_name(callback["class_path"]), kind)


def planned_runs(
    configuration: Configuration,
    names: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    more: Mapping[str, Configuration] | None = None,
) -> list[Run]:
    """For each seed a run without the callbacks, one with them, and one for each further arm.

    Each seed begins with another arm, so that none is always first on a cold machine.

    Args:
        configuration: of the runs with the callbacks.
        names: of the callbacks in question.
        seeds: of the runs.
        folder: holds a folder for each run.
        more: configurations of further arms, by name.

    Raises:
        ValueError: a callback that is not there.
    """
    arms = {WITHOUT: without_callbacks(configuration, names), WITH: configuration, **(more or {})}
    runs = []
    for index, seed in enumerate(seeds):
        first = index % len(arms)
        order = [*list(arms)[first:], *list(arms)[:first]]
        runs += [Run(seed, arm, with_seed(arms[arm], seed), folder / f"seed-{seed}-{_as_name(arm)}") for arm in order]
    return runs


def _as_name(arm: str) -> str:
    return re.sub(r"[^\w.^-]+", "-", arm).strip("-")
