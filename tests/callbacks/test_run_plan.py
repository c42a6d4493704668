"""The table before a run: what it says, and that it comes before anything large is loaded."""

import re
from functools import partial

import pytest
import torch
from reuse_runs import GROUP, MAX_LENGTH, fit, grpo, questions
from training import small_tokens

from lit_specrl import PPO, SeparateCritic, SharedTrunkCritic
from lit_specrl.callbacks import (
    AdaptiveScheduler,
    DrafterDistillation,
    PrefixCache,
    RunPlan,
    SpeculativeRollout,
    run_plan,
)
from lit_specrl.drafting import DraftModel
from lit_specrl.engines import VLLMEngine
from lit_specrl.models.policy import Policy


class NotLoadedError(Exception):
    pass


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """The rows of the table of a run, by name; no model is ever loaded."""
    monkeypatch.setenv("COLUMNS", "300")

    def refuse(*arguments, **options):
        raise NotLoadedError

    monkeypatch.setattr(Policy, "build", refuse)

    def plan(module, *callbacks, **options):
        with pytest.raises(NotLoadedError):
            fit(module, questions(tmp_path), *callbacks, RunPlan(), **{"max_epochs": 3} | options)
        lines = [re.split(r"[│|]", line)[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
        return {name.strip(): value.strip() for name, value in lines}

    return plan


def test_a_plain_run(plan, tiny_model):
    rows = plan(grpo(tiny_model, num_iterations=2, num_minibatches=2, beta=0.1))
    assert rows["a step"] == f"2 prompts x {GROUP} = 8 rollouts; 2 passes x 2 minibatches = 4 updates of 4 rollouts"
    assert rows["responses"] == f"{GROUP} a prompt of up to {MAX_LENGTH} tokens, temperature 1"
    assert rows["the run"] == "6 steps, 2 an epoch of 4 prompts"
    assert rows["policy"].endswith("0.1 M parameters, float32")
    assert rows["engine"] == "TransformersEngine"
    assert (rows["on"], rows["off"]) == (
        "-",
        "PrefixCache, SpeculativeRollout, AdaptiveScheduler, DrafterDistillation",
    )
    assert rows["ranks"] == "1 x cpu, SingleDeviceStrategy"
    assert re.fullmatch(r"32-true \(the processor has .*\)", rows["precision"])
    assert re.search(r"torch 2\.\d+", rows["versions"])
    assert rows["memory of a rank"].endswith("weights 0.01, gradients 0.01, reference 0.01")  # plain SGD keeps nothing


def test_lightning_counts_updates(plan, tiny_model):
    rows = plan(grpo(tiny_model, num_iterations=2, num_minibatches=2), max_steps=6)
    told = "2 steps, 2 an epoch of 4 prompts; max_steps=6 counts updates of the policy, 4 a step"
    assert rows["the run"] == told
    assert plan(grpo(tiny_model), max_steps=3)["the run"] == "3 steps, 2 an epoch of 4 prompts"


@pytest.mark.parametrize("critic", [None, SeparateCritic(), SharedTrunkCritic()])
def test_a_run_of_so_many_updates_has_as_many_steps_as_the_table_says(tiny_model, tmp_path, critic):
    make = grpo if critic is None else partial(PPO, rewards=[small_tokens], num_generations=GROUP, critic=critic)
    module = make(tiny_model, num_minibatches=2, max_completion_length=MAX_LENGTH)
    trace = fit(module, questions(tmp_path), max_epochs=-1, max_steps=6)
    assert len(trace.metrics) == 3


def test_everything_on(plan, make_llama):
    drafter = DraftModel(make_llama(num_hidden_layers=1), 2)
    callbacks = [
        SpeculativeRollout(VLLMEngine(cpu_kv_cache_gib=3), drafter),
        PrefixCache(max_bytes=2**29),
        AdaptiveScheduler(),
        DrafterDistillation(max_bytes=2**28),
    ]
    rows = plan(grpo(make_llama(num_hidden_layers=3)), *callbacks, max_steps=5)
    assert rows["the run"] == "5 steps, 2 an epoch of 4 prompts"
    assert re.fullmatch(
        r"vllm.* 0\.32\..*, (bfloat16|float32), in process, up to 8 rows at once, up to 2 tokens by DraftModel",
        rows["engine"],
    )
    assert (rows["on"].count(","), rows["off"]) == (3, "-")
    for part in ("engine 3.1", "prefix cache, at most 0.50", "drafter's samples, at most 0.25"):
        assert part in rows["memory of a rank"]


def test_adapters_and_a_critic(plan, tiny_model):
    rows = plan(grpo(tiny_model, lora={"r": 4, "target_modules": "all-linear"}, beta=0.1))
    assert rows["policy"].endswith("M of them trained (LoRA)") and "reference" not in rows["memory of a rank"]
    ppo = PPO(
        tiny_model,
        [lambda completions, **columns: [1.0] * len(completions)],
        critic=SeparateCritic(),
        num_generations=GROUP,
        max_completion_length=MAX_LENGTH,
    )
    assert plan(ppo)["memory of a rank"].endswith("critic 0.01")


def test_a_run_that_cannot_fit_is_warned_about(plan, tiny_model, monkeypatch):
    monkeypatch.setattr(run_plan, "device_memory", lambda device: 2**20)
    with pytest.warns(UserWarning, match=r"the run needs at least 0.\d\d GiB, cpu has 0.01: use strategy='fsdp2'"):
        plan(grpo(tiny_model, optimizer=torch.optim.AdamW))


def test_an_engine_that_is_too_short_for_the_data_is_refused_before_anything_is_loaded(plan, tiny_model, tmp_path):
    engine = VLLMEngine(max_model_len=64 + MAX_LENGTH - 1)
    with pytest.raises(ValueError, match=r"max_model_len=75 .* up to 76 tokens; raise it, or leave it out"):
        fit(grpo(tiny_model), questions(tmp_path), SpeculativeRollout(engine))


def test_ranks_that_engines_cannot_be_divided_into_are_refused(tiny_model, tmp_path):
    with pytest.raises(
        ValueError, match="tensor_parallel_size=2 ranks hold one engine, which 1 ranks cannot be divided"
    ):
        fit(grpo(tiny_model), questions(tmp_path), SpeculativeRollout(VLLMEngine(tensor_parallel_size=2)))
