"""Losses for acceptance against sums over every draft that could be sampled, and how their parts add up."""

import itertools
import math

import pytest
import torch
from jsonargparse import ArgumentParser

from lit_specrl import DrafterDistillation, DraftLoss
from lit_specrl.drafting.distillation.draft_losses import (
    AcceptedLength,
    DraftedTokens,
    ForwardKL,
    TotalVariation,
    resolve_draft_loss,
)
from lit_specrl.drafting.distillation.loss import (
    draft_kl,
    draft_overlap,
    expected_acceptance,
    expected_acceptance_length,
    prefix_acceptance,
)

LN2 = math.log(2)


def log(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def random_steps(lengths, num_steps, vocabulary=5, k=5, weights=None, seed=0):
    """Drafts behind every token of responses of the given lengths, as a head unrolls them; the policy's log-probs at a
    place are the same in all steps, the drafter's logits are not."""
    generator = torch.Generator().manual_seed(seed)
    weights = weights or [1.0] * len(lengths)
    policy = [torch.randn(n, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1) for n in lengths]
    steps = []
    for step in range(num_steps):
        where = [(row, place) for row, n in enumerate(lengths) for place in range(step + 1, n)]
        rows, places = torch.tensor(where, dtype=torch.long).view(-1, 2).T
        logits = torch.randn(len(where), vocabulary, generator=generator, dtype=torch.float64) * 2
        own = torch.stack([policy[row][place] for row, place in where]) if where else torch.zeros(0, vocabulary)
        top = own.double().topk(k)
        mass = torch.zeros(len(where), dtype=torch.float64)
        weight = torch.tensor(weights, dtype=torch.float64)[rows]
        steps.append(DraftedTokens(logits.requires_grad_(), top.indices, top.values, mass, weight, rows, places))
    return steps


def mean(loss):
    return loss.weighted_sum / loss.count


@pytest.mark.parametrize(
    ("policy", "drafter", "expected"),
    [([0.5, 0.5], [0.5, 0.5], 1.0), ([1.0, 0.0], [0.25, 0.75], 0.25), ([0.5, 0.5], [0.8, 0.2], 0.7)],
)
def test_overlap_of_a_token_by_hand(policy, drafter, expected):
    overlap = draft_overlap(log(drafter) + 3, torch.tensor([[0, 1]]), log(policy), torch.zeros(1))
    torch.testing.assert_close(overlap, torch.tensor([expected], dtype=torch.float64))


def test_the_others_overlap_as_one_outcome():
    """0.5 and 0.2 of the policy, 0.2 for others that can be drafted, 0.1 for those that cannot; 0.1, 0.5 and 0.4 of the
    drafter, however that is shared out."""
    for rest in ([0.4, 0.0], [0.1, 0.3]):
        logits = log([rest[0], 0.5, 0.1, rest[1]])
        overlap = draft_overlap(logits, torch.tensor([[2, 1]]), log([0.5, 0.2]), log(0.9))
        torch.testing.assert_close(overlap, torch.tensor([0.1 + 0.2 + 0.2], dtype=torch.float64))


def test_the_overlap_is_bounded_by_what_is_known_and_by_what_could_be():
    """As 1 less the distance of the whole distributions is, which both bounds are where every token is stored."""
    generator = torch.Generator().manual_seed(0)
    policy, logits = torch.randn(2, 50, 7, generator=generator, dtype=torch.float64) * 2
    policy = policy.log_softmax(-1)
    exact = 1 - (policy.exp() - logits.softmax(-1)).abs().sum(-1) / 2
    for k in range(1, 8):
        values, tokens = policy.topk(k)
        above = draft_overlap(logits, tokens, values, torch.zeros(50))
        below = expected_acceptance(logits, tokens, values)
        assert (below <= exact + 1e-9).all() and (exact <= above + 1e-9).all()
    torch.testing.assert_close(above, exact)
    torch.testing.assert_close(below, exact)


@pytest.mark.parametrize("rest", [0.0, 1e-30, 1e-9, 1e-6])
@pytest.mark.parametrize("confidence", [0.0, 30.0, 1000.0])
def test_the_gradient_is_finite_for_any_rest_and_any_drafter(rest, confidence):
    logits = torch.tensor([[confidence, confidence, 0.0, 0.0]], requires_grad=True)
    overlap = draft_overlap(logits, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5 - rest]]).log(), torch.zeros(1))
    overlap.sum().backward()
    assert overlap.isfinite().all() and logits.grad.isfinite().all()


