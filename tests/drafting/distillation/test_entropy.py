import math

import torch

from lit_specrl.drafting.distillation.buffer import DistillationSample
from lit_specrl.drafting.distillation.entropy import policy_entropy
from lit_specrl.drafting.distillation.samples import mean_entropies


def response(*top_probs):
    """A response whose tokens' most probable ones have the given probabilities."""
    length, k = len(top_probs), len(top_probs[0])
    return DistillationSample(
        "a",
        torch.zeros(1 + length, dtype=torch.int32),
        1,
        torch.zeros(length, 0),
        torch.arange(k, dtype=torch.int32).expand(length, k).clone(),
        torch.tensor(top_probs).log(),
        torch.zeros(length),
        1.0,
        1.0,
        0,
    )


def test_with_all_tokens_it_is_the_entropy():
    logprobs = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    expected = torch.distributions.Categorical(logits=logprobs).entropy()
    torch.testing.assert_close(policy_entropy(logprobs.sort(-1).values), expected)


def test_the_others_are_one_outcome():
    """0.25, 0.25 and a rest of 0.5."""
    expected = torch.tensor([0.5 * math.log(4) + 0.5 * math.log(2)])
    torch.testing.assert_close(policy_entropy(torch.tensor([[0.25, 0.25]]).log()), expected)


def test_with_fewer_tokens_it_is_less():
    logprobs = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    by_k = torch.stack([policy_entropy(logprobs.topk(k).values) for k in range(1, 8)])  # [k, T]
    assert (by_k.diff(dim=0) >= -1e-6).all() and (by_k[0] > 0).all()


def test_a_policy_that_is_sure_has_none():
    """Also where rounding brings it above 1, or a stored token has no probability."""
    logprobs = torch.tensor([[0.0, -torch.inf], [1e-7, -200.0]])
    torch.testing.assert_close(policy_entropy(logprobs), torch.zeros(2), atol=1e-6, rtol=0)


def test_responses_have_the_mean_of_the_places_that_can_be_drafted():
    """The first place is not drafted, and a response of one token has none."""
    samples = [response((0.25, 0.25), (0.5, 0.5), (1.0, 0.0)), response((0.5, 0.5))]
    torch.testing.assert_close(mean_entropies(samples), torch.tensor([math.log(2) / 2, 0.0]))
