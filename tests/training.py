"""Runs of a few steps on a CPU, and what they report."""

import json
import shutil
from functools import partial

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import GenerationConfig

from lit_specrl import GRPO, PromptDataModule
from lit_specrl.data import ArithmeticSource

QUESTIONS = ["Hi", "What is 2 + 3?", "Why?", "Name a colour of the sky, please."]
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


def small_tokens(completion_ids, **columns):
    """Share of tokens below 64."""
    return [sum(token < 64 for token in ids) / len(ids) for ids in completion_ids]


def with_many_stops(model, folder, end=14):
    """A copy of the model with so many end-of-text tokens, from 2 up to `end`, that responses differ in length."""
    shutil.copytree(model, folder)
    GenerationConfig(eos_token_id=list(range(2, end))).save_pretrained(folder)
    return str(folder)


def write_questions(path, texts=QUESTIONS):
    """The texts as a file, with their lengths, and 5 for all answers."""
    rows = [{"question": text, "answer": "5", "length": len(text)} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def without_clock(metrics):
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith("timing_s/") and not name.endswith("_per_s")
    }


class History(L.Callback):
    """What the run learned, without what the clock says."""

    def __init__(self):
        self.steps, self.evaluations = {}, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps[pl_module.step] = without_clock(pl_module.step_metrics) | {"uids": batch.uids}

    def on_validation_end(self, trainer, pl_module):
        self.evaluations.append((pl_module.step, pl_module.evaluation))


class EveryStep(L.Callback):
    """Saves after each step, also where the policy was not updated."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{pl_module.step}.ckpt")


def make_trainer(*callbacks, **options):
    """An epoch on the CPU that writes nothing but what its callbacks do."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | options)


def weights_of(module):
    return {name: weight.detach().clone() for name, weight in module.policy.state_dict().items()}


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
