import math

import pytest
import torch
from torch.nn.functional import kl_div

from lit_specrl.drafting.distillation.loss import (
    distillation_loss,
    draft_kl,
    expected_acceptance,
    expected_acceptance_length,
)
from lit_specrl.drafting.distillation.reward_weights import reward_weights

LN2 = math.log(2)


def log(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def policy_and_drafter(num_places=5, vocabulary=7, seed=0):
    """Log-probs of a policy and logits of a drafter over the same tokens, [T, V'] float64."""
    generator = torch.Generator().manual_seed(seed)
    policy, logits = torch.randn(2, num_places, vocabulary, generator=generator, dtype=torch.float64) * 2
    return policy.log_softmax(-1), logits


def top(policy_logprobs, k):
    values, tokens = policy_logprobs.topk(k)
    return tokens.int(), values


def kl_of(policy_logprobs, logits, k):
    return draft_kl(logits, *top(policy_logprobs, k), torch.zeros(len(logits), dtype=logits.dtype))


@pytest.mark.parametrize(
    ("policy", "drafter", "expected"),
    [
        ([0.5, 0.5], [0.5, 0.5], 0.0),
        ([1.0, 0.0], [0.5, 0.5], LN2),
        ([0.75, 0.25], [0.5, 0.5], 0.75 * math.log(1.5) - 0.25 * LN2),
        ([0.5, 0.5], [0.8, 0.2], 0.5 * math.log(0.625) + 0.5 * math.log(2.5)),
    ],
)
def test_divergence_of_a_token_by_hand(policy, drafter, expected):
    kl = draft_kl(log(drafter) + 3, torch.tensor([[0, 1]]), log(policy), torch.zeros(1))
    torch.testing.assert_close(kl, torch.tensor([expected], dtype=torch.float64))


def test_tokens_outside_the_top_are_one_outcome():
    """0.5 and 0.2 and the rest 0.3 of the policy; 0.1, 0.5 and the rest 0.4 of the drafter, however the rest is shared
    out."""
    expected = 0.5 * math.log(5) + 0.2 * math.log(0.4) + 0.3 * math.log(0.75)
    for rest in ([0.4, 0.0], [0.1, 0.3]):
        kl = draft_kl(log([rest[0], 0.5, 0.1, rest[1]]), torch.tensor([[2, 1]]), log([0.5, 0.2]), torch.zeros(1))
        torch.testing.assert_close(kl, torch.tensor([expected], dtype=torch.float64))


def test_the_policy_is_renormalised_over_the_draft_vocabulary():
    """The policy gives 0.4 and 0.3 to tokens that can be drafted, 0.1 to others of them and 0.2 to those that cannot:
    4/8, 3/8, 1/8."""
    kl = draft_kl(log([0.25, 0.25, 0.25, 0.25]), torch.tensor([[3, 0]]), log([0.4, 0.3]), log(0.8))
    expected = 0.5 * math.log(2) + 0.375 * math.log(1.5) + 0.125 * math.log(0.25)
    torch.testing.assert_close(kl, torch.tensor([expected], dtype=torch.float64))


def test_with_the_whole_vocabulary_it_is_the_divergence_of_torch():
    policy, logits = policy_and_drafter()
    whole = kl_div(logits.log_softmax(-1), policy, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_of(policy, logits, k=7), whole)


def test_fewer_tokens_see_less_of_the_divergence():
    policy, logits = policy_and_drafter(num_places=200)
    by_k = torch.stack([kl_of(policy, logits, k) for k in range(1, 8)])  # [k, T]
    assert (by_k >= 0).all()
    assert (by_k.diff(dim=0) >= -1e-12).all()
    assert (by_k[0] < 0.9 * by_k[-1]).any()


@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_gradient_by_finite_differences(k):
    policy, logits = policy_and_drafter()
    assert torch.autograd.gradcheck(lambda logits: kl_of(policy, logits, k), logits.requires_grad_())


def test_gradient_of_the_weighted_loss_by_finite_differences():
    policy, logits = policy_and_drafter(num_places=6)
    weights = torch.tensor([1.5, 1.5, 1.5, 0.5, 0.5, 0.5], dtype=torch.float64)

    def mean_loss(logits):
        kl = kl_of(policy, logits, k=3)
        loss = distillation_loss([kl, kl[:4].square()], [weights, weights[:4]], decay=0.8)
        return loss.weighted_sum / loss.count

    assert torch.autograd.gradcheck(mean_loss, logits.requires_grad_())


def test_a_policy_without_any_rest():
    """With nothing outside the top k the divergence is that of the top k, and the drafter learns to leave the rest."""
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    kl = draft_kl(logits, torch.tensor([[1, 2]]), log([0.75, 0.25]), torch.zeros(1))
    expected = 0.75 * math.log(3) + 0.25 * math.log(1)
    torch.testing.assert_close(kl, torch.tensor([expected], dtype=torch.float64))
    kl.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25, -0.5, 0.0, 0.25]], dtype=torch.float64))


