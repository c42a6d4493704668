"""Metrics of a training step on their way to the loggers."""

from __future__ import annotations

import lightning as L
import torch


class StepLog:
    """Logs the metrics of each step, and nothing of steps before.

    Lightning repeats a value, to the end of the epoch, in each step that does not log its name.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def write(self, module: L.LightningModule, metrics: dict[str, float]) -> None:
        """Log, from `training_step`.

        Args:
            module: that has made the step.
            metrics: of the step, by name.
        """
        results = module.trainer._results
        for name in self._names - set(metrics):
            if results is not None and (stale := results.get(f"training_step.{name}")) is not None:
                stale.reset()
        self._names = set(metrics)
        # as tensors of the host: Lightning would copy each number to the device, and back for the logger
        for name, value in zip(metrics, torch.tensor(list(metrics.values())).unbind(), strict=True):
            module.log(name, value, prog_bar=name == "reward")
        module.log("tokens/s", torch.tensor(metrics["perf/rollout_tokens_per_s"]), prog_bar=True, logger=False)
