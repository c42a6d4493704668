"""Two processes on one machine, which learn from their own prompts what one process learns from all of them.

Run as a script, this file is what the two processes do.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from rendezvous import OF_A_LAUNCHED_RANK, free_port
from torch import distributed as dist
from training import QUESTIONS, make_trainer, with_many_stops

from lit_specrl import DAPO, GRPO, PPO, DynamicSampling, Environment, KLPenalty, PromptDataModule, SeparateCritic
from lit_specrl.callbacks import PrefixCache, SpeculativeRollout
from lit_specrl.data import PromptSource
from lit_specrl.distributed.collectives import (
    average_gradients,
    gather_objects,
    gather_rows,
    max_over_ranks,
    num_ranks,
    sum_over_ranks,
)
from lit_specrl.engines import TransformersEngine
from lit_specrl.models.policy import Policy
from lit_specrl.prefix_cache import BoundedShare, BySignal

SGD = partial(torch.optim.SGD, lr=0.1)


class Questions(PromptSource):
    name = "questions"

    def __init__(self, questions):
        self.questions = questions

    def load(self):
        return [{"question": question, "answer": str(len(question))} for question in self.questions]


def small_tokens(prompts, completion_ids, **columns):
    """Share of tokens below 60; nothing for responses that begin with a multiple of four."""
    return [None if ids[0] % 4 == 0 else sum(token < 60 for token in ids) / len(ids) for ids in completion_ids]


def one_question(prompts, completion_ids, **columns):
    """Applies to a single question, so on one rank only."""
    return [
        len(set(ids)) / 10 if "Why?" in prompt else None for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def spread_on_the_first_rank(prompts, **columns):
    """Rows of a group differ on rank 0 and nowhere else."""
    on_second_rank = dist.is_initialized() and dist.get_rank() == 1
    return [0.0 if on_second_rank else float(row % 2) for row in range(len(prompts))]


class OneQuestionGoesOn(Environment):
    """Three turns to a single question, so on one rank only; one turn to the others."""

    def reset(self, row):
        self.left = 3 if "Why?" in row["prompt"] else 1

    def step(self, text):
        self.left -= 1
        return "a" if self.left else None


class TogetherEngine(TransformersEngine):
    """All ranks must call it when one does, as those that hold one engine between them."""

    generates_together = True

    def continue_rows(self, request, rows, meter):
        gather_objects(len(rows))
        return super().continue_rows(request, rows, meter)


COMMON = {"max_completion_length": 12, "micro_batch_tokens": 96, "optimizer": SGD}
RUNS = {
    "GRPO": partial(GRPO, rewards=[small_tokens, one_question], num_generations=4, loss_type="grpo", **COMMON),
    "GRPO, batch deviation": partial(
        GRPO,
        rewards=[small_tokens],
        num_generations=4,
        scale_rewards="batch",
        loss_type="dapo",
        num_iterations=2,
        **COMMON,
    ),
    "GRPO, cached": partial(GRPO, rewards=[small_tokens], num_generations=4, **COMMON),
    "GRPO, cached in part": partial(GRPO, rewards=[small_tokens], num_generations=4, **COMMON),
    "GRPO, turns": partial(
        GRPO,
        rewards=[small_tokens],
        num_generations=4,
        environment=OneQuestionGoesOn(),
        **COMMON | {"max_completion_length": 24},
    ),
    "PPO": lambda model: PPO(
        model,
        rewards=[small_tokens],
        critic=SeparateCritic(optimizer=partial(torch.optim.SGD, lr=0.1)),
        num_generations=2,
        lam=0.9,
        beta=0.1,
        kl=KLPenalty("k1", in_reward=True, target=0.01, horizon=32),
        **COMMON,
    ),
    "DAPO": partial(
        DAPO,
        rewards=[spread_on_the_first_rank],
        num_generations=2,
        dynamic_sampling=DynamicSampling(max_rounds=3),
        overlong_buffer=0,
        **COMMON,
    ),
}
CACHES = {
    "GRPO, cached": lambda: PrefixCache(1.5),
    "GRPO, cached in part": lambda: PrefixCache(
        1.5, reuse_policy=BySignal(BoundedShare(0.7, drawn=True), tolerance=0.2)
    ),
}
ENGINES = {"GRPO, turns": lambda: SpeculativeRollout(TogetherEngine())}
NUM_STEPS = {
    "GRPO": 3,
    "GRPO, turns": 3,
    "GRPO, cached": 3,
    "GRPO, cached in part": 6,
    "GRPO, batch deviation": 2,
    "PPO": 3,
    "DAPO": 1,
}


class History(L.Callback):
    """What each step reports, and the prompts that it began with."""

    def __init__(self):
        self.steps, self.prompts = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(pl_module.step_metrics)
        self.prompts.append(batch.prompts)


def train(name, model, questions=QUESTIONS, **trainer_options):
    """A run whose every step sees all questions; returns the weights and what the steps reported."""
    history = History()
    callbacks = [history, *(made[name]() for made in (CACHES, ENGINES) if name in made)]
    trainer = make_trainer(*callbacks, max_epochs=NUM_STEPS[name], **trainer_options)
    module = RUNS[name](model)
    validation = Questions(QUESTIONS[:3])
    data = PromptDataModule(
        Questions(questions), validation=validation, batch_size=len(questions), max_prompt_length=128
    )
    trainer.fit(module, datamodule=data)
    return {
        "weights": flat(module.parameters()),
        "steps": history.steps,
        "prompts": history.prompts,
        "evaluation": module.evaluation,
    }


def flat(parameters):
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def what_ranks_tell_each_other():
    """Of every function in `ranks.py`; rank r holds r + 1 rows."""
    rank = dist.get_rank()
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
    parameters[0].grad = torch.tensor([1.0, 10.0]) * (rank + 1)
    average_gradients(parameters)
    total = torch.tensor([1, 10]) * (rank + 1)
    rows, own = gather_rows(torch.arange(2.0 * rank, 4.0 * rank + 2).view(rank + 1, 2))
    return {
        "num_ranks": num_ranks(),
        "sum": sum_over_ranks(total).tolist(),
        "summed": total.tolist(),
        "max": [max_over_ranks(rank, torch.device("cpu")), max_over_ranks(-rank, torch.device("cpu"))],
        "objects": gather_objects({"rank": rank}),
        "rows": rows.tolist(),
        "own rows": [own.start, own.stop],
        "gradients": [
            parameter.grad if parameter.grad is None else parameter.grad.tolist() for parameter in parameters
        ],
    }


if __name__ == "__main__":
    strategy = partial(DDPStrategy, process_group_backend="gloo")
    found = {name: train(name, sys.argv[1], strategy=strategy(), devices=2) for name in RUNS}
    found["functions"] = what_ranks_tell_each_other()
    torch.save(found, f"{sys.argv[2]}/rank{dist.get_rank()}.pt")
    dist.barrier()  # the test waits for rank 0 alone
    dist.destroy_process_group()  # before either rank goes, whose connections the other may still hold


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory):
    return with_many_stops(tiny_model, tmp_path_factory.mktemp("ranks") / "model", end=18)


@pytest.fixture(scope="module")
def both_ranks(model_folder, tmp_path_factory):
    """What each of two processes found, `RUNS` one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHED_RANK},
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
    }
    command = [sys.executable, "-X", "faulthandler", __file__, model_folder, str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=240, cwd=folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def question_of(prompt):
    (question,) = [question for question in QUESTIONS if question in prompt]
    return question


def learned(steps):
    """Metrics that do not depend on how the work was divided."""
    return [
        {name: value for name, value in step.items() if not name.startswith(("timing_s/", "perf/"))} for step in steps
    ]


@pytest.mark.parametrize("name", RUNS)
def test_ranks_keep_one_policy_and_report_the_same(both_ranks, name):
    first, second = (rank[name] for rank in both_ranks)
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert learned(first["steps"]) == learned(second["steps"])
    assert first["evaluation"] == second["evaluation"]
    for of_first, of_second in zip(first["prompts"], second["prompts"], strict=True):
        assert sorted(question_of(prompt) for prompt in of_first + of_second) == sorted(QUESTIONS)


@pytest.mark.parametrize("name", ["GRPO", "GRPO, batch deviation", *CACHES, *ENGINES, "PPO"])
def test_two_ranks_learn_what_one_learns(both_ranks, model_folder, name):
    """The loss, its normalisation, the advantages, the gradient and every metric are those of all rows together."""
    one, two = train(name, model_folder, devices=1), both_ranks[0][name]
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-5, atol=1e-5)
    for of_two, of_one in zip(learned(two["steps"]), learned(one["steps"]), strict=True):
        assert of_two.keys() == of_one.keys()
        for metric, value in of_one.items():
            tolerance = 1e-4 if metric.startswith("sampling/") else 1e-5  # those measure nothing but rounding here
            assert of_two[metric] == pytest.approx(value, rel=tolerance, abs=tolerance), metric
    assert two["evaluation"] == pytest.approx(one["evaluation"], rel=1e-12)  # sums in another order

    start = flat(Policy.build(model_folder).parameters())
    assert (one["weights"][: len(start)] - start).abs().max() > 0.01
    for step in one["steps"]:
        assert step["actor/grad_norm"] > 0.1
        assert step["completions/min_length"] < step["completions/mean_length"] < step["completions/max_length"]
    assert any(step["rewards/unscored"] for step in one["steps"])
    if name in ENGINES:
        assert all(1 < step["environment/turns"] <= 1.5 for step in one["steps"])
    if name == "GRPO, cached in part":
        assert {metric for metric in two["steps"][-1] if "/offers/" in metric} <= {
            f"prefix_cache/offers/{reason}" for reason in ("informative", "equal", "renewed")
        }
        assert two["steps"][-1]["prefix_cache/saved_tokens"] > 0
    if name == "GRPO, cached":
        assert min(step["prefix_cache/reuse_fraction"] for step in one["steps"][1:]) > 0.1


