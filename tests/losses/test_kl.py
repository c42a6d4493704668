import math

import pytest
import torch

from lit_specrl.losses import kl_penalty

ONE = torch.ones(1, 1, dtype=torch.bool)


@pytest.fixture
def logits():
    return torch.randn(7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def reference(logits):
    return (logits + torch.linspace(-1, 1, 7, dtype=torch.float64)).log_softmax(-1)


def over_the_vocabulary(logits, reference, estimator):
    """The estimate for every token of a vocabulary of 7, and the policy's log-probs."""
    policy = logits.log_softmax(-1)
    kl = kl_penalty(policy[None], reference[None], torch.ones(1, 7, dtype=torch.bool), estimator)
    return kl[0], policy


@pytest.mark.parametrize("estimator", ["k1", "k3", "kl", "low_var_kl", "k1+", "k3+"])
def test_the_expected_value_is_the_divergence(estimator, logits, reference):
    kl, policy = over_the_vocabulary(logits, reference, estimator)
    torch.testing.assert_close((policy.exp() * kl).sum(), (policy.exp() * (policy - reference)).sum())


@pytest.mark.parametrize("estimator", ["k2", "mse", "k1+", "k2+", "k3+", "abs+"])
def test_the_expected_gradient_is_that_of_the_divergence(estimator, logits, reference):
    logits.requires_grad_()
    policy = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    kl, policy = over_the_vocabulary(logits, reference, estimator)
    (actual,) = torch.autograd.grad((policy.detach().exp() * kl).sum(), logits)
    torch.testing.assert_close(actual, expected)


def test_k3_as_a_loss_descends_the_reverse_divergence(logits, reference):
    logits.requires_grad_()
    policy = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits)
    kl, policy = over_the_vocabulary(logits, reference, "k3")
    (actual,) = torch.autograd.grad((policy.detach().exp() * kl).sum(), logits)
    torch.testing.assert_close(actual, expected)


def test_values_by_hand():
    policy, reference = torch.log(torch.tensor([[0.5]])), torch.log(torch.tensor([[0.25]]))
    values = {name: kl_penalty(policy, reference, ONE, name).item() for name in ("k1", "abs", "k2", "k3")}
    log2 = math.log(2)
    assert values == pytest.approx({"k1": log2, "abs": log2, "k2": log2**2 / 2, "k3": 0.5 + log2 - 1})


def test_k3_is_not_clamped_at_ten():
    """verl clamps there, which removes the gradient from the tokens that departed most."""
    policy = torch.tensor([[-4.0]], requires_grad=True)
    kl = kl_penalty(policy, torch.tensor([[0.0]]), ONE)
    kl.sum().backward()
    assert kl.item() == pytest.approx(math.exp(4) - 5)
    assert policy.grad.item() == pytest.approx(1 - math.exp(4))


def test_k3_of_an_extreme_difference_stays_finite_and_never_pushes_the_wrong_way():
    policy = torch.tensor([[-1e3, 0.0]], requires_grad=True)
    kl = kl_penalty(policy, torch.tensor([[0.0, -1e3]]), torch.ones(1, 2, dtype=torch.bool))
    kl.sum().backward()
    assert kl.isfinite().all()
    assert policy.grad.tolist() == [[0, 1]]


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3", "k3+"])
def test_garbage_on_padding_reaches_neither_value_nor_gradient(estimator):
    policy = torch.tensor([[-1.0, -torch.inf]], requires_grad=True)
    kl = kl_penalty(policy, torch.tensor([[-2.0, torch.nan]]), torch.tensor([[True, False]]), estimator)
    kl.sum().backward()
    assert kl[0, 1] == policy.grad[0, 1] == 0
    assert policy.grad[0, 0] != 0


def test_the_reference_gets_no_gradient_and_bfloat16_is_widened():
    policy = torch.tensor([[-1.0]], dtype=torch.bfloat16, requires_grad=True)
    reference = torch.tensor([[-2.0]], dtype=torch.bfloat16, requires_grad=True)
    kl = kl_penalty(policy, reference, ONE)
    kl.sum().backward()
    assert kl.dtype == torch.float32
    assert reference.grad is None


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="got 'k4'"):
        kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), ONE, "k4")
