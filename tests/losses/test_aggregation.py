import pytest
import torch

from lit_specrl.losses import LOSS_TYPES, PolicyLoss, resolve_loss_type, token_weights

MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]]),
        ("sequence", [[1 / 6, 1 / 6, 0], [1 / 3, 0, 0], [0, 0, 0]]),
        ("sequence_sum", [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]]),
        ("fixed", [[1 / 30, 1 / 30, 0], [1 / 30, 0, 0], [0, 0, 0]]),
    ],
)
def test_weights_by_hand(aggregation, expected):
    weights = token_weights(MASK, aggregation, max_completion_length=10)
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", [[0.05, 0.05, 0], [0.05, 0, 0], [0, 0, 0]]),
        ("sequence", [[0.0625, 0.0625, 0], [0.125, 0, 0], [0, 0, 0]]),
        ("sequence_sum", [[0.125, 0.125, 0], [0.125, 0, 0], [0, 0, 0]]),
        ("fixed", [[0.0125, 0.0125, 0], [0.0125, 0, 0], [0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("counts", [(20, 8), (torch.tensor(20), torch.tensor(8))])
def test_denominators_of_the_step_replace_those_of_the_mask(aggregation, counts, expected):
    weights = token_weights(MASK, aggregation, num_tokens=counts[0], num_sequences=counts[1], max_completion_length=10)
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("num_micro_batches", [1, 2, 8])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(loss_type, num_micro_batches, inputs, loss_mask):
    whole = accumulate(loss_type, 1, inputs, loss_mask, {})
    denominators = {"num_tokens": loss_mask.sum(), "num_sequences": 8}
    split = accumulate(loss_type, num_micro_batches, inputs, loss_mask, denominators)
    torch.testing.assert_close(split, whole)


def accumulate(loss_type, num_micro_batches, inputs, loss_mask, denominators):
    """Loss and gradient summed over micro-batches, each as narrow as its longest row."""
    parts = resolve_loss_type(loss_type)
    policy_loss = PolicyLoss(
        epsilon_high=2.0, surrogate=parts.surrogate, importance_sampling_level=parts.importance_sampling_level
    )
    policy_logprobs = inputs["policy_logprobs"].clone().requires_grad_()
    total = torch.zeros(())
    for rows in torch.arange(8).chunk(num_micro_batches):
        block = (rows, slice(0, int(loss_mask[rows].sum(-1).max())))
        per_token_loss, _ = policy_loss(
            policy_logprobs[block], inputs["old_logprobs"][block], inputs["token_advantages"][block], loss_mask[block]
        )
        weights = token_weights(loss_mask[block], parts.aggregation, max_completion_length=7, **denominators)
        loss = (per_token_loss * weights).sum()
        loss.backward()
        total = total + loss.detach()
    return total, policy_logprobs.grad


@pytest.mark.parametrize("aggregation", ["token", "sequence", "sequence_sum", "fixed"])
def test_averaging_over_ranks_gives_the_loss_of_one_rank(aggregation):
    losses = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    counts = {"num_tokens": 3, "num_sequences": 3, "max_completion_length": 10}
    alone = (losses * token_weights(MASK, aggregation, **counts)).sum()
    per_rank = [
        (losses[rows] * token_weights(MASK[rows], aggregation, num_ranks=2, **counts)).sum()
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(per_rank) / 2, alone)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "sequence_sum", "fixed"])
def test_a_batch_without_loss_tokens_weighs_nothing(aggregation):
    weights = token_weights(torch.zeros(2, 2, dtype=torch.bool), aggregation, max_completion_length=2)
    assert weights.tolist() == [[0, 0], [0, 0]]


def test_fixed_needs_the_length_it_divides_by():
    with pytest.raises(ValueError, match="pass it"):
        token_weights(MASK, "fixed")


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="'token', 'sequence', 'sequence_sum' or 'fixed', got 'mean'"):
        token_weights(MASK, "mean")
    with pytest.raises(
        ValueError, match=r"grpo, dapo, .* vespo, gpg, geo_mean, dppo_tv, dppo_kl, or a loss by class_path, got 'apo'"
    ):
        resolve_loss_type("apo")
