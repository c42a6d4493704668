"""Families of models whose weights vLLM reads under other names, in other pieces, or keeps a state for."""

import pytest
from architectures import save_family
from colocated import Colocated, build_engine, policy_logprobs, sampling_logprobs


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Gemma 3 with images", "LFM2"])
def test_vllm_samples_with_the_weights_that_it_is_given(family, prompts, tmp_path):
    """A mixture of experts, a composite model, and one with convolutions.

    Experts went over in one tensor, which vLLM 0.32 leaves out without an error: its samples were wrong by 7 nats.
    """
    started = Colocated(build_engine("vllm"), save_family(family, tmp_path))
    try:
        for seed in range(2):
            started.perturb(seed)
            started.sync()
            rollouts = started.generate(prompts, group=3)
            expected = policy_logprobs(started.policy, rollouts, 1.0)
            assert (sampling_logprobs(rollouts) - expected).abs().max() < 1e-3
    finally:
        started.engine.shutdown()
