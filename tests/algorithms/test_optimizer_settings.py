"""A resumed run that asks for another optimizer or schedule."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from training import EveryStep, arithmetic, grpo, make_trainer, variety
from transformers.optimization import Adafactor

from lit_specrl import PPO
from lit_specrl.algorithms.optimizer_settings import OptimizerSettings
from lit_specrl.data import ArithmeticSource
from lit_specrl.models.critic import SharedTrunkCritic

LINEAR = partial(LinearLR, start_factor=1.0, end_factor=0.1, total_iters=8)


def warmup(optimizer, steps):
    parts = [LinearLR(optimizer, 0.1, total_iters=steps), CosineAnnealingLR(optimizer, T_max=20)]
    return SequentialLR(optimizer, parts, milestones=[steps])


def two_groups(parameters, lr=1e-3):
    """The rates of the groups are not those of the optimizer."""
    first, *rest = parameters
    return torch.optim.AdamW([{"params": [first], "lr": lr}, {"params": rest, "lr": lr, "weight_decay": 0.0}], lr=1.0)


def adam(lr=1e-3, **options):
    return partial(torch.optim.AdamW, lr=lr, **options)


def save_run(model, folder, **options):
    make_trainer(EveryStep(folder), max_steps=1).fit(grpo(model, **options), arithmetic())
    return str(folder / "1.ckpt")


def resume(model, checkpoint, **options):
    module = grpo(model, **options)
    trainer = make_trainer(EveryStep(Path(checkpoint).parent), max_steps=3)
    trainer.fit(module, arithmetic(), ckpt_path=checkpoint)
    return module


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"optimizer": adam()}, {"optimizer": adam(1e-4)}, "lr 0.001 in the checkpoint and 0.0001 here"),
        ({"optimizer": adam()}, {"optimizer": adam(weight_decay=0.1)}, "weight_decay 0.01 in the checkpoint and 0.1"),
        ({"optimizer": adam()}, {"optimizer": adam(betas=(0.8, 0.999))}, "betas.0 0.9 in the checkpoint and 0.8 here"),
        ({"lr_scheduler": LINEAR}, {"lr_scheduler": partial(LINEAR, total_iters=4)}, "total_iters 8 in the check"),
        (
            {"lr_scheduler": partial(OneCycleLR, max_lr=1e-3, total_steps=9)},
            {"lr_scheduler": partial(OneCycleLR, max_lr=1e-2, total_steps=9)},
            "max_lr 0.001 in the checkpoint and 0.01 here",
        ),
        (
            {"lr_scheduler": partial(CyclicLR, base_lr=1e-3, max_lr=1e-2, cycle_momentum=False)},
            {"lr_scheduler": partial(CyclicLR, base_lr=1e-6, max_lr=1e-2, cycle_momentum=False)},
            "lr 0.001 in the checkpoint and 1e-06 here",
        ),
        (
            {"optimizer": two_groups},
            {"optimizer": partial(two_groups, lr=1e-5)},
            "lr 0.001 in the check.* and 1e-05 here",
        ),
        (
            {"lr_scheduler": partial(warmup, steps=2)},
            {"lr_scheduler": partial(warmup, steps=3)},
            "_milestones.0 2 in the checkpoint and 3 here; _schedulers.0.total_iters 2",
        ),
    ],
)
def test_other_arguments_are_told(tiny_model, tmp_path, then, now, said):
    checkpoint = save_run(tiny_model, tmp_path, **then)
    with pytest.warns(UserWarning, match=said):
        module = resume(tiny_model, checkpoint, **now)
    if "optimizer" in now:
        assert module.step_metrics["actor/lr"] == 1e-3, "the checkpoint's"
        assert module.optimizers().param_groups[-1]["lr"] == 1e-3
    # and once more, from the checkpoint of the run that was told
    with pytest.warns(UserWarning, match=said):
        resume(tiny_model, str(tmp_path / "2.ckpt"), **now)


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (
            {"optimizer": partial(torch.optim.SGD, lr=1e-3, momentum=0.9)},
            {},
            "optimizer SGD, and does not fit this run's A",
        ),
        (
            {"lr_scheduler": LINEAR},
            {"lr_scheduler": partial(LambdaLR, lr_lambda=lambda step: 1.0)},
            "LinearLR, and doe",
        ),
        (
            {"lr_scheduler": LINEAR},
            {"lr_scheduler": partial(warmup, steps=2)},
            "LinearLR, and does not fit this run's Seq",
        ),
        ({"optimizer": two_groups}, {}, "AdamW and AdamW, and does not fit this run's AdamW"),
        ({}, {"optimizer": partial(torch.optim.SGD, lr=1e-3)}, "optimizer AdamW, and does not fit this run's SGD"),
        ({"optimizer": partial(torch.optim.SGD, lr=1e-3)}, {}, "optimizer SGD, and does not fit this run's AdamW"),
        ({}, {"lr_scheduler": LINEAR}, "lr_scheduler none, and does not fit this run's LinearLR"),
        ({"lr_scheduler": LINEAR}, {}, "lr_scheduler LinearLR, and does not fit this run's none"),
        (
            {"lr_scheduler": LINEAR},
            {"lr_scheduler": partial(CosineAnnealingLR, T_max=9)},
            "LinearLR, and does not fit this run's Cos",
        ),
    ],
)
def test_other_classes_are_refused(tiny_model, tmp_path, then, now, said):
    checkpoint = save_run(tiny_model, tmp_path, **then)
    with pytest.raises(MisconfigurationException, match=said):
        resume(tiny_model, checkpoint, **now)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": adam()},
        {"optimizer": adam(), "lr_scheduler": LINEAR},
        {"lr_scheduler": partial(warmup, steps=2)},
        {"lr_scheduler": partial(LambdaLR, lr_lambda=lambda step: 0.9**step)},
    ],
)
def test_the_same_settings_are_not_worth_a_word(tiny_model, tmp_path, options):
    checkpoint = save_run(tiny_model, tmp_path, **options)
    if "optimizer" in options:
        options |= {"optimizer": adam(foreach=True)}  # the same steps
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the optimizer goes on")
        resume(tiny_model, checkpoint, **options)


def test_a_validation_of_a_checkpoint_takes_no_settings_from_it(tiny_model, tmp_path):
    checkpoint = save_run(tiny_model, tmp_path)
    module, trainer = grpo(tiny_model, optimizer=adam(1e-4)), make_trainer(max_steps=1)
    data = arithmetic(validation=ArithmeticSource(2))
    trainer.validate(module, data, ckpt_path=checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the optimizer goes on")
        trainer.fit(module, data)
    assert module.step_metrics["actor/lr"] == 1e-4


def test_the_critic_has_settings_of_its_own(tiny_model, tmp_path):
    def run(lr, **options):
        module = PPO(tiny_model, [variety], critic=SharedTrunkCritic(optimizer=adam(lr)), max_completion_length=8)
        make_trainer(EveryStep(tmp_path), max_steps=2).fit(module, arithmetic(), **options)

    run(1e-3)
    with pytest.warns(UserWarning, match="lr 0.001 in the checkpoint and 0.01 here"):
        run(1e-2, ckpt_path=str(tmp_path / "1.ckpt"))


def test_checkpoints_that_do_not_say_are_taken():
    settings = OptimizerSettings()
    settings.record([torch.optim.AdamW([torch.zeros(1, requires_grad=True)])], [])
    settings.load_state_dict({})
    assert settings.state_dict()["optimizer"][0]["class"] == "AdamW"


def test_a_resume_that_was_refused_leaves_nothing_behind(tiny_model, tmp_path):
    checkpoint = save_run(tiny_model, tmp_path, lr_scheduler=LINEAR)
    module = grpo(tiny_model, optimizer=adam(1e-4))
    with pytest.raises(MisconfigurationException, match="LinearLR, and does not fit this run's none"):
        make_trainer(max_steps=3).fit(module, arithmetic(), ckpt_path=checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the optimizer goes on")
        make_trainer(max_steps=module.step + 1).fit(module, arithmetic())
    assert module.step_metrics["actor/lr"] == 1e-4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr_scheduler": ReduceLROnPlateau}, r"ReduceLROnPlateau cannot be used: its step\(\) wants metrics"),
        ({"optimizer": torch.optim.LBFGS}, r"LBFGS cannot be used: its step\(\) wants closure"),
        (
            {"lr_scheduler": lambda made: {"scheduler": LINEAR(made)}},
            "an optimizer or a schedule is expected, got dict",
        ),
    ],
)
def test_what_cannot_be_stepped_alone_is_refused(tiny_model, options, said):
    with pytest.raises(MisconfigurationException, match=said):
        make_trainer(max_steps=1).fit(grpo(tiny_model, **options), arithmetic())


def test_an_optimizer_may_find_its_own_rate(tiny_model):
    module = grpo(tiny_model, optimizer=Adafactor)
    make_trainer(max_steps=1).fit(module, arithmetic())
    assert module.step == 1 and "actor/lr" not in module.step_metrics
