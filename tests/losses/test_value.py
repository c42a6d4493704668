import pytest
import torch

from lit_specrl.losses import value_loss

MASK = torch.ones(1, 3, dtype=torch.bool)


def test_the_larger_of_plain_and_clipped_error_counts():
    values = torch.tensor([[0.25, 2.0, 2.0]], requires_grad=True)  # inside the range; moved too far; moved away
    old_values, returns = torch.zeros(1, 3), torch.tensor([[1.0, 3.0, 0.0]])
    per_token_loss, clipped = value_loss(values, old_values, returns, MASK, cliprange_value=0.5)
    per_token_loss.sum().backward()
    assert per_token_loss.tolist() == [[0.5 * 0.75**2, 0.5 * 2.5**2, 0.5 * 2**2]]
    assert values.grad.tolist() == [[-0.75, 0, 2]]
    assert (clipped.clipped_sum, clipped.count) == (1, 3)
    assert (clipped + clipped).clipped_mean.item() == pytest.approx(1 / 3)


def test_without_a_range_it_is_half_the_squared_error():
    per_token_loss, clipped = value_loss(torch.full((1, 3), 2.0), torch.zeros(1, 3), torch.ones(1, 3), MASK, None)
    assert per_token_loss.tolist() == [[0.5, 0.5, 0.5]]
    assert clipped.clipped_mean == 0


def test_garbage_on_padding_reaches_neither_loss_nor_gradient():
    values = torch.tensor([[1.0, torch.nan, torch.inf]], requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    per_token_loss, clipped = value_loss(values, values.detach(), torch.zeros_like(values), mask)
    per_token_loss.sum().backward()
    assert per_token_loss.tolist() == [[0.5, 0, 0]]
    assert values.grad.tolist() == [[1, 0, 0]]
    assert clipped.count == 1


def test_bfloat16_is_widened():
    values = torch.ones(1, 3, dtype=torch.bfloat16)
    assert value_loss(values, values, values, MASK)[0].dtype == torch.float32


def test_a_range_of_zero_is_refused():
    with pytest.raises(ValueError, match="cliprange_value must be positive, got 0; use None"):
        value_loss(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3), MASK, 0)
