"""What a run holds is closed also where it ends by an exception."""

from __future__ import annotations

from typing import Any

import lightning as L


class ClosingOnException(L.Callback):
    """Closes engine, environments and processes of the rewards where a run ends by an exception or Ctrl-C.

    Lightning calls no `teardown` there, and `on_exception` of callbacks alone.
    """

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if hasattr(pl_module, "worker"):  # a trainer keeps its callbacks for a module of another kind
            pl_module.worker.abandon()


def closing_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """For `configure_callbacks`; none where the trainer has it from an earlier run, as Lightning would tell of it."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [] if any(isinstance(callback, ClosingOnException) for callback in callbacks) else [ClosingOnException()]
