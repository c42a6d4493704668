"""Signals that end a run are obeyed between two steps, by all ranks at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_specrl.distributed.collectives import max_over_ranks

_SECOND_SIGTERM_AFTER_S = 10.0  # torchrun passes a signal on that its workers have got already


class DeferredSignals:
    """Notes SIGTERM, and under Slurm the signal to save and requeue, and obeys when a step is complete.

    Lightning 2.6 acts within the handler, in the middle of whatever a rank does: it broadcasts there, so that ranks in
    different places wait for each other for ever, and under Slurm it saves there a checkpoint of half a step. A SIGTERM
    that comes ten seconds after the first ends the process at once.
    """

    def __init__(self) -> None:
        self._received = 0
        self._told_at = 0.0
        self._handlers: dict[int, Callable[..., Any]] = {}

    def install(self, trainer: L.Trainer) -> None:
        """Put itself in the place of Lightning's handlers; Lightning restores those of before at the end of the run."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in [signal.SIGTERM, *_requeue_signals(trainer)]:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == self._received == signal.SIGTERM and now > self._told_at + _SECOND_SIGTERM_AFTER_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._received != signal.SIGTERM:
            self._received, self._told_at = number, now

    def raise_pending(self, device: torch.device) -> None:
        """Do what any rank was told to since the last call; every rank must ask.

        Raises:
            SIGTERMException: a rank was told to end; `ModelCheckpoint(save_on_exception=True)` saves then.
        """
        number = max_over_ranks(self._received, device)
        self._received = 0
        if number == signal.SIGTERM:
            raise SIGTERMException
        if number:
            self._handlers[number](number, None)


def _requeue_signals(trainer: L.Trainer) -> list[int]:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, SLURMEnvironment):
        return [environment.requeue_signal] if environment.auto_requeue and environment.requeue_signal else []
    return [signal.SIGUSR1] if SLURMEnvironment.detect() else []
