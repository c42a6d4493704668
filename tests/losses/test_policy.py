"""Hand-countable cases and numerical traps; agreement with TRL and verl is in `test_parity.py`."""

import math

import pytest
import torch

from lit_specrl.losses import DPPO, DRO, GMPO, PolicyLoss, named_loss


def loss_of_ratios(policy_loss, ratios, advantages):
    """Loss and its derivative by the policy log-prob for one token a row; d(-r A) / d(log policy) = -r A."""
    policy_logprobs = torch.tensor(ratios).log()[:, None].requires_grad_()
    mask = torch.ones(len(ratios), 1, dtype=torch.bool)
    per_token_loss, clipped = policy_loss(
        policy_logprobs, torch.zeros(len(ratios), 1), torch.tensor(advantages)[:, None], mask
    )
    per_token_loss.sum().backward()
    return per_token_loss.detach().flatten(), policy_logprobs.grad.flatten(), clipped


def assert_close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected))


def test_clipping_takes_the_gradient_where_it_would_go_on():
    ratios, advantages = [0.5, 1.0, 2.0, 0.5, 1.0, 2.0], [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    loss, gradient, clipped = loss_of_ratios(PolicyLoss(epsilon=0.2, epsilon_high=0.5), ratios, advantages)
    assert_close(loss, [-0.5, -1.0, -1.5, 0.8, 1.0, 2.0])
    assert_close(gradient, [-0.5, -1.0, 0.0, 0.0, 1.0, 2.0])
    assert (clipped.low_sum, clipped.high_sum, clipped.count) == (1, 1, 6)
    assert clipped.region_mean.item() == pytest.approx(2 / 6)


def test_epsilon_high_is_epsilon_when_left_out():
    loss, _, _ = loss_of_ratios(PolicyLoss(epsilon=0.2), [2.0], [1.0])
    assert_close(loss, [-1.2])


@pytest.mark.parametrize("bound", [{"delta": 3.0}, {"clip_ratio_c": 3.0}])
def test_both_bounds_cap_the_loss_of_negative_advantages(bound):
    loss, gradient, clipped = loss_of_ratios(PolicyLoss(**bound), [2.5, 4.0, 4.0], [-1.0, -1.0, 1.0])
    assert_close(loss, [2.5, 3.0, -1.2])
    assert_close(gradient, [2.5, 0.0, 0.0])
    assert (clipped.bound_sum, clipped.count) == (1, 3)


def test_the_two_bounds_differ_inside_the_clip_range():
    """delta caps positive advantages too and yields to the clip range for negative ones; clip_ratio_c does neither."""
    ratios, advantages = [1.15, 1.15], [1.0, -1.0]
    loss, _, _ = loss_of_ratios(PolicyLoss(delta=1.1), ratios, advantages)
    assert_close(loss, [-1.1, 1.15])
    loss, _, _ = loss_of_ratios(PolicyLoss(clip_ratio_c=1.1), ratios, advantages)
    assert_close(loss, [-1.15, 1.1])


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    policy_loss = PolicyLoss(surrogate="cispo", epsilon_high=1.5)
    loss, gradient, clipped = loss_of_ratios(policy_loss, [0.5, 2.0, 2.0], [1.0, 1.0, -1.0])
    assert_close(loss, [-0.5 * math.log(0.5), -1.5 * math.log(2), 1.5 * math.log(2)])
    assert_close(gradient, [-0.5, -1.5, 1.5])
    assert (clipped.low_sum, clipped.high_sum, clipped.count) == (0, 1, 3)


def test_sequence_ratio_is_the_geometric_mean_over_loss_tokens():
    policy_logprobs = torch.tensor([[2.0, 8.0, 99.0], [1.0, 1.0, 1.0]]).log().requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    policy_loss = PolicyLoss(epsilon=0.2, importance_sampling_level="sequence")
    per_token_loss, clipped = policy_loss(policy_logprobs, torch.zeros(2, 3), -torch.ones(2, 3), mask)
    per_token_loss.sum().backward()
    assert_close(per_token_loss, [[4.0, 4.0, 0.0], [1.0, 1.0, 1.0]])
    assert_close(policy_logprobs.grad, [[4.0, 4.0, 0.0], [1.0, 1.0, 1.0]])
    assert (clipped.region_mean, clipped.count) == (0, 2)


def test_sequence_clipping_counts_rows():
    policy_logprobs = torch.tensor([[2.0, 8.0], [0.5, 0.5], [1.0, 1.0], [9.0, 9.0]]).log()
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None].expand(4, 2)
    policy_loss = PolicyLoss(importance_sampling_level="sequence")
    _, clipped = policy_loss(policy_logprobs, torch.zeros(4, 2), advantages, mask)
    assert (clipped.low_mean, clipped.high_mean, clipped.count) == (0.25, 0.25, 4)


