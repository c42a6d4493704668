"""What both engines promise of rows that begin with given tokens: they go on as the policy would have."""

import math
from dataclasses import replace

import pytest
import torch
from colocated import (
    NUM_SAMPLES,
    STOP_TOKEN_IDS,
    Colocated,
    chi_square_excess,
    pair_distribution,
    policy_logprobs,
    sampling_logprobs,
    with_engines,
)
from transformers import AutoModelForCausalLM, MistralConfig

from lit_specrl.engines import TransformersEngine
from lit_specrl.engines.base import ProgressMeter

EXACT = [
    "transformers-llama",
    "transformers-qwen",
    "vllm-llama",
]  # to vLLM a prefix is a longer prompt, whatever the model
ONE_OF_EACH = ["transformers-llama", "vllm-llama"]
# By row of two rollouts for each of four prompts; the sixth goes beyond a KV block of 32 tokens.
PREFIXES = [[], [9], [11, 12, 13], [], [17] * 7, list(range(31, 60)) + list(range(61, 80)), [20, 21], [22]]


def generate(colocated, prompts, prefixes, on_progress=None, expected_lengths=(), **options):
    """Rollouts of a request with prefixes; the remaining options are those of `Colocated.request`."""
    request = colocated.request(prompts, **options)
    request = replace(request, prefixes=prefixes, expected_lengths=list(expected_lengths))
    return colocated.engine.generate(request, on_progress)


@pytest.fixture
def asked_rows(colocated, monkeypatch):
    """Rows of every call in which the engine had something to do."""
    asked, continue_rows = [], colocated.engine.continue_rows

    def counting(request, rows, meter):
        asked.append(rows)
        return continue_rows(request, rows, meter)

    monkeypatch.setattr(colocated.engine, "continue_rows", counting)
    return asked


# -------------------------------------------------------------------------------------------------------------- tokens


@with_engines(EXACT)
def test_a_greedy_response_is_the_same_from_any_of_its_prefixes(colocated, prompts, monkeypatch):
    """Prefixes of 0 to 12 tokens in one request; responses that end earlier are cut where they end."""
    sixth_token = colocated.generate(prompts, temperature=0.0).response_ids[0][5]
    monkeypatch.setattr(colocated.engine, "stop_token_ids", frozenset({sixth_token}))
    whole = colocated.generate(prompts, temperature=0.0)
    assert {"stop", "length"} == set(whole.finish_reasons)
    prefixes = [response[:length] for response in whole.response_ids for length in range(13)]
    continued = generate(colocated, prompts, prefixes, group=13, temperature=0.0)
    assert continued.response_ids == [response for response in whole.response_ids for _ in range(13)]
    assert continued.finish_reasons == [reason for reason in whole.finish_reasons for _ in range(13)]


