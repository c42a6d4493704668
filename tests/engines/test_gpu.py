"""What the other files of this folder prove on a CPU, on a GPU: kernels, model runner and sampler are others there.

In float32 distributions are exact. In bfloat16 log-probs of engine and policy differ by 0.05 nats on average and 0.4 at
most, since each rounds on its own.
"""

import importlib.util

import pytest
import torch
from colocated import (
    NUM_SAMPLES,
    STOP_TOKEN_IDS,
    Colocated,
    chi_square_excess,
    pair_distribution,
    policy_logprobs,
    sampling_logprobs,
)

from lit_specrl import GRPO
from lit_specrl.drafting import DraftModel, NGramDrafter
from lit_specrl.engines import TransformersEngine, VLLMEngine
from lit_specrl.engines.vllm.weights import has_plain_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
DEVICE = "cuda"
OPTIONS = {"gpu_memory_utilization": 0.1, "cpu_kv_cache_gib": 1, "max_num_seqs": 400}


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=needs_vllm)])
def exact(request, tiny_model):
    """Engines that compute in float32."""
    engine = TransformersEngine() if request.param == "transformers" else VLLMEngine(dtype="float32", **OPTIONS)
    colocated = Colocated(engine, tiny_model, DEVICE)
    colocated.sync()
    yield colocated
    colocated.engine.shutdown()


@pytest.fixture(params=["none", "n-grams", "draft model"])
def drafting(request, tiny_model, make_llama):
    engine = VLLMEngine(dtype="float32", **OPTIONS)
    if request.param == "n-grams":
        engine.drafter = NGramDrafter(3, min_match=1, max_match=3)
    elif request.param == "draft model":
        engine.drafter = DraftModel(make_llama(num_hidden_layers=1, initializer_range=0.15), 3)
    colocated = Colocated(engine, tiny_model, DEVICE)
    colocated.sync()
    yield colocated
    colocated.engine.shutdown()


def expect_exact(colocated, prompt, temperature):
    rollouts = colocated.generate([prompt], group=NUM_SAMPLES, length=2, temperature=temperature)
    pairs = [response[0] * 128 + (response[1] if len(response) > 1 else 0) for response in rollouts.response_ids]
    assert abs(chi_square_excess(pairs, pair_distribution(colocated.policy, prompt, temperature))) < 6
    assert chi_square_excess(pairs, pair_distribution(colocated.policy, prompt, 1.7 - temperature)) > 20


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_tokens_follow_the_policys_softmax(exact, prompts, temperature):
    expect_exact(exact, prompts[2], temperature)


def test_sampling_logprobs_are_the_policys_after_every_weight_sync(exact, prompts):
    for seed in range(3):
        rollouts = exact.generate(prompts, group=4)
        assert {ids[-1] in STOP_TOKEN_IDS for ids in rollouts.response_ids} == {True, False}
        expected = policy_logprobs(exact.policy, rollouts, 1.0)
        torch.testing.assert_close(sampling_logprobs(rollouts), expected, atol=5e-3, rtol=0)
        exact.perturb(seed)
        exact.sync()


def test_equal_seeds_give_equal_rollouts(exact, prompts):
    assert exact.generate(prompts, group=4).response_ids == exact.generate(prompts, group=4).response_ids


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drafts_change_no_distribution(drafting, prompts, temperature):
    expect_exact(drafting, prompts[2], temperature)


@needs_vllm
@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_engine_that_has_slept_takes_over_the_weights_and_keeps_its_drafter(level, tiny_model, make_llama, prompts):
    engine = VLLMEngine(dtype="bfloat16", sleep_level=level, **OPTIONS)
    engine.drafter = DraftModel(make_llama(num_hidden_layers=1, initializer_range=0.15), 3)
    colocated = Colocated(engine, tiny_model, DEVICE)
    colocated.sync()
    drafter = engine._speculation.fingerprint()
    for seed in range(3):
        rollouts = colocated.generate(prompts, group=8)
        difference = (sampling_logprobs(rollouts) - policy_logprobs(colocated.policy, rollouts, 1.0)).abs()
        assert difference.mean() < 0.05
        assert difference.max() < 0.4
        engine.sleep()
        if level == 2:
            assert engine.policy_version is None  # what generates next must be handed over
        colocated.perturb(seed)
        colocated.sync()
        assert engine._speculation.fingerprint() == drafter
    engine.shutdown()


@needs_vllm
def test_weights_are_copied_in_place(exact):
    if isinstance(exact.engine, VLLMEngine):
        assert exact.engine.llm.apply_model(has_plain_weights) == [True]


def test_a_resumed_run_learns_what_the_uninterrupted_one_learns(fit_on_gpu, tmp_path):
    """Up to rounding: kernels of a GPU add in no fixed order."""
    whole = fit_on_gpu(tmp_path / "whole", max_steps=4)
    fit_on_gpu(tmp_path / "half", max_steps=2)
    resumed = fit_on_gpu(tmp_path / "half", max_steps=4, resume=True)
    for ours, theirs in zip(resumed, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.fixture
def fit_on_gpu(tiny_model):
    from lightning.pytorch.callbacks import ModelCheckpoint
    from training import arithmetic, make_trainer

    def fit(folder, max_steps, resume=False):
        module = GRPO(
            tiny_model, rewards=[distinct_tokens], num_generations=4, max_completion_length=12, micro_batch_tokens=256
        )
        trainer = make_trainer(
            ModelCheckpoint(folder, save_last=True), accelerator=DEVICE.replace("cuda", "gpu"), max_steps=max_steps
        )
        trainer.fit(module, datamodule=arithmetic(), ckpt_path=folder / "last.ckpt" if resume else None)
        return [parameter.detach().cpu() for parameter in module.policy.parameters()]

    return fit


def distinct_tokens(completion_ids, **columns):
    return [len(set(ids)) / len(ids) for ids in completion_ids]
