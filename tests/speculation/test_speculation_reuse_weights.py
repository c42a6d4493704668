import math

import pytest
import torch

from lit_specrl.speculation import RatioAcceptance, reuse_importance_weights

DRAFT = torch.tensor([[1 / 2, 1 / 4, 1 / 4]])
TARGET = torch.tensor([[1 / 4, 1 / 4, 1 / 2]])
ALL = torch.ones(1, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("lenience", "expected"),
    [(0.5, [[2, 2, 2]]), (1.0, [[1, 1, 2]]), (1.6, [[0.625, 1, 2]]), (math.inf, [[0.5, 1, 2]])],
)
def test_the_ratio_counts_from_one_over_lenience(lenience, expected):
    weights = reuse_importance_weights(TARGET.log(), DRAFT.log(), ALL, lenience)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("lenience", [0.3, 1.0, 1.5, 4.0, math.inf])
def test_weighted_reused_tokens_have_the_expectation_of_the_target(lenience):
    """Identity of the docstring, with the proposal taken from the rule itself; and reused with fresh: (2 - A)-fold."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        target, draft = torch.randn(2, 1, 7, generator=generator, dtype=torch.float64).softmax(-1)
        value = torch.randn(1, 7, generator=generator, dtype=torch.float64)
        rule = RatioAcceptance(lenience)
        kept = draft * rule.acceptance_probability(target.log(), draft.log(), draft.log())
        acceptance_rate = kept.sum()
        proposal = kept / acceptance_rate
        weights = reuse_importance_weights(target.log(), draft.log(), torch.ones(1, 7).bool(), lenience)
        expectation = (target * value).sum()
        torch.testing.assert_close(acceptance_rate * (proposal * weights * value).sum(), expectation)
        torch.testing.assert_close((proposal * weights).sum(), 1 / acceptance_rate)
        reused_and_fresh = (kept * weights * value).sum() + (1 - acceptance_rate) * expectation
        torch.testing.assert_close(reused_and_fresh, (2 - acceptance_rate) * expectation)


def test_fresh_tokens_weigh_1_whatever_stands_there():
    target, draft = torch.tensor([[0.0, float("nan"), -1.0]]), torch.tensor([[-1.0, 0.0, float("nan")]])
    weights = reuse_importance_weights(target, draft, torch.tensor([[True, False, False]]), lenience=1.0)
    torch.testing.assert_close(weights, torch.tensor([[math.e, 1.0, 1.0]]))


def test_weights_stay_finite_and_carry_no_gradient():
    target = torch.tensor([[0.0]], requires_grad=True)
    weights = reuse_importance_weights(target, torch.tensor([[-200.0]]), torch.ones(1, 1).bool(), lenience=1.0)
    assert not weights.requires_grad
    assert weights.isfinite().all()


@pytest.mark.parametrize("lenience", [0.0, -1.0, float("nan")])
def test_without_lenience_nothing_can_have_been_reused(lenience):
    with pytest.raises(ValueError, match="lenience must be positive where tokens were reused"):
        reuse_importance_weights(TARGET.log(), DRAFT.log(), ALL, lenience)
