"""Runs of a few steps on questions of arithmetic, and what they report."""

from functools import partial

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_specrl import GRPO, PromptDataModule
from lit_specrl.data import ArithmeticSource

PROMPTS_PER_EPOCH, BATCH_SIZE, GROUP = 8, 2, 4  # four steps an epoch


def variety(completions, **columns):
    """A reward that random text differs in: distinct characters."""
    return [len(set(text)) / 10 for text in completions]


def grpo(model, rewards=(variety,), **options):
    defaults = {
        "num_generations": GROUP,
        "max_completion_length": 12,
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
    }
    return GRPO(model, rewards=list(rewards), **defaults | options)


def arithmetic(**options):
    defaults = {"train": ArithmeticSource(PROMPTS_PER_EPOCH), "batch_size": BATCH_SIZE, "max_prompt_length": 64}
    return PromptDataModule(**defaults | options)


class History(L.Callback):
    """What the run learned, without what the clock says."""

    def __init__(self):
        self.steps, self.evaluations = {}, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps[pl_module.step] = {
            name: value
            for name, value in pl_module.step_metrics.items()
            if not name.startswith("timing_s/") and not name.endswith("_per_s")
        } | {"uids": batch.uids}

    def on_validation_end(self, trainer, pl_module):
        self.evaluations.append((pl_module.step, pl_module.evaluation))


def make_trainer(folder, *callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | options)


def weights_of(module):
    return {name: weight.clone() for name, weight in module.policy.state_dict().items()}


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