def test_where_nothing_overlaps_total_variation_has_no_gradient_and_the_mix_has():
    """The drafter is sure of a token that the policy never says."""
    found = []
    for kl_decay in (None, 3.0):
        (step,) = random_steps([2], 1)
        logits = torch.tensor([[100.0, 0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
        surely = step._replace(logits=logits, top_tokens=torch.tensor([[1]]), top_logprobs=log([1.0]))
        TotalVariation(kl_decay)([surely], 1, 1.0).weighted_sum.backward()
        found.append(float(logits.grad.abs().sum()))
    assert found == [pytest.approx(0, abs=1e-9), pytest.approx(2)]


def test_tokens_that_are_emitted_by_hand():
    """Three drafts, of which the second has two steps and the third one."""
    acceptance = [torch.tensor([0.5, 0.8, 0.1]), torch.tensor([0.4, 0.5]), torch.tensor([1.0])]
    drafts = [torch.tensor([3, 4, 9]), torch.tensor([3, 4]), torch.tensor([3])]
    emitted = prefix_acceptance(acceptance, drafts)
    torch.testing.assert_close(emitted, [torch.tensor([0.5, 0.8, 0.1]), torch.tensor([0.2, 0.4]), torch.tensor([0.2])])


def accepted_by_enumeration(policy, drafter):
    """Mean number of accepted tokens of a draft: over every draft and every outcome of its verification.

    Args:
        policy: [K, V] probabilities at the step, whatever came before.
        drafter: [K, V] the same.
    """
    num_steps, vocabulary = policy.shape
    total = 0.0
    for draft in itertools.product(range(vocabulary), repeat=num_steps):
        chosen = math.prod(float(drafter[step, token]) for step, token in enumerate(draft))
        chances = [min(1.0, float(policy[s, token] / drafter[s, token])) for s, token in enumerate(draft)]
        for accepted in range(num_steps + 1):
            stops = 1 - chances[accepted] if accepted < num_steps else 1.0
            total += chosen * math.prod(chances[:accepted]) * stops * accepted
    return total


def test_the_loss_of_a_draft_is_the_accepted_share_of_all_drafts_that_could_be_sampled():
    """One response in which a single draft of three tokens begins, and what 5^3 drafts would give."""
    steps = random_steps([4], 3)
    whole = [step._replace(**{n: getattr(step, n)[:1] for n in step._fields}) for step in steps]  # from place 1 on
    policy = torch.stack([torch.zeros(5).double().scatter(0, s.top_tokens[0], s.top_logprobs[0].exp()) for s in whole])
    drafter = torch.stack([step.logits[0].softmax(-1) for step in whole]).detach()
    loss = AcceptedLength(kl_decay=None)(whole, 3, 1.0)
    assert loss.count == 3
    assert float(mean(loss).detach()) == pytest.approx(1 - accepted_by_enumeration(policy, drafter) / 3)


@pytest.mark.parametrize("lengths", [[9], [4, 7, 5]])
def test_the_loss_is_the_acceptance_length_of_the_evaluation(lengths):
    """Of drafts that end within their response; where all tokens are stored."""
    steps = random_steps(lengths, 3)
    starts = [(row, place) for row, n in enumerate(lengths) for place in range(1, n - 2)]
    kept = []
    for index, step in enumerate(steps):
        where = list(zip(step.rows.tolist(), (step.places - index).tolist(), strict=True))
        chosen = torch.tensor([start in starts for start in where])
        kept.append(step._replace(**{name: getattr(step, name)[chosen] for name in step._fields}))
    acceptance = [expected_acceptance(step.logits, step.top_tokens, step.top_logprobs) for step in kept]
    loss = AcceptedLength(kl_decay=None)(kept, 3, 1.0)
    torch.testing.assert_close(1 + 3 * (1 - mean(loss)), expected_acceptance_length(acceptance))


def test_drafts_that_run_over_the_end_count_with_the_steps_they_have():
    """Places 1 and 2 of a response of three tokens: a draft of two tokens and one of one."""
    steps = random_steps([3], 3)
    first, second = (draft_overlap(*step.outcomes) for step in steps[:2])
    loss = AcceptedLength(kl_decay=None)(steps, 3, 1.0)
    torch.testing.assert_close(loss.weighted_sum, (1 - first[0]) + (1 - first[0] * second[0]) + (1 - first[1]))
    assert loss.count == 3


def test_a_drafter_that_drafts_all_tokens_alike_is_followed_over_its_draft():
    """The overlap at place r is that of every step that drafts it."""
    (step,) = random_steps([4, 3], 1)
    a, b, c, d, e = draft_overlap(*step.outcomes)
    loss = AcceptedLength(kl_decay=None)([step], 3, 1.0)
    emitted = [a, b, c, d, e, a * b, b * c, d * e, a * b * c]
    torch.testing.assert_close(loss.weighted_sum, sum(1 - chance for chance in emitted))
    assert loss.count == 9


def test_without_what_is_mixed_in_each_token_costs_its_rejection():
    steps = random_steps([5, 3], 2, weights=[2.0, 0.5])
    loss = TotalVariation(kl_decay=None)(steps, 2, 0.5)
    expected = sum(0.5**s * (step.weights * (1 - draft_overlap(*step.outcomes))).sum() for s, step in enumerate(steps))
    torch.testing.assert_close(loss.weighted_sum, expected)
    assert loss.count == 6 + 0.5 * 4


@pytest.mark.parametrize("loss", [TotalVariation, AcceptedLength])
def test_the_divergence_leaves_as_the_overlap_grows(loss):
    """lambda = exp(-kl_decay * overlap), without a gradient of its own; in place of total variation, and beside the
    accepted length, which at a single step is the same."""
    steps = random_steps([5, 4], 1)
    overlap = draft_overlap(*steps[0].outcomes)
    share = torch.exp(-2 * overlap).detach()
    other = 1 - share if loss is TotalVariation else 1
    expected = (share * draft_kl(*steps[0].outcomes) + other * (1 - overlap)).sum()
    found = loss(kl_decay=2.0)(steps, 1, 1.0).weighted_sum
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, steps[0].logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_total_variation_that_never_takes_over_is_the_divergence():
    steps = random_steps([5, 4], 2)
    found = TotalVariation(kl_decay=0.0)(steps, 2, 0.8)
    torch.testing.assert_close(found.weighted_sum, ForwardKL()(steps, 2, 0.8).weighted_sum)


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("loss", [TotalVariation(None), AcceptedLength(None)])
def test_gradient_by_finite_differences(loss, k):
    """Of what has no detached factor in it."""
    steps = random_steps([5, 3], 3, k=k, weights=[1.5, 0.5])

    def value(*logits):
        return mean(loss([step._replace(logits=own) for step, own in zip(steps, logits, strict=True)], 3, 0.8))

    assert torch.autograd.gradcheck(value, tuple(step.logits for step in steps))


@pytest.mark.parametrize("loss", [ForwardKL(), TotalVariation(3.0), AcceptedLength(3.0), AcceptedLength()])
def test_micro_batches_add_up_to_the_batch(loss):
    """Sums and counts of each response alone are those of all together, gradients included."""
    steps = random_steps([5, 3, 2], 3, weights=[1.5, 0.5, 1.0])
    whole = loss(steps, 3, 0.8)
    gradients = torch.autograd.grad(whole.weighted_sum, [step.logits for step in steps])
    total, count, alone = 0.0, 0.0, [torch.zeros_like(step.logits) for step in steps]
    for row in range(3):
        masks = [step.rows == row for step in steps]
        part = [
            s._replace(**{n: getattr(s, n)[m] for n in s._fields})._replace(rows=torch.zeros(int(m.sum())).long())
            for s, m in zip(steps, masks, strict=True)
        ]
        found = loss(part, 3, 0.8)
        total, count = total + found.weighted_sum, count + found.count
        own = torch.autograd.grad(found.weighted_sum, [s.logits for s in steps], allow_unused=True)
        alone = [sums + (0 if grad is None else grad) for sums, grad in zip(alone, own, strict=True)]
    torch.testing.assert_close(total, whole.weighted_sum)
    assert count == pytest.approx(whole.count)
    torch.testing.assert_close(alone, list(gradients))


def test_a_step_that_no_response_is_long_enough_for():
    loss = AcceptedLength(3.0)(random_steps([2], 3), 3, 1.0)
    assert loss.count == 1 and loss.weighted_sum.isfinite()


def test_a_configuration_may_bring_a_loss_with_numbers_of_its_own():
    parser = ArgumentParser()
    parser.add_class_arguments(DrafterDistillation, "learner")
    for loss in ({"class_path": "AcceptedLength", "init_args": {"kl_decay": 3.0}}, "acceptance"):
        learner = parser.instantiate_classes(parser.parse_object({"learner": {"loss": loss}})).learner
        assert type(learner.loss) is AcceptedLength
        assert learner.loss.kl_decay == (None if loss == "acceptance" else 3.0)


def test_losses_by_name():
    assert type(resolve_draft_loss("kl")) is ForwardKL
    assert (type(resolve_draft_loss("tv")), resolve_draft_loss("tv").kl_decay) == (TotalVariation, None)
    assert (type(resolve_draft_loss("acceptance")), resolve_draft_loss("acceptance").step_decay) == (AcceptedLength, 1)
    own = AcceptedLength(None)
    assert isinstance(own, DraftLoss)
    assert resolve_draft_loss(own) is own
    with pytest.raises(ValueError, match=r"must be 'kl', 'tv', 'acceptance' or a DraftLoss by class_path, got 'l1'"):
        resolve_draft_loss("l1")
    with pytest.raises(ValueError, match="kl_decay must be 0 or more, got -1; use None for no KL"):
        TotalVariation(kl_decay=-1)
