import torch

from lit_specrl.models.critic import ValueHead

HIDDEN = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [7.0, 7.0]]])  # [1, 3, 2]
MASK = torch.tensor([[True, True, False]])


def make_head(weight, bias=0.5, **options):
    head = ValueHead(2, **options)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([weight]))
        head.linear.bias.fill_(bias)
    return head


def test_values_begin_at_zero_and_their_gradient_does_not():
    head = ValueHead(2)
    values = head(HIDDEN, MASK)
    values.sum().backward()
    assert values.tolist() == [[0, 0, 0]]
    assert head.linear.weight.grad.tolist() == [[4, 7]]
    assert head.linear.bias.grad.tolist() == [2]


def test_a_value_is_a_linear_function_of_the_hidden_state_and_zero_on_padding():
    assert make_head([2.0, -1.0])(HIDDEN, MASK).tolist() == [[0.5, 1.5, 0]]


def test_what_stands_on_padding_does_not_matter():
    hidden = HIDDEN.clone()
    hidden[0, 2] = torch.nan
    assert make_head([2.0, -1.0])(hidden, MASK).tolist() == [[0.5, 1.5, 0]]


def test_values_have_float32_precision_under_autocast():
    """1 + 2**-12 is 1 in bfloat16."""
    head = make_head([1 + 2**-12, 0.0], bias=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        values = head(HIDDEN.bfloat16(), MASK)
    assert values.dtype == torch.float32
    assert values.tolist() == [[1 + 2**-12, 3 + 3 * 2**-12, 0]]


def test_a_head_in_bfloat16_computes_in_float32():
    head = make_head([1.0, 2**-9], bias=0.0).bfloat16()
    values = head(HIDDEN.bfloat16(), MASK)
    assert values.dtype == torch.float32
    assert values.tolist() == [[1 + 2 * 2**-9, 3 + 5 * 2**-9, 0]]


def test_a_detached_head_learns_alone():
    """The module detaches during the critic's warm-up and switches back."""
    head = make_head([2.0, -1.0], detach=True)
    for detach, hidden_gradient in [(True, None), (False, [[[2, -1], [2, -1], [0, 0]]])]:
        head.detach = detach
        head.zero_grad()
        hidden = HIDDEN.clone().requires_grad_()
        head(hidden, MASK).sum().backward()
        assert head.linear.weight.grad.tolist() == [[4, 7]]
        assert (hidden.grad if hidden.grad is None else hidden.grad.tolist()) == hidden_gradient
