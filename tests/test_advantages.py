"""Hand-countable cases; agreement with TRL and verl is in `losses/test_parity.py`."""

import pytest
import torch

from lit_specrl.advantages import (
    decoupled_advantages,
    frac_reward_zero_std,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    length_weighted_advantages,
    pass_at_k_advantages,
    rewards_at_last_token,
)

REWARDS = torch.tensor([0.0, 2.0, 1.0, 1.0])  # groups of two: means 1 and 1, deviations sqrt(2) and 0


def test_group_advantages_divide_by_the_deviation_of_the_group():
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (2**0.5 + 1e-4)
    torch.testing.assert_close(group_advantages(REWARDS, 2), expected)


def test_group_advantages_divide_by_the_deviation_of_the_batch():
    batch_std = (2 / 3) ** 0.5  # squares 1, 1, 0, 0 over 4 - 1
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (batch_std + 1e-4)
    torch.testing.assert_close(group_advantages(REWARDS, 2, "batch"), expected)


def test_group_advantages_without_scaling_are_plain_differences():
    assert group_advantages(REWARDS, 2, "none").tolist() == [-1, 1, 0, 0]


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_equal_rewards_have_advantages_of_exactly_zero(scale_rewards):
    """In float32 the mean of eight 0.3 is not 0.3, and 3e-8 / 1e-4 is an advantage."""
    assert group_advantages(torch.full((8,), 0.3), 8, scale_rewards).tolist() == [0] * 8


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_groups_of_one_have_advantage_zero(scale_rewards):
    assert group_advantages(torch.tensor([0.0, 3.0]), 1, scale_rewards).tolist() == [0, 0]
    assert leave_one_out_advantages(torch.tensor([0.0, 3.0]), 1).tolist() == [0, 0]


def test_unscored_rows_have_advantage_zero_and_move_no_mean():
    rewards = torch.tensor([0.0, torch.nan, 2.0, torch.nan, torch.nan, 5.0])
    assert group_advantages(rewards, 3, "none").tolist() == [-1, 0, 1, 0, 0, 0]
    assert leave_one_out_advantages(rewards, 3).tolist() == [-2, 0, 2, 0, 0, 0]


def test_leave_one_out_subtracts_the_mean_of_the_others():
    advantages = leave_one_out_advantages(torch.tensor([0.0, 3.0, 6.0]), 3)
    assert advantages.tolist() == [-4.5, 0, 4.5]
    torch.testing.assert_close(advantages, group_advantages(torch.tensor([0.0, 3.0, 6.0]), 3, "none") * 3 / 2)


def test_leave_one_out_advantages_can_be_normalised_over_the_batch():
    advantages = leave_one_out_advantages(torch.tensor([0.0, 1.0, 0.0, 3.0]), 2, normalize=True)
    std = (20 / 3) ** 0.5  # of -1, 1, -3, 3
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0, -3.0, 3.0]) / (std + 1e-4))


def test_a_row_weighs_by_its_length_in_the_baseline():
    rewards, lengths = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([30, 10, 0, 0])
    assert length_weighted_advantages(rewards, lengths, 2).tolist() == [-0.25, 0.75, 0, 0]
    assert length_weighted_advantages(torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([1, 5, 3]), 3).tolist() == [
        -0.75,
        0,
        0.25,
    ]
    assert length_weighted_advantages(torch.tensor([2.0, torch.nan]), torch.tensor([1, 5]), 1).tolist() == [0, 0]


def test_only_the_best_row_has_an_advantage():
    rewards = torch.tensor([0.0, 4.0, 1.0, 2.0, 2.0, 0.0, torch.nan, torch.nan, 5.0])
    assert pass_at_k_advantages(rewards, 3, "none").tolist() == [0, 3, 0, 0, 0, 0, 0, 0, 0]
    assert pass_at_k_advantages(torch.tensor([1.0, 2.0]), 1).tolist() == [0, 0]
    scaled = pass_at_k_advantages(REWARDS, 2)
    torch.testing.assert_close(scaled, torch.tensor([0.0, 2.0, 0.0, 0.0]) / (2**0.5 + 1e-4))
    by_batch = pass_at_k_advantages(REWARDS, 2, "batch")
    torch.testing.assert_close(by_batch, torch.tensor([0.0, 2.0, 0.0, 0.0]) / ((2 / 3) ** 0.5 + 1e-4))


