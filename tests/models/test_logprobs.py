import pytest
import torch

from lit_specrl.models.logprobs import token_logprobs

NUM_TOKENS, HIDDEN, VOCABULARY = 7, 16, 33


def random_inputs(dtype=torch.float32, num_tokens=NUM_TOKENS):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    upstream = torch.randn(num_tokens, generator=generator)  # a gradient of its own for every token
    return hidden, weight, targets, upstream


def plain_logprobs(hidden, weight, targets, temperature):
    """Log-probs and entropies from all logits at once, in float64."""
    logprobs = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs[torch.arange(len(targets)), targets], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 3, NUM_TOKENS, 100])
def test_values_and_gradients_are_those_of_log_softmax(chunk_tokens, temperature):
    hidden, weight, targets, upstream = random_inputs()
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature, chunk_tokens)
    gradients = torch.autograd.grad(logprobs, (hidden, weight), upstream)

    expected_logprobs, expected_entropy = plain_logprobs(hidden, weight, targets, temperature)
    expected_gradients = torch.autograd.grad(expected_logprobs, (hidden, weight), upstream.double())
    torch.testing.assert_close(logprobs, expected_logprobs.float())
    torch.testing.assert_close(entropy, expected_entropy.float())
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_they_are_the_same_and_the_host_does_not_wait(dtype):
    inputs = random_inputs(dtype)
    expected_logprobs, expected_entropy = plain_logprobs(*inputs[:3], 0.7)
    expected_gradients = torch.autograd.grad(expected_logprobs, inputs[:2], inputs[3].double())

    hidden, weight, targets, upstream = (tensor.detach().cuda() for tensor in inputs)
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logprobs, entropy = token_logprobs(hidden, weight, targets, 0.7, 3)
        gradients = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    found = [tensor.double().cpu() for tensor in (logprobs, entropy, *gradients)]
    expected = [tensor.double() for tensor in (expected_logprobs, expected_entropy, *expected_gradients)]
    torch.testing.assert_close(found, expected, **tolerance)


def test_default_chunks_hold_128_megabytes_of_logits(monkeypatch):
    """With 33 words and 100 logits at once, three tokens make a chunk: the same numbers as in one piece."""
    hidden, weight, targets, _ = random_inputs()
    whole = token_logprobs(hidden, weight, targets)
    monkeypatch.setattr("lit_specrl.models.logprobs._CHUNK_ELEMENTS", 100)
    largest_product = []
    monkeypatch.setattr(torch, "mm", lambda *a, mm=torch.mm, **k: largest_product.append(len(a[0])) or mm(*a, **k))
    torch.testing.assert_close(token_logprobs(hidden, weight, targets), whole)
    assert largest_product == [3, 3, 1]


def test_gradient_is_the_slope_of_the_value():
    hidden, weight, targets, upstream = random_inputs()
    step, towards = 1e-2, torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)).expand(NUM_TOKENS, -1)

    def value(hidden):
        return (token_logprobs(hidden, weight, targets, 0.7, 2)[0] @ upstream).item()

    (gradient,) = torch.autograd.grad(token_logprobs(hidden, weight, targets, 0.7, 2)[0], hidden, upstream)
    slope = (value(hidden + step * towards) - value(hidden - step * towards)) / (2 * step)
    assert slope == pytest.approx(float((gradient * towards).sum()), rel=1e-2)  # float32 values a hundredth apart


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(needed):
    hidden, weight, targets, upstream = random_inputs()
    inputs = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip((hidden, weight), needed, strict=True)]
    token_logprobs(*inputs, targets)[0].backward(upstream)
    plain = torch.autograd.grad(plain_logprobs(hidden, weight, targets, 1.0)[0], (hidden, weight), upstream.double())
    for tensor, wanted, expected in zip(inputs, needed, plain, strict=True):
        assert (tensor.grad is not None) == wanted
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected)


def test_autocast_multiplies_in_bfloat16_and_reduces_in_float32():
    hidden, weight, targets, upstream = random_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = token_logprobs(hidden, weight, targets, 0.7, 2)
    gradients = torch.autograd.grad(logprobs, (hidden, weight), upstream)

    # the exact answer for the logits as a bfloat16 product gives them
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float() / 0.7
    exact = logits.log_softmax(-1)
    torch.testing.assert_close(logprobs, exact[torch.arange(NUM_TOKENS), targets])
    torch.testing.assert_close(entropy, -(exact.exp() * exact).sum(-1))
    expected = torch.autograd.grad(plain_logprobs(hidden, weight, targets, 0.7)[0], (hidden, weight), upstream.double())
    for gradient, plain in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        relative_error = (gradient - plain).norm() / plain.norm()
        assert relative_error < 0.02  # bfloat16 keeps 8 bits, an error of 0.004 per factor


def test_bfloat16_inputs_give_float32_values_and_bfloat16_gradients():
    hidden, weight, targets, upstream = random_inputs(torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    gradients = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    assert [tensor.dtype for tensor in (logprobs, entropy, *gradients)] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_float64_inputs_are_reduced_in_float32():
    hidden, weight, targets, _ = random_inputs(torch.float64)
    logprobs, _ = token_logprobs(hidden, weight, targets)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, plain_logprobs(hidden, weight, targets, 1.0)[0].float())


def test_entropy_of_two_equal_words_is_the_logarithm_of_two_and_cannot_grow():
    hidden = torch.ones(1, 1, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.ones(2, 1), torch.tensor([0]))
    torch.testing.assert_close(entropy, torch.tensor([2.0]).log())
    torch.testing.assert_close(logprobs, torch.tensor([0.5]).log())
    assert torch.autograd.grad(entropy.sum(), hidden)[0].tolist() == [[0.0]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("with_logprobs", [True, False])
def test_gradients_of_entropies_are_those_of_the_formula(chunk_tokens, temperature, with_logprobs):
    hidden, weight, targets, upstream = random_inputs()
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature, chunk_tokens)
    value = (entropy * upstream.flip(0)).sum() + (logprobs * upstream).sum() * with_logprobs
    expected_logprobs, expected_entropy = plain_logprobs(hidden, weight, targets, temperature)
    expected = (expected_entropy * upstream.flip(0)).sum() + (expected_logprobs * upstream).sum() * with_logprobs
    torch.testing.assert_close(
        torch.autograd.grad(value, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    )


def test_logits_that_overflow_a_naive_exponential_stay_finite():
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [-2000.0]
    assert entropy.tolist() == [0.0]
    assert hidden.grad.tolist() == [[-2.0]]


def test_no_tokens_give_nothing_and_zero_gradients():
    hidden, weight, targets, upstream = random_inputs(num_tokens=0)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    assert (logprobs.tolist(), entropy.tolist()) == ([], [])
    logprobs.backward(upstream)
    assert hidden.grad.shape == (0, HIDDEN)
    assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    hidden, weight, targets, _ = random_inputs()
    with pytest.raises(ValueError, match=f"temperature must be positive to have log-probs, got {temperature}"):
        token_logprobs(hidden, weight, targets, temperature)
