"""Two processes with sharded weights (FSDP2), an engine each or one between them, learn what one process learns."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lit_specrl.cli.export import export_checkpoint

EXACT = ["grpo", "ppo", "lora", "offload", "one engine"]
STEPS = 3


@pytest.fixture(scope="module")
def runs(make_llama, tmp_path_factory):
    """(name, number of ranks, rank) -> what it found; and the folder of the checkpoints."""
    model = make_llama(num_attention_heads=4, num_key_value_heads=2)  # an engine of two ranks halves the heads
    GenerationConfig(eos_token_id=list(range(2, 14))).save_pretrained(model)
    folder = tmp_path_factory.mktemp("sharded")
    program = [sys.executable, str(Path(__file__).with_name("sharded_runs.py")), model, str(folder)]
    outcome = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert outcome.returncode == 0, outcome.stderr[-5000:]
    found = {tuple(path.stem.rsplit("-", 2)): torch.load(path, weights_only=False) for path in folder.glob("*.pt")}
    return found, folder


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_learn_what_one_learns(runs, name):
    """Weights that were whole for the verification took part in neither the norm of the gradient nor its clipping."""
    found, _ = runs
    one, first, second = (found[name, *which] for which in (("1", "0"), ("2", "0"), ("2", "1")))
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-5, atol=1e-5)
    assert len(one["steps"]) == len(first["steps"]) == STEPS
    for of_two, of_one in zip(first["steps"], one["steps"], strict=True):
        assert of_two.keys() == of_one.keys()
        for metric, value in of_one.items():
            tolerance = 1e-4 if metric.startswith("sampling/") else 1e-5  # those measure nothing but rounding here
            assert of_two[metric] == pytest.approx(value, rel=tolerance, abs=tolerance), metric
        assert of_one["actor/grad_norm"] > 0.01


@pytest.mark.parametrize("name", EXACT)
def test_rollouts_are_those_of_one_rank(runs, name):
    """Each rank's are the half that it owns; the second and third epoch begin with what the first has said."""
    found, _ = runs
    halves = [found[name, "2", rank]["tokens"] for rank in "01"]
    assert halves[0].keys().isdisjoint(halves[1])
    assert halves[0] | halves[1] == found[name, "1", "0"]["tokens"]
    assert found[name, "2", "0"]["reuse"] == pytest.approx(found[name, "1", "0"]["reuse"])
    assert min(found[name, "1", "0"]["reuse"][1:]) > 0.1


@pytest.mark.parametrize("name", EXACT)
def test_the_engine_says_what_the_policy_says_after_every_sync(runs, name):
    found, _ = runs
    for num_ranks in "12":
        differences = [
            step["sampling/sampling_logp_difference/max"]
            for step in found[name, num_ranks, "0"]["steps"]
            if step["prefix_cache/generated_tokens"]
        ]
        assert differences and max(differences) < 1e-4


def test_a_rank_that_draws_in_vain_and_learns_nothing_meets_the_other_in_every_pass(runs):
    """Dynamic sampling: rank 1 trains on no row. One rank computed shared prompts in a pass of their own, the other did
    not, and both waited for ever."""
    found, _ = runs
    ranks = [found["dapo", "2", rank] for rank in "01"]
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)
    for step in ranks[0]["steps"]:
        assert (step["dynamic_sampling/rounds"], step["dynamic_sampling/missing_groups"]) == (2.0, 2.0)
        assert step["actor/grad_norm"] > 0.01


def test_bfloat16_is_for_computing_alone(runs):
    """The weights that are updated stay float32 on every rank; so small an update would be rounded away otherwise."""
    found, _ = runs
    ranks = [found["bf16", "2", rank] for rank in "01"]
    assert [rank["dtypes"] for rank in ranks] == [{torch.float32}] * 2
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)
    exact = found["one engine", "1", "0"]["weights"]  # the same run in float32
    for name, weight in ranks[0]["weights"].items():
        assert not torch.equal(weight, weight.bfloat16().float()), name
        assert (weight - exact[name]).abs().max() < 0.05, name


def test_one_rank_goes_on_with_every_rollout_that_two_have_cached(runs):
    found, _ = runs
    resumed = found["resumed", "1", "0"]
    assert resumed["hits"] == [1.0, 1.0]
    before = found["grpo", "2", "0"]["weights"]
    assert any(not torch.equal(before[name], weight) for name, weight in resumed["weights"].items())


@pytest.mark.parametrize("name", ["grpo", "lora"])
def test_a_checkpoint_in_shards_is_exported(runs, name, tmp_path):
    found, folder = runs
    checkpoint = folder / f"{name}-2" / "last.ckpt"
    assert checkpoint.is_dir() and len(list(checkpoint.glob("*.distcp"))) == 2
    assert not list(checkpoint.parent.glob("*.partial"))
    exported = AutoModelForCausalLM.from_pretrained(export_checkpoint(str(checkpoint), str(tmp_path / "model")))
    torch.testing.assert_close(dict(exported.named_parameters()), found[name, "2", "0"]["weights"], rtol=0, atol=0)


def test_shards_that_are_missing_are_told_of(runs, tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.mkdir()
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be used: the folder lacks \.metadata and meta\.pt"):
        export_checkpoint(str(checkpoint), str(tmp_path / "model"))
