import math

import pytest
import torch
from torch import nan
from transformers import AutoModelForCausalLM, MistralConfig

from lit_specrl.experience import TokenBatch
from lit_specrl.masking import pad_left, pad_right
from lit_specrl.models.blockwise_logprobs import block_logprobs
from lit_specrl.models.policy import Policy

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
PROMPT_INDEX = [2, 0, 2, 1, 0, 2]
RESPONSES = [
    [21, 22, 23, 2],
    [24],
    [25, 26, 27, 28, 29, 30, 31, 32],
    [31, 32, 33],
    [41, 42, 43, 44, 45, 46, 47],
    [51, 52, 53, 54, 55],
]


@pytest.fixture(params=["llama", "qwen"])
def policy(request, tiny_model, tiny_qwen):
    return Policy.build({"llama": tiny_model, "qwen": tiny_qwen}[request.param])


@pytest.fixture
def padded():
    """Arguments of the policy's forward pass."""
    return TokenBatch(*pad_left(PROMPTS), torch.tensor(PROMPT_INDEX), *pad_right(RESPONSES))


def everybody(rows, start, logprobs):
    return torch.ones(len(rows), dtype=torch.bool)


def until(last_columns):
    """KeepScoring in which each row is wanted no further than the block that holds its column."""
    last_columns = torch.tensor(last_columns)

    def keep_scoring(rows, start, logprobs):
        return start + logprobs.shape[1] <= last_columns[rows]

    return keep_scoring


def left_at(logprobs, response_mask, stops):
    """The log-probs [N, R] with NaN from column `stops[row]` to the end of each response."""
    behind = torch.arange(logprobs.shape[1]) >= torch.tensor(stops)[:, None]
    return logprobs.masked_fill(behind & response_mask, nan)


def assert_close(actual, expected):
    """Float32 passes in other portions differ by rounding."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block_length", [1, 3, 7, 8, 100])
def test_wanted_by_everybody_they_are_those_of_the_forward_pass(policy, padded, block_length, temperature):
    with torch.no_grad():
        expected = policy(*padded, temperature=temperature).logprobs
    assert_close(block_logprobs(policy, padded, everybody, block_length, temperature), expected)


@pytest.mark.parametrize("block_length", [1, 3])
def test_they_are_those_of_the_forward_pass_with_a_sliding_window(padded, block_length):
    """The window is shorter than the prompts and than some blocks before the one at hand."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MistralConfig(
        **shape, num_attention_heads=2, num_key_value_heads=1, sliding_window=3, initializer_range=0.2
    )
    policy = Policy(AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        expected = policy(*padded).logprobs
    assert_close(block_logprobs(policy, padded, everybody, block_length), expected)


def test_gradient_checkpointing_does_not_cost_the_cache(tiny_model, padded):
    """Checkpointing layers drop their keys and values while the model is in training mode."""
    policy = Policy.build(tiny_model, gradient_checkpointing=True)
    assert policy.training
    with torch.no_grad():
        expected = policy(*padded).logprobs
    assert_close(block_logprobs(policy, padded, everybody, 3), expected)
    assert policy.training


@pytest.mark.parametrize(
    ("block_length", "stops"),
    [
        (1, [1, 8, 4, 3, 6, 8]),
        (3, [3, 8, 6, 3, 6, 8]),
        (7, [7, 8, 7, 7, 7, 8]),
        (8, [8, 8, 8, 8, 8, 8]),
    ],
)
def test_rows_are_left_at_the_end_of_their_block_and_the_others_never_notice(policy, padded, block_length, stops):
    """Columns wanted: 0 of the first row, 3 of the third, 2 of the fourth, 5 of the fifth, all of the others."""
    keep_scoring = until([0, 99, 3, 2, 5, 99])
    with torch.no_grad():
        expected = left_at(policy(*padded).logprobs, padded[-1], stops)
    assert_close(block_logprobs(policy, padded, keep_scoring, block_length), expected)


def test_survivors_are_asked_about_the_rows_that_are_left(tiny_model, padded):
    policy = Policy.build(tiny_model)
    with torch.no_grad():
        logprobs = policy(*padded).logprobs
    asked = []

    def keep_scoring(rows, start, block):
        asked.append((rows.tolist(), start))
        assert_close(block, logprobs[rows, start : start + 3])
        return rows != 4

    block_logprobs(policy, padded, keep_scoring, 3)
    assert asked == [([0, 1, 2, 3, 4, 5], 0), ([0, 2, 5], 3), ([2], 6)]


def test_nothing_is_computed_that_nobody_wants(tiny_model, padded):
    """Each prompt once, then the rows that go on; one that ends with its block is not looked at again."""
    policy, shapes = Policy.build(tiny_model), []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, arguments, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )

    def passes(keep_scoring):
        shapes.clear()
        block_logprobs(policy, padded, keep_scoring, 3)
        return list(shapes)

    assert passes(everybody) == [(3, 5), (6, 3), (4, 3), (2, 2)]
    assert passes(until([5, 0, 0, 0, 0, 0])) == [(3, 5), (6, 3), (1, 3)]
    assert passes(until([0] * 6)) == [(3, 5), (6, 3)]


def test_no_gradient_is_kept(tiny_model, padded):
    logprobs = block_logprobs(Policy.build(tiny_model), padded, everybody, 3)
    assert not logprobs.requires_grad
    assert math.isfinite(logprobs.sum())