def test_rewards_compared_for_themselves_do_not_drown_one_another():
    """The second reward has a hundredth of the spread. Summed first, it would turn no sign."""
    scores = torch.tensor([[0.0, 0.01], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    advantages = decoupled_advantages(scores, torch.tensor([1.0, 1.5]), 2)
    assert advantages.sign().tolist() == [1, -1, 1, -1]
    assert advantages.std().item() == pytest.approx(1, abs=1e-3)
    assert group_advantages(scores @ torch.tensor([1.0, 1.5]), 2).sign().tolist() == [-1, 1, 1, -1]


def test_of_a_single_reward_decoupled_advantages_are_those_of_the_group():
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, torch.nan, 0.0, 1.0, 0.0])
    advantages = decoupled_advantages(rewards[:, None], torch.ones(1), 4)
    grouped = group_advantages(rewards, 4)
    ratio = advantages[grouped != 0] / grouped[grouped != 0]
    assert advantages[4] == 0
    assert ratio.std() < 1e-3


def test_fraction_of_groups_without_spread():
    assert frac_reward_zero_std(REWARDS, 2).item() == 0.5
    assert frac_reward_zero_std(torch.full((8,), 0.3), 8).item() == 1
    assert frac_reward_zero_std(torch.tensor([1.0, torch.nan, 1.0, 1.0]), 2).item() == 0.5
    assert frac_reward_zero_std(REWARDS, 1).item() == 1


@pytest.mark.parametrize(
    "function", [group_advantages, leave_one_out_advantages, frac_reward_zero_std, pass_at_k_advantages]
)
def test_rows_that_do_not_form_groups_are_refused(function):
    with pytest.raises(ValueError, match="whole groups of num_generations=3 rows, got 4 rows"):
        function(REWARDS, 3)


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale_rewards must be 'group', 'batch' or 'none', got 'groups'"):
        group_advantages(REWARDS, 2, "groups")


def test_generalized_advantages_by_hand():
    token_rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 99.0, 99.0]])
    values = torch.tensor([[0.5, 0.25, 0.5], [1.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages, returns = generalized_advantages(token_rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    # deltas of row 0, last first: 1 - 0.5 = 0.5; 0.5 * 0.5 - 0.25 = 0; 0.5 * 0.25 - 0.5 = -0.375
    assert advantages.tolist() == [[-0.375 + 0.25 * 0.125, 0.125, 0.5], [1, 0, 0]]
    assert returns.tolist() == [[-0.34375 + 0.5, 0.125 + 0.25, 1], [2, 0, 0]]


def test_generalized_advantages_with_lambda_one_are_rewards_to_go_minus_values():
    token_rewards, values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    advantages, returns = generalized_advantages(token_rewards, values, torch.ones(3, 5, dtype=torch.bool))
    rewards_to_go = token_rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(returns, rewards_to_go)
    torch.testing.assert_close(advantages, rewards_to_go - values)


def test_generalized_advantages_step_over_gaps():
    """A row with a hole (a tool's output) has the advantages of the same row without it."""
    mask = torch.tensor([[True, False, False, True, True]])
    token_rewards = torch.tensor([[0.5, torch.nan, 7.0, 0.0, 1.0]])
    values = torch.tensor([[0.1, torch.nan, 7.0, 0.2, 0.3]])
    with_gap, _ = generalized_advantages(token_rewards, values, mask, 0.9, 0.8)
    without, _ = generalized_advantages(
        token_rewards[mask][None], values[mask][None], torch.ones(1, 3, dtype=torch.bool), 0.9, 0.8
    )
    torch.testing.assert_close(with_gap[mask], without[0])
    assert with_gap[~mask].tolist() == [0, 0]


def test_generalized_advantages_carry_no_gradient():
    values = torch.zeros(1, 2, requires_grad=True)
    advantages, returns = generalized_advantages(torch.ones(1, 2), values, torch.ones(1, 2, dtype=torch.bool))
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_the_whole_reward_arrives_at_the_last_true_token():
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    token_rewards = rewards_at_last_token(torch.tensor([2.0, 3.0, 5.0]), mask)
    assert token_rewards.tolist() == [[0, 2, 0], [0, 0, 3], [0, 0, 0]]
