"""What a logger is told of the settings of a run: all of them."""

import inspect
from functools import partial

import pytest
import torch

from lit_specrl import DAPO, GAE, GRPO, PPO, ExactReward, KLPenalty, RLVRModule, SharedTrunkCritic
from lit_specrl.algorithms.hyperparameters import hyperparameters

ARGUMENTS = set(inspect.signature(RLVRModule.__init__).parameters) - {"self"}


@pytest.mark.parametrize("algorithm", [GRPO, DAPO, partial(PPO, critic=SharedTrunkCritic(warmup_steps=3))])
def test_every_argument_of_the_module_is_in_the_table(algorithm):
    settings = algorithm("no model is loaded", [ExactReward()]).settings
    assert {name.partition(".")[0] for name in settings} == ARGUMENTS | {"algorithm"}
    assert all(isinstance(value, (str, int, float)) for value in settings.values())


def test_two_runs_that_differ_look_different():
    """`delta`, `clip_ratio_c`, the KL estimator, the critic and others were not in the table."""
    module = partial(GRPO, "no model is loaded", [ExactReward(weight=2.0)])
    plain = module().settings
    changes = {
        "delta": {"delta": 2.0},
        "clip_ratio_c": {"clip_ratio_c": 3.0},
        "kl.estimator": {"kl": KLPenalty("k1")},
        "importance_sampling": {"importance_sampling": None},
        "mask_truncated_completions": {"mask_truncated_completions": True},
        "lora.r": {"lora": {"r": 8}},
        "top_k": {"top_k": 5, "importance_sampling": None},
        "optimizer": {"optimizer": partial(torch.optim.SGD, lr=0.5)},
        "gradient_checkpointing": {"gradient_checkpointing": True},
    }
    for name, options in changes.items():
        assert module(**options).settings.get(name) != plain.get(name), name
    assert plain["rewards"] == "2 exact"


def test_objects_show_their_class_and_plain_attributes():
    table = hyperparameters({"estimator": GAE(0.9, 0.8), "kl": KLPenalty("k1", True), "make": partial(dict, lr=0.5)})
    assert table["estimator"] == "GAE(gamma=0.9, lam=0.8, whiten=True)"
    assert (table["kl.estimator"], table["kl.in_reward"], table["kl.target"]) == ("k1", True, "none")
    assert table["make"] == "dict(lr=0.5)"