def test_without_old_logprobs_the_gradient_is_that_of_reinforce():
    policy_logprobs = torch.tensor([[-0.5, -1.5]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    per_token_loss, clipped = PolicyLoss()(policy_logprobs, None, torch.tensor([[2.0, -3.0]]), mask)
    per_token_loss.sum().backward()
    assert per_token_loss.tolist() == policy_logprobs.grad.tolist() == [[-2, 3]]
    assert clipped.region_mean == 0


VARIANTS = [
    PolicyLoss(),
    PolicyLoss(delta=2.0),
    PolicyLoss(clip_ratio_c=2.0),
    PolicyLoss(importance_sampling_level="sequence"),
    PolicyLoss(surrogate="cispo", epsilon_high=5.0),
]


@pytest.mark.parametrize("policy_loss", VARIANTS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e4])
def test_garbage_on_padding_reaches_neither_loss_nor_gradient_nor_statistics(policy_loss, garbage):
    policy_logprobs = torch.tensor([[-0.5, garbage], [garbage, garbage]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, False]])
    advantages = torch.tensor([[-2.0, garbage], [garbage, garbage]])
    per_token_loss, clipped = policy_loss(policy_logprobs, policy_logprobs.detach(), advantages, mask)
    per_token_loss.sum().backward()
    assert per_token_loss[~mask].tolist() == [0, 0, 0]
    assert_close(policy_logprobs.grad, [[2.0, 0.0], [0.0, 0.0]])
    assert clipped.region_mean == clipped.bound_mean == 0


@pytest.mark.parametrize("policy_loss", VARIANTS)
@pytest.mark.parametrize("log_ratio", [-1e3, 1e3])
def test_extreme_ratios_stay_finite(policy_loss, log_ratio):
    policy_logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    per_token_loss, _ = policy_loss(policy_logprobs, torch.zeros(1, 1), -torch.ones(1, 1), mask)
    per_token_loss.sum().backward()
    assert per_token_loss.isfinite().all()
    assert policy_logprobs.grad.isfinite().all()


@pytest.mark.parametrize("policy_loss", VARIANTS)
def test_bfloat16_is_computed_in_float32(policy_loss):
    policy_logprobs = torch.tensor([[-1.0, -0.5]], dtype=torch.bfloat16, requires_grad=True)
    old_logprobs = torch.tensor([[-1.0078125, -0.5]], dtype=torch.bfloat16)
    mask = torch.ones(1, 2, dtype=torch.bool)
    per_token_loss, _ = policy_loss(policy_logprobs, old_logprobs, -torch.ones(1, 2, dtype=torch.bfloat16), mask)
    widened, _ = policy_loss(policy_logprobs.float(), old_logprobs.float(), -torch.ones(1, 2), mask)
    per_token_loss.sum().backward()
    assert per_token_loss.dtype == torch.float32
    torch.testing.assert_close(per_token_loss, widened)
    assert policy_logprobs.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("policy_loss", [PolicyLoss(epsilon=0.05), PolicyLoss(clip_ratio_c=1.2)])
def test_gradient_is_the_derivative_of_the_loss(policy_loss):
    generator = torch.Generator().manual_seed(1)
    policy_logprobs, old_logprobs, advantages = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 5, generator=generator) < 0.7
    assert torch.autograd.gradcheck(
        lambda logprobs: policy_loss(logprobs, old_logprobs, advantages, mask)[0], policy_logprobs.requires_grad_()
    )


def test_statistics_of_micro_batches_add_up():
    ratios, advantages = [0.5, 0.5, 2.0, 1.0], [-1.0, 1.0, 1.0, 1.0]
    _, _, whole = loss_of_ratios(PolicyLoss(), ratios, advantages)
    _, _, first = loss_of_ratios(PolicyLoss(), ratios[:1], advantages[:1])
    _, _, rest = loss_of_ratios(PolicyLoss(), ratios[1:], advantages[1:])
    assert first + rest == whole
    assert (whole.low_mean, whole.high_mean, whole.region_mean) == (0.25, 0.25, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -0.2}, "epsilon must lie in"),
        ({"epsilon_high": -0.1}, "epsilon_high must not be negative"),
        ({"delta": 0.5}, "delta must exceed 1, got 0.5"),
        ({"clip_ratio_c": 1.0}, "clip_ratio_c must exceed 1, got 1.0"),
        ({"delta": 2.0, "clip_ratio_c": 2.0}, "set one"),
        ({"surrogate": "cispo"}, "needs epsilon_high"),
        ({"surrogate": "cispo", "epsilon_high": 5.0, "delta": 2.0}, "delta has no meaning"),
        ({"surrogate": "ppo"}, "surrogate must be 'clip' or 'cispo', got 'ppo'"),
        ({"importance_sampling_level": "row"}, "must be 'token' or 'sequence', got 'row'"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**settings)


def test_names_take_the_bounds_that_they_have():
    assert named_loss("geo_mean", 0.4, 0.5) == GMPO(0.4, 0.5)
    assert named_loss("dppo_kl", 0.1, clip_ratio_c=5.0) == DPPO("kl", 0.1, None, 5.0)
    assert named_loss("dppo_tv").clip_ratio_c == 20
    for name, bound in (("geo_mean", "delta"), ("geo_mean", "clip_ratio_c"), ("dppo_tv", "delta"), ("gpg", "delta")):
        with pytest.raises(ValueError, match=f"{bound} bounds a clipped ratio; loss_type='{name}' has none"):
            named_loss(name, **{bound: 2.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPPO("js"), "divergence must be 'tv' or 'kl', got 'js'"),
        (lambda: DPPO(epsilon=-0.1), "epsilon must not be negative"),
        (lambda: DPPO(clip_ratio_c=1.0), "clip_ratio_c must exceed 1"),
        (lambda: GMPO(epsilon_high=-1), "epsilon_high must not be negative"),
        (lambda: DRO(0), "beta must be positive"),
    ],
)
def test_numbers_out_of_their_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