def test_a_rank_without_any_spread_learns_from_the_other_and_reports_its_rounds(both_ranks, model_folder):
    """Rank 1 generates three times in vain; the step is that of one process with rank 0's prompts alone."""
    first = both_ranks[0]["DAPO"]
    (step,) = first["steps"]
    assert {name: value for name, value in step.items() if name.startswith("dynamic_sampling/")} == {
        "dynamic_sampling/rounds": 3.0,
        "dynamic_sampling/generated_groups": 12.0,  # two a round and rank
        "dynamic_sampling/dropped_groups": 4.0,  # of rank 1, which trains on the other two
        "dynamic_sampling/surplus_groups": 4.0,  # of rank 0
        "dynamic_sampling/missing_groups": 2.0,
    }
    assert (step["reward"], step["frac_reward_zero_std"]) == (0.25, 0.5)

    alone = train("DAPO", model_folder, questions=[question_of(prompt) for prompt in first["prompts"][0]], devices=1)
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-5, atol=1e-5)
    assert step["actor/grad_norm"] == pytest.approx(alone["steps"][0]["actor/grad_norm"], rel=1e-5)
    assert step["actor/grad_norm"] > 0.1
    assert step["loss"] == pytest.approx(alone["steps"][0]["loss"], abs=1e-5)


def test_what_two_ranks_tell_each_other(both_ranks):
    first, second = (rank["functions"] for rank in both_ranks)
    for found, own, part in [(first, [1, 10], [0, 1]), (second, [2, 20], [1, 3])]:
        assert found["num_ranks"] == 2
        assert (found["sum"], found["summed"]) == ([3, 30], own)
        assert found["max"] == [1, 0]
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert (found["rows"], found["own rows"]) == ([[0, 1], [2, 3], [4, 5]], part)
        assert found["gradients"] == [[1.5, 15.0], None]


def test_one_rank_is_told_what_it_says():
    value, parameter = torch.tensor([1.0, 2.0]), torch.nn.Parameter(torch.zeros(2))
    parameter.grad = value.clone()
    average_gradients([parameter])
    assert num_ranks() == 1
    assert sum_over_ranks(value) is value
    assert max_over_ranks(-3, torch.device("cpu")) == -3
    assert gather_objects({"rank": 0}) == [{"rank": 0}]
    rows, own = gather_rows(value)
    assert rows is value
    assert own == slice(0, 2)
    assert parameter.grad.tolist() == [1, 2]
