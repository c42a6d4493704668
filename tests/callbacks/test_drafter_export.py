"""From the checkpoint of a run with a drafter that learns to folders that other programs load."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from reuse_runs import fit, grpo, questions
from training import assert_identical
from transformers import AutoModelForCausalLM

from lit_specrl.callbacks import DrafterDistillation, SpeculativeRollout
from lit_specrl.cli.export import export_checkpoint
from lit_specrl.drafting import DraftModel, Eagle3Drafter
from lit_specrl.engines import VLLMEngine
from lit_specrl.engines.vllm.startup import build_llm, shutdown

PROMPTS = [[5, 20, 30, 31], [7, 50, 51, 52, 9]]
ADAM = partial(torch.optim.AdamW, lr=3e-3)


def trained(model, drafter, folder):
    """Weights of the drafter after a run that has left `last.ckpt`."""
    engine = VLLMEngine(dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25)
    learner = DrafterDistillation(max_step_fraction=None, update_tokens=24, optimizer=ADAM)
    saver = ModelCheckpoint(folder, filename="last", save_top_k=1)
    fit(grpo(model), questions(folder), SpeculativeRollout(engine, drafter), learner, saver, max_epochs=3)
    return {name: weight.clone() for name, weight in learner.network.weights()}


@torch.no_grad()
def greedy(folder, num_tokens=12):
    """What transformers makes of the prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(num_tokens):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        texts.append(text[len(prompt) :])
    return texts


@pytest.mark.parametrize("kind", ["head", "model"])
def test_policy_and_drafter_are_exported_for_transformers_and_vllm(make_llama, tmp_path, kind):
    """vLLM loads both as they are and says, greedily, what transformers says."""
    model = make_llama(num_hidden_layers=3)
    start = Eagle3Drafter(None, 2) if kind == "head" else DraftModel(make_llama(num_hidden_layers=1), 2)
    weights = trained(model, start, tmp_path)
    policy, folder = tmp_path / "policy", tmp_path / "drafter"
    export_checkpoint(str(tmp_path / "last.ckpt"), str(policy), drafter=str(folder))
    drafter = type(start)(str(folder), 2)
    assert_identical(dict(drafter.network().weights()), weights)
    if kind == "model":
        return  # the folder of any causal language model

    llm = build_llm(
        str(policy),
        torch.device("cpu"),
        drafter,
        kv_cache_memory_bytes=2**28,
        load_format="auto",
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
    )
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    shutdown(llm)
    assert [list(output.outputs[0].token_ids) for output in outputs] == greedy(policy)


class OwnModel(DraftModel):
    """One's own way of drafting, with the weights of a model."""


class OwnDrafter(DraftModel):
    """No kind that could be made again."""

    def origin(self):
        return {"kind": type(self).__name__}


def test_a_drafter_of_ones_own_is_exported_as_what_it_is_made_of(make_llama, tmp_path):
    model, small = make_llama(num_hidden_layers=3), make_llama(num_hidden_layers=1)
    weights = trained(model, OwnModel(small, 2), tmp_path)
    export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "policy"), drafter=str(tmp_path / "drafter"))
    assert_identical(dict(DraftModel(str(tmp_path / "drafter"), 2).network().weights()), weights)


def test_a_drafter_that_cannot_be_made_again_is_told(make_llama, tmp_path):
    trained(make_llama(num_hidden_layers=3), OwnDrafter(make_llama(num_hidden_layers=1), 2), tmp_path)
    with pytest.raises(ValueError, match="holds the drafter OwnDrafter; only an Eagle3Drafter and a DraftModel can"):
        export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "policy"), drafter=str(tmp_path / "drafter"))


def test_a_checkpoint_without_a_drafter_has_none_to_export(tiny_model, tmp_path):
    fit(grpo(tiny_model), questions(tmp_path), ModelCheckpoint(tmp_path, filename="last", save_top_k=1))
    with pytest.raises(
        ValueError, match=r"last.ckpt holds no drafter: the run had no DrafterDistillation; export without"
    ):
        export_checkpoint(str(tmp_path / "last.ckpt"), str(tmp_path / "policy"), drafter=str(tmp_path / "drafter"))
    assert not (tmp_path / "policy").exists()
