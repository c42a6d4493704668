"""What a run does when it is told to end, or to save and requeue, in the middle of a step."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_specrl import GRPO
from lit_specrl.callbacks import PrefixCache, RolloutCallback
from lit_specrl.data import ArithmeticSource, PromptDataModule

STEPS = 4


@pytest.fixture(autouse=True)
def handlers():
    """Lightning leaves its handlers behind when a run ends by an exception."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class Told(RolloutCallback):
    """Sends a signal when the rollouts of a step are there, and its update is not; keeps the steps that were
    completed."""

    def __init__(self, number=None, step=2):
        self.number, self.step, self.steps = number, step, []

    def on_rollout_end(self, trainer, pl_module, rollouts):
        if self.number and pl_module.step == self.step:
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.steps.append(pl_module.step)


def short(completion_ids, **columns):
    return [-float(len(set(ids))) for ids in completion_ids]


def fit(model, folder, told, ckpt_path=None):
    import lightning as L

    module = GRPO(
        model,
        [short],
        num_generations=2,
        max_completion_length=6,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PrefixCache(), told],
    )
    data = PromptDataModule(ArithmeticSource(4), batch_size=2, max_prompt_length=64)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {name: weight.clone() for name, weight in module.policy.named_weights()}


def test_a_run_that_is_told_to_end_completes_its_step(tiny_model, tmp_path):
    told = Told(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(tiny_model, tmp_path, told)
    assert told.steps == [1, 2, 3]


def test_slurm_saves_between_two_steps_and_the_requeued_run_goes_on(tiny_model, tmp_path, monkeypatch):
    """The checkpoint was made in the signal's handler, of half a step, whose prompts the requeued run never saw."""
    calm = fit(tiny_model, tmp_path / "calm", Told())
    for name, value in {"NTASKS": "1", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODELIST": "here"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    told = Told(signal.SIGUSR1)
    fit(tiny_model, tmp_path, told)  # Lightning asks for the requeuing and goes on until Slurm ends it
    assert told.steps == [1, 2, 3, 4]
    (checkpoint,) = tmp_path.glob("hpc_ckpt_*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["rlvr"]["step"] == 3

    requeued = Told()
    weights = fit(tiny_model, tmp_path, requeued)  # finds the checkpoint by itself
    assert requeued.steps == [4]
    torch.testing.assert_close(weights, calm, rtol=0, atol=0)


@pytest.mark.parametrize(("patience_s", "status"), [(-1, -signal.SIGTERM), (10, 0)])
def test_who_insists_ends_the_process_at_once(tiny_model, tmp_path, patience_s, status):
    """But not the second of two signals that come together, as torchrun's workers get them; the step is completed
    then."""
    program = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_signals import Told, fit
from lit_specrl.distributed import signals as deferred_signals
deferred_signals._SECOND_SIGTERM_AFTER_S = {patience_s}
class Twice(Told):
    def on_rollout_end(self, trainer, pl_module, rollouts):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
fit({tiny_model!r}, {str(tmp_path)!r}, Twice())
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == status