@pytest.mark.parametrize("rest", [0.0, 1e-30, 1e-9, 1e-6])
@pytest.mark.parametrize("confidence", [0.0, 30.0, 1000.0])
def test_gradient_is_finite_for_any_rest_and_any_drafter(rest, confidence):
    logits = torch.tensor([[confidence, confidence, 0.0, 0.0]], requires_grad=True)
    top_logprobs = torch.tensor([[0.5, 0.5 - rest]]).log()
    kl = draft_kl(logits, torch.tensor([[0, 1]]), top_logprobs, torch.zeros(1))
    kl.sum().backward()
    assert kl.isfinite().all() and logits.grad.isfinite().all()


def test_a_drafter_that_gives_nothing_to_the_rest_hears_of_it():
    """In float32, 1 - 0.5 - 0.5 would have no gradient that leads back."""
    logits = torch.tensor([[100.0, 100.0, 0.0, 0.0]], requires_grad=True)
    kl = draft_kl(logits, torch.tensor([[0, 1]]), torch.tensor([[0.45, 0.45]]).log(), torch.zeros(1))
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.tensor([0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 100)]))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.05, 0.05, -0.05, -0.05]]))


def test_top_probabilities_rounded_above_one_leave_no_rest():
    kl = draft_kl(torch.zeros(1, 3), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5000001]]).log(), torch.zeros(1))
    torch.testing.assert_close(kl, torch.tensor([math.log(1.5)]))


def test_logits_of_half_precision_are_added_up_in_float32():
    policy, logits = policy_and_drafter(vocabulary=512)
    logits = logits.bfloat16()
    tokens, logprobs = top(policy.float(), 4)
    in_half = draft_kl(logits.requires_grad_(), tokens, logprobs, torch.zeros(5))
    torch.testing.assert_close(in_half, draft_kl(logits.float(), tokens, logprobs, torch.zeros(5)), rtol=0, atol=0)
    assert in_half.dtype == torch.float32
    in_half.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_logits_of_float64_stay_float64():
    policy, logits = policy_and_drafter()
    tokens, logprobs = top(policy.float(), 3)
    assert draft_kl(logits, tokens, logprobs, torch.zeros(5)).dtype == torch.float64
    assert expected_acceptance(logits, tokens, logprobs).dtype == torch.float64


def two_rollouts_of_three_tokens():
    """Divergences 0, ln 2, 0.130812 of the first and 0.223144, 0.130812, ln 2 of the second."""
    policy = log([0.5, 0.5], [1, 0], [0.75, 0.25], [0.5, 0.5], [0.75, 0.25], [1, 0])
    logits = log([0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.8, 0.2], [0.5, 0.5], [0.5, 0.5])
    return policy, logits, torch.tensor([[0, 1]] * 6)


def test_the_weighted_loss_of_two_rollouts_of_three_tokens_by_hand():
    """1.5 * (0 + 0.693147 + 0.130812) + 0.5 * (0.223144 + 0.130812 + 0.693147) = 1.759490, over six tokens."""
    policy, logits, tokens = two_rollouts_of_three_tokens()
    weights = reward_weights(torch.tensor([1.0, 0.0]), [0, 0], floor=1 / 3).double()  # 1.5 and 0.5
    kl = draft_kl(logits, tokens, policy, torch.zeros(6))
    loss = distillation_loss([kl], [weights.repeat_interleave(3)], decay=0.8)
    assert loss.count == 6
    # six digits were written down
    torch.testing.assert_close(
        loss.weighted_sum / loss.count, torch.tensor(0.293248, dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_without_weights_it_is_plain_distillation():
    policy, logits = policy_and_drafter(num_places=6)
    for settings in ({"floor": 1.0}, {"scope": "none"}):
        weights = reward_weights(torch.tensor([1.0, 0.0]), [0, 0], **settings).double().repeat_interleave(3)
        loss = distillation_loss([kl_of(policy, logits, k=7)], [weights], decay=0.8)
        plain = kl_div(logits.log_softmax(-1), policy, log_target=True, reduction="batchmean")
        torch.testing.assert_close(loss.weighted_sum / loss.count, plain)


def test_later_steps_of_a_draft_count_less():
    kl = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 5.0]), torch.tensor([7.0])]
    weights = [torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor([2.0])]
    loss = distillation_loss(kl, weights, decay=0.5)
    assert (loss.weighted_sum.item(), loss.count) == (11 + 13 / 2 + 14 / 4, 3 + 2 / 2 + 1 / 4)
    assert distillation_loss(kl, weights, decay=1.0).count == 6
    first = distillation_loss(kl, weights, decay=0.0)
    assert (first.weighted_sum.item(), first.count) == (11, 3)