def test_a_greedy_response_is_the_same_from_any_of_its_prefixes_with_a_sliding_window(tmp_path):
    """Ragged prefixes leave a gap in the cache; the window must not be spent on it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MistralConfig(
        **shape, num_attention_heads=2, num_key_value_heads=1, sliding_window=4, initializer_range=0.2, eos_token_id=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    colocated = Colocated(TransformersEngine(), str(tmp_path))
    colocated.sync()
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13, 14]]
    whole = colocated.generate(prompts, temperature=0.0).response_ids
    prefixes = [response[:length] for response in whole for length in (0, 1, 4, 9)]
    continued = generate(colocated, prompts, prefixes, group=4, temperature=0.0)
    assert continued.response_ids == [response for response in whole for _ in range(4)]


@with_engines(EXACT)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_after_a_prefix_follow_the_policys_softmax(colocated, prompts, temperature):
    """First and second token after two prefixes of one prompt, in one request, against the exact probabilities.

    A correct engine rarely exceeds 3 standard deviations; the distribution after another prefix is off by more than
    100.
    """
    prompt, prefixes = prompts[2], [[9], [11, 12, 13]]
    rollouts = generate(
        colocated, [prompt], prefixes * NUM_SAMPLES, group=2 * NUM_SAMPLES, length=5, temperature=temperature
    )
    exact = [pair_distribution(colocated.policy, prompt + prefix, temperature) for prefix in prefixes]
    for which, prefix in enumerate(prefixes):
        added = [response[len(prefix) : len(prefix) + 2] for response in rollouts.response_ids[which::2]]
        assert [response[: len(prefix)] for response in rollouts.response_ids[which::2]] == [prefix] * NUM_SAMPLES
        firsts = [tokens[0] for tokens in added]
        pairs = [tokens[0] * 128 + (tokens[1] if len(tokens) > 1 else 0) for tokens in added]
        assert abs(chi_square_excess(firsts, exact[which].view(128, 128).sum(-1))) < 6
        assert abs(chi_square_excess(pairs, exact[which])) < 6
        assert chi_square_excess(pairs, exact[which - 1]) > 20


@with_engines(EXACT)
def test_a_seed_decides_how_its_row_goes_on_whatever_else_is_generated(colocated, prompts):
    """Alone, a row has no gap between its prefix and what follows; in float32, where no draw lies on a boundary
    here."""
    together = generate(colocated, prompts, PREFIXES, group=2, length=60)
    alone = [
        generate(colocated, [prompts[row // 2]], [PREFIXES[row]], seeds=[row], length=60).response_ids[0]
        for row in range(8)
    ]
    assert together.response_ids == alone


@with_engines(EXACT)
def test_empty_prefixes_are_no_prefixes(colocated, prompts):
    plain = colocated.generate(prompts, group=3)
    empty = generate(colocated, prompts, [[]] * 12, expected_lengths=[7] * 12, group=3)
    assert empty.response_ids == plain.response_ids
    assert empty.sampling_logprobs == plain.sampling_logprobs
    assert empty.finish_reasons == plain.finish_reasons


# ----------------------------------------------------------------------------------------------------------- log-probs


@with_engines(EXACT)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_logprobs_are_unknown_on_prefixes_and_the_policys_after_them(colocated, prompts, temperature):
    for step in range(2):
        rollouts = generate(colocated, prompts, PREFIXES, group=2, length=60, temperature=temperature)
        is_prefix = torch.tensor(
            [
                position < len(prefix)
                for prefix, response in zip(PREFIXES, rollouts.response_ids, strict=True)
                for position in range(len(response))
            ]
        )
        expected = policy_logprobs(colocated.policy, rollouts, temperature).masked_fill(is_prefix, math.nan)
        torch.testing.assert_close(sampling_logprobs(rollouts), expected, atol=1e-3, rtol=0, equal_nan=True)
        colocated.perturb(step)
        colocated.sync()


# ---------------------------------------------------------------------------------------------------------------- ends


@with_engines(ONE_OF_EACH)
def test_complete_prefixes_stay_as_they_are_and_never_reach_the_engine(colocated, prompts, asked_rows):
    """By a stop token, by the limit of three tokens, by both; only the fourth row is unfinished."""
    prefixes = [[8, 30], [8, 8, 8], [8, 8, 2], [8, 8]]
    rollouts = generate(colocated, prompts, prefixes, length=3, temperature=0.0)
    assert asked_rows == [[3]]
    assert rollouts.response_ids[:3] == prefixes[:3]
    assert rollouts.response_ids[3][:2] == [8, 8] and len(rollouts.response_ids[3]) == 3
    assert rollouts.finish_reasons[:3] == ["stop", "length", "stop"]
    assert all(math.isnan(logprob) for row in rollouts.sampling_logprobs[:3] for logprob in row)
    assert rollouts.num_generated_tokens == 1


@with_engines(ONE_OF_EACH)
def test_a_request_of_complete_prefixes_costs_nothing(colocated, prompts, asked_rows):
    reports = []
    rollouts = generate(colocated, prompts, [[2], [30], [8] * 12, [60]], reports.append)
    assert asked_rows == []
    assert [(report.rows_done, report.num_rows, report.num_tokens) for report in reports] == [(4, 4, 0)]
    assert rollouts.finish_reasons == ["stop", "stop", "length", "stop"]


@with_engines(ONE_OF_EACH)
def test_progress_counts_complete_rows_and_generated_tokens_only(colocated, prompts):
    reports = []
    rollouts = generate(colocated, prompts, [[2], [8] * 5, [], [8] * 11], reports.append)
    num_tokens = rollouts.num_tokens - 1 - 5 - 11
    assert (reports[-1].rows_done, reports[-1].num_rows, reports[-1].num_tokens) == (4, 4, num_tokens)


@with_engines(EXACT)
def test_the_limit_counts_the_tokens_of_the_prefix(colocated, prompts):
    prefixes = [[8] * (row % 20) for row in range(80)]
    rollouts = generate(colocated, prompts, prefixes, group=20, length=20)
    assert {"stop", "length"} == set(rollouts.finish_reasons)
    for prefix, response, reason in zip(prefixes, rollouts.response_ids, rollouts.finish_reasons, strict=True):
        assert response[: len(prefix)] == prefix and len(response) > len(prefix)
        assert not STOP_TOKEN_IDS & set(response[:-1])
        assert reason == ("stop" if response[-1] in STOP_TOKEN_IDS else "length")
        assert len(response) <= 20 if reason == "stop" else len(response) == 20


@with_engines(ONE_OF_EACH)
def test_a_prefix_beyond_the_limit_is_refused(colocated, prompts):
    with pytest.raises(ValueError, match="the prefix of row 2 has 4 tokens, a response at most 3; cut it before"):
        generate(colocated, prompts, [[], [8], [8] * 4, []], length=3)


# --------------------------------------------------------------------------------------------------------------- order


@with_engines(ONE_OF_EACH)
def test_rows_start_by_expected_length_and_come_back_in_their_own_order(colocated, prompts, asked_rows):
    prefixes = [[8] * length for length in (11, 2, 12, 0, 7, 5, 9, 3)]  # the third is complete
    expected_lengths = [1, 5, 99, 12, 5, 7, 3, 9]
    plain = generate(colocated, prompts, prefixes, group=2)
    ordered = generate(colocated, prompts, prefixes, expected_lengths=expected_lengths, group=2)
    assert asked_rows == [[0, 1, 3, 4, 5, 6, 7], [3, 7, 5, 1, 4, 6, 0]]
    assert ordered.response_ids == plain.response_ids
    assert ordered.finish_reasons == plain.finish_reasons
    torch.testing.assert_close(sampling_logprobs(ordered), sampling_logprobs(plain), equal_nan=True)


@with_engines(["transformers-llama"])
@pytest.mark.parametrize("max_rows", [1, 3])
def test_prefixes_in_portions_give_the_same_rows(colocated, prompts, monkeypatch, max_rows):
    at_once = generate(colocated, prompts, PREFIXES, group=2, length=60)
    monkeypatch.setattr(colocated.engine, "max_rows", max_rows)
    for expected_lengths in ([], [4, 1, 3, 8, 2, 7, 6, 5]):
        in_portions = generate(colocated, prompts, PREFIXES, expected_lengths=expected_lengths, group=2, length=60)
        assert in_portions.response_ids == at_once.response_ids
        assert in_portions.finish_reasons == at_once.finish_reasons


@with_engines(ONE_OF_EACH)
def test_longest_rows_first_take_fewer_steps(colocated, prompts, monkeypatch):
    """Forty rows for 32 places, every fifth six tokens long, the others one.

    In the order of the rows a long one waits until the first 32 have had a step (vLLM) or have all ended
    (transformers).
    """
    monkeypatch.setattr(colocated.engine, "stop_token_ids", frozenset())
    monkeypatch.setattr(ProgressMeter.__init__, "__defaults__", (0.0,))  # report after every step
    missing = [1, 1, 1, 1, 6] * 8
    prefixes = [[8] * (12 - length) for length in missing]

    def num_steps(expected_lengths):
        reports = []
        generate(colocated, prompts[:1], prefixes, reports.append, expected_lengths, group=40)
        return len(reports) - 1  # the first tells of rows that were complete before

    if isinstance(colocated.engine, TransformersEngine):
        monkeypatch.setattr(colocated.engine, "max_rows", 32)
        assert (num_steps([]), num_steps(missing)) == (6 + 6, 6 + 1)
    else:
        assert (num_steps([]), num_steps(missing)) == (1 + 6, 6)
