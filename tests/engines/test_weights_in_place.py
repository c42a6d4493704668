"""Weights that are copied into the engine's own, as on a GPU. On a CPU vLLM packs its weights, which is kept from it
here."""

import pytest
import torch
from colocated import Colocated, build_engine, policy_logprobs, sampling_logprobs
from torch.nn.functional import linear

from lit_specrl.engines.vllm.weights import has_plain_weights


@pytest.fixture(scope="module", params=["llama", "qwen"])
def in_place(request, tiny_model, tiny_qwen):
    """Untied and tied embeddings."""
    from vllm.model_executor.layers import utils

    def leave_weights(layer, remove_weight):
        layer.cpu_linear = linear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "dispatch_cpu_unquantized_gemm", leave_weights)
        started = Colocated(build_engine("vllm"), tiny_model if request.param == "llama" else tiny_qwen)
        yield started
        started.engine.shutdown()


def test_the_engine_generates_with_the_weights_that_were_copied(in_place, prompts, monkeypatch):
    """Each new policy gives the tokens their log-probs; vLLM's way of loading anew is not taken."""

    def refuse(*arguments, **options):
        raise AssertionError("weights are loaded, not copied")

    monkeypatch.setattr(in_place.engine.llm, "collective_rpc", refuse)
    seen = []
    for seed in range(3):
        in_place.perturb(seed)
        in_place.sync()
        said = in_place.generate(prompts, group=4)
        seen.append(said.response_ids)
        expected = policy_logprobs(in_place.policy, said, 1.0)
        torch.testing.assert_close(sampling_logprobs(said), expected, rtol=0, atol=1e-3)
    assert seen[0] != seen[1] != seen[2]


def test_weights_are_copied_not_replaced(in_place):
    [before] = in_place.engine.llm.apply_model(lambda model: [w.data_ptr() for w in model.parameters()])
    in_place.sync()
    [after] = in_place.engine.llm.apply_model(lambda model: [w.data_ptr() for w in model.parameters()])
    assert before == after


def test_a_policy_that_lacks_weights_is_refused(in_place):
    weights = [(name, weight) for name, weight in in_place.policy.named_weights() if "layers.1.mlp.down" not in name]
    with pytest.raises(RuntimeError, match=r"no weights for 1 parameters of the engine, such as model\.layers\.1\.mlp"):
        in_place.engine.load_weights(weights, 10_000)
    in_place.sync()


class Experts(torch.nn.Module):
    quant_method = type("UnquantizedFusedMoEMethod", (), {})()


class Packed(torch.nn.Module):
    quant_method = type("UnquantizedLinearMethod", (), {})()

    def cpu_linear(self):
        """Multiplies with a packed copy."""


class MLAAttention(torch.nn.Module):
    """Multiplies with products of its weights."""


@pytest.mark.parametrize("module", [Experts, Packed, MLAAttention])
def test_weights_that_vllm_has_changed_are_not_plain(module):
    assert has_plain_weights(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert not has_plain_weights(torch.nn.Sequential(torch.nn.Linear(2, 2), module()))
