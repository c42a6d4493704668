from dataclasses import fields, replace

import pytest
import torch
from torch import nan

from lit_specrl.experience import Experience, padded_experience, rows_with_gradient
from lit_specrl.types import PromptBatch, RolloutRequest, Rollouts, SamplingConfig


def make_rollouts(prompt_ids, response_ids, finish_reasons=None, total_rewards=None):
    """Rollouts whose k-th token of row n has sampling log-prob -n - k / 10; rewards are 0 unless given."""
    size = len(prompt_ids)
    prompts = PromptBatch(
        uids=[f"uid{n}" for n in range(size)],
        prompt_ids=prompt_ids,
        prompts=[f"prompt {n}" for n in range(size)],
        answers=[None] * size,
        sources=["test"] * size,
    )
    sampling = SamplingConfig(num_generations=len(response_ids) // size, max_completion_length=3)
    return Rollouts(
        request=RolloutRequest(prompts, sampling, seeds=list(range(len(response_ids))), policy_version=5),
        response_ids=response_ids,
        sampling_logprobs=[[-row - k / 10 for k in range(len(ids))] for row, ids in enumerate(response_ids)],
        finish_reasons=finish_reasons or ["stop"] * len(response_ids),
        policy_version=5,
        elapsed_s=1.0,
        total_rewards=total_rewards or [0.0] * len(response_ids),
    )


@pytest.fixture
def rollouts():
    """Two prompts of 2 and 3 tokens with two rows each; the second row is cut at the limit."""
    return make_rollouts(
        [[5, 6], [7, 8, 9]],
        [[11, 2], [12, 13, 14], [2], [15, 2]],
        finish_reasons=["stop", "length", "stop", "stop"],
        total_rewards=[1.0, 0.0, 0.5, 0.5],
    )


def with_advantages(experience, rows):
    experience.advantages = torch.tensor(rows)[:, None].expand(experience.response_mask.shape)
    return experience


@pytest.fixture
def experience(rollouts):
    return with_advantages(padded_experience(rollouts), [1.0, -1.0, 0.0, 0.0])


def as_lists(experience):
    values = {field.name: getattr(experience, field.name) for field in fields(experience)}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def close(values):
    return [pytest.approx(row, nan_ok=True) for row in values]


def test_rollouts_become_rectangles(rollouts):
    experience = padded_experience(rollouts)
    assert as_lists(experience) == {
        "prompt_ids": [[0, 5, 6], [7, 8, 9]],
        "prompt_mask": [[False, True, True], [True, True, True]],
        "prompt_index": [0, 0, 1, 1],
        "response_ids": [[11, 2, 0], [12, 13, 14], [2, 0, 0], [15, 2, 0]],
        "response_mask": [[True, True, False], [True, True, True], [True, False, False], [True, True, False]],
        "loss_mask": [[True, True, False], [True, True, True], [True, False, False], [True, True, False]],
        "advantages": [[0, 0, 0]] * 4,
        "sampling_logprobs": close([[0, -0.1, 0], [-1, -1.1, -1.2], [-2, 0, 0], [-3, -3.1, 0]]),
        "rewards": [1.0, 0.0, 0.5, 0.5],
        "policy_version": 5,
        "old_logprobs": None,
        "reference_logprobs": close([[nan, nan, 0], [nan, nan, nan], [nan, 0, 0], [nan, nan, 0]]),
        "recorded_logprobs": close([[nan, nan, 0], [nan, nan, nan], [nan, 0, 0], [nan, nan, 0]]),
        "kl_penalty": None,
        "entropy": None,
        "values": None,
        "returns": None,
        "observation_mask": None,
        "scores": None,
        "score_weights": None,
    }
    assert experience.num_rows == 4
    assert experience.prompt_lengths.tolist() == [2, 2, 3, 3]
    assert experience.response_lengths.tolist() == [2, 3, 1, 2]


def test_rows_that_no_reward_applies_to_have_reward_nan():
    rollouts = make_rollouts([[5]], [[11], [12]], total_rewards=[None, 0.25])
    rewards = padded_experience(rollouts).rewards
    torch.testing.assert_close(rewards, torch.tensor([torch.nan, 0.25]), equal_nan=True)


def test_advantages_outside_the_loss_are_no_signal(rollouts):
    experience = padded_experience(rollouts)
    experience.advantages[1, 2] = experience.advantages[3, 0] = experience.advantages[3, 2] = 2.0
    assert rows_with_gradient(experience, every_row_matters=False) == [1, 3]
    experience.loss_mask = experience.loss_mask & torch.tensor([[True, True, True]] * 3 + [[False, True, True]])
    assert rows_with_gradient(experience, every_row_matters=False) == [1]


def test_truncated_rows_leave_the_loss_and_stay_in_the_forward_pass(rollouts):
    experience = padded_experience(rollouts, mask_truncated_completions=True)
    with_advantages(experience, [1.0, -1.0, 0.0, 0.0])
    assert experience.loss_mask.tolist() == [
        [True, True, False],
        [False] * 3,
        [True, False, False],
        [True, True, False],
    ]
    assert experience.response_mask[1].tolist() == [True, True, True]
    assert rows_with_gradient(experience, every_row_matters=False) == [0]
    assert rows_with_gradient(experience, every_row_matters=True) == [0, 2, 3]


def test_rows_without_advantage_have_no_gradient_unless_another_term_reaches_them(experience):
    assert rows_with_gradient(experience, every_row_matters=False) == [0, 1]
    assert rows_with_gradient(experience, every_row_matters=True) == [0, 1, 2, 3]


def test_one_row_is_kept_where_there_is_no_signal(rollouts):
    assert rows_with_gradient(padded_experience(rollouts), every_row_matters=False) == [0]


def test_selected_rows_bring_their_prompts_and_no_padding_beyond_their_own(experience):
    experience.old_logprobs = experience.sampling_logprobs + 0.5
    part = experience.select([1, 0])
    assert as_lists(part) == {
        "prompt_ids": [[5, 6]],
        "prompt_mask": [[True, True]],
        "prompt_index": [0, 0],
        "response_ids": [[12, 13, 14], [11, 2, 0]],
        "response_mask": [[True, True, True], [True, True, False]],
        "loss_mask": [[True, True, True], [True, True, False]],
        "advantages": [[-1, -1, -1], [1, 1, 1]],
        "sampling_logprobs": close([[-1, -1.1, -1.2], [0, -0.1, 0]]),
        "rewards": [0.0, 1.0],
        "policy_version": 5,
        "old_logprobs": close([[-0.5, -0.6, -0.7], [0.5, 0.4, 0.5]]),
        "reference_logprobs": close([[nan, nan, nan], [nan, nan, 0]]),
        "recorded_logprobs": close([[nan, nan, nan], [nan, nan, 0]]),
        "kl_penalty": None,
        "entropy": None,
        "values": None,
        "returns": None,
        "observation_mask": None,
        "scores": None,
        "score_weights": None,
    }
    last = experience.select([3, 0])
    assert last.prompt_ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert last.prompt_index.tolist() == [1, 0]
    assert last.response_ids.tolist() == [[15, 2], [11, 2]]


@pytest.fixture
def full_experience(experience):
    """With every optional field filled in."""
    optional = {field.name: torch.rand(4, 3) for field in fields(Experience) if field.default is None}
    return replace(experience, **optional | {"scores": torch.rand(4, 2), "score_weights": torch.rand(2)})


def test_all_fields_of_rows_by_tokens_are_selected_and_cut(full_experience):
    """`select` goes through `TOKEN_FIELDS`: a field missing there would keep its rows, and its columns."""
    shapes = {name: value.shape for name, value in vars(full_experience).items() if isinstance(value, torch.Tensor)}
    assert {name for name, shape in shapes.items() if shape == (4, 3)} == set(Experience.TOKEN_FIELDS)
    part = full_experience.select([3, 0])
    for name in Experience.TOKEN_FIELDS:
        assert getattr(part, name).tolist() == getattr(full_experience, name)[[3, 0], :2].tolist(), name
    assert part.scores.tolist() == full_experience.scores[[3, 0]].tolist()


def test_scores_of_each_reward_come_with_their_weights(rollouts):
    rollouts.rewards = {"a": [1.0, None, 0.5, 0.0], "b": [None, 2.0, 3.0, 4.0]}
    experience = padded_experience(rollouts, weights={"b": 0.5, "a": 1.0})
    expected = torch.tensor([[nan, 1.0], [2.0, nan], [3.0, 0.5], [4.0, 0.0]])
    torch.testing.assert_close(experience.scores, expected, equal_nan=True)
    assert experience.score_weights.tolist() == [0.5, 1.0]


def test_rows_are_selected_where_prompts_and_responses_have_the_same_shape():
    """One row per prompt, prompts as long as responses: the prompts were cut like responses, and `select` failed."""
    rollouts = make_rollouts([[5, 6], [7, 8]], [[11, 12], [13, 2]])
    part = padded_experience(rollouts).select([1])
    assert (part.prompt_ids.tolist(), part.response_ids.tolist()) == ([[7, 8]], [[13, 2]])


def test_minibatches_are_whole_groups_in_order(experience):
    first, second = experience.minibatches(2)
    assert first.response_ids.tolist() == [[11, 2, 0], [12, 13, 14]]
    assert (first.prompt_ids.tolist(), first.prompt_index.tolist()) == ([[5, 6]], [0, 0])
    assert second.response_ids.tolist() == [[2, 0], [15, 2]]
    assert (second.prompt_ids.tolist(), second.prompt_index.tolist()) == ([[7, 8, 9]], [0, 0])
    assert (first.rewards.tolist(), second.rewards.tolist()) == ([1.0, 0.0], [0.5, 0.5])


def test_neighbouring_groups_form_a_minibatch():
    rollouts = make_rollouts([[5], [6], [7], [8]], [[11], [12], [13], [14], [15], [16], [17], [18]])
    parts = padded_experience(rollouts).minibatches(2)
    assert [part.prompt_ids.tolist() for part in parts] == [[[5], [6]], [[7], [8]]]
    assert [part.prompt_index.tolist() for part in parts] == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert [part.response_ids.flatten().tolist() for part in parts] == [[11, 12, 13, 14], [15, 16, 17, 18]]


def test_one_minibatch_is_everything(experience):
    assert experience.minibatches(1) == [experience]


def test_prompts_must_divide_into_minibatches(experience):
    with pytest.raises(ValueError, match="2 prompts cannot be divided into 3 minibatches"):
        experience.minibatches(3)


def test_moving_copies_every_tensor(full_experience):
    moved = full_experience.to("meta")
    devices = {name: value.device.type for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert set(devices.values()) == {"meta"}
    assert len(devices) == 19
    assert isinstance(moved, Experience)
    assert full_experience.prompt_ids.device.type == "cpu"