def test_micro_batches_add_up_to_the_batch():
    kl, weights = torch.arange(6.0), torch.tensor([1.5, 1.5, 1.5, 0.5, 0.5, 0.5])
    whole = distillation_loss([kl, kl[:4]], [weights, weights[:4]], decay=0.8)
    parts = [
        distillation_loss([kl[:4], kl[:3]], [weights[:4], weights[:3]], decay=0.8),
        distillation_loss([kl[4:], kl[3:4]], [weights[4:], weights[3:4]], decay=0.8),
    ]
    torch.testing.assert_close(sum(part.weighted_sum for part in parts), whole.weighted_sum)
    assert sum(part.count for part in parts) == pytest.approx(whole.count)


def test_a_step_without_tokens_adds_nothing():
    loss = distillation_loss([torch.tensor([1.0]), torch.empty(0)], [torch.tensor([2.0]), torch.empty(0)], decay=0.8)
    assert (loss.weighted_sum.item(), loss.count) == (2.0, 1.0)


def test_acceptance_by_hand():
    """The smaller of policy (0.5, 0.25 | 0.05 and 0.2 elsewhere) and drafter (0.2, 0.4): 0.2 + 0.25."""
    chance = expected_acceptance(log([0.4, 0.1, 0.2, 0.3]), torch.tensor([[2, 0]]), log([0.5, 0.25]))
    torch.testing.assert_close(chance, torch.tensor([0.45], dtype=torch.float64))


def test_acceptance_is_one_less_the_distance_of_the_distributions():
    policy, logits = policy_and_drafter()
    distance = (policy.exp() - logits.softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(expected_acceptance(logits, *top(policy, 7)), 1 - distance)
    assert (expected_acceptance(logits, *top(policy, 3)) <= 1 - distance).all()


def test_what_cannot_be_drafted_cannot_be_accepted():
    """A drafter that knows the policy perfectly, whose vocabulary holds 0.8 of its probability."""
    chance = expected_acceptance(log([0.5, 0.5]), torch.tensor([[0, 1]]), log([0.4, 0.4]))
    torch.testing.assert_close(chance, torch.tensor([0.8], dtype=torch.float64))


def test_acceptance_length_by_hand():
    """1 + (0.5 + 0.5 * 0.4 + 0.5 * 0.4 * 1) and 1 + (1 + 0 + 0)."""
    steps = [torch.tensor([0.5, 1.0]), torch.tensor([0.4, 0.0]), torch.tensor([1.0, 0.7])]
    torch.testing.assert_close(expected_acceptance_length(steps), torch.tensor((1.9 + 2) / 2))


def test_acceptance_length_of_equal_steps_is_the_geometric_series():
    steps = [torch.full((3,), 0.8, dtype=torch.float64)] * 4
    expected = torch.tensor((1 - 0.8**5) / (1 - 0.8), dtype=torch.float64)
    torch.testing.assert_close(expected_acceptance_length(steps), expected)


@pytest.mark.parametrize(
    ("logits", "tokens", "logprobs", "mass"),
    [
        ((2, 4), (2, 3), (2, 2), (2,)),
        ((2, 4), (3, 2), (3, 2), (2,)),
        ((2, 4), (2, 5), (2, 5), (2,)),
        ((2, 4), (2, 2), (2, 2), (1,)),
        ((2, 4), (2, 2), (2, 2), (2, 1)),
        ((2, 1, 4), (2, 1, 2), (2, 1, 2), (2,)),
    ],
)
def test_shapes_that_do_not_fit(logits, tokens, logprobs, mass):
    arguments = torch.zeros(logits), torch.zeros(tokens, dtype=torch.int32), torch.zeros(logprobs)
    with pytest.raises(ValueError, match=r"logits must be \[T, V'\].* got "):
        draft_kl(*arguments, torch.zeros(mass))
    if mass == (2,):
        with pytest.raises(ValueError, match=r"logits must be \[T, V'\].* got "):
            expected_acceptance(*arguments)


@pytest.mark.parametrize(
    ("kl", "weights", "decay", "message"),
    [
        ([(3,)], [(3, 1)], 0.8, r"got \[\[3\]\] and \[\[3, 1\]\]"),
        ([(3,)], [()], 0.8, r"got \[\[3\]\] and \[\[\]\]"),
        ([(3,), (2,)], [(3,)], 0.8, "for at least one step"),
        ([], [], 0.8, "for at least one step"),
        ([(3,)], [(3,)], 1.5, "decay must be between 0 and 1, got 1.5"),
    ],
)
def test_a_loss_that_makes_no_sense(kl, weights, decay, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss([torch.zeros(shape) for shape in kl], [torch.zeros(shape) for shape in weights], decay)


@pytest.mark.parametrize("shapes", [[], [(3,), (2,)], [(3, 1)]])
def test_acceptance_of_steps_that_are_not_aligned(shapes):
    with pytest.raises(ValueError, match="for at least one step, with the same T"):
        expected_acceptance_length([torch.zeros(shape) for shape in shapes])
