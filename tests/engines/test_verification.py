"""What VLLMEngine promises of drafts: scored by the policy's own weights, and continued from what is kept of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from colocated import (
    MAX_LENGTH,
    NUM_SAMPLES,
    STOP_TOKEN_IDS,
    VLLM,
    chi_square_excess,
    next_token_logprobs,
    pair_distribution,
    policy_logprobs,
    sampling_logprobs,
    with_engines,
)

from lit_specrl.prefix_cache.acceptance import RatioAcceptance
from lit_specrl.prefix_cache.reuse import ReuseRound
from lit_specrl.prefix_cache.store import CachedRollout

LENGTHS = [1, 2, 31, 32, 33, 90]  # tokens; blocks of the KV cache hold 32


def drafts_of(lengths):
    """Row -> random tokens, none of which ends a response."""
    generator = torch.Generator().manual_seed(3)
    usable = torch.tensor(sorted(set(range(7, 100)) - STOP_TOKEN_IDS))
    return {
        row: usable[torch.randint(len(usable), (length,), generator=generator)].tolist()
        for row, length in enumerate(lengths)
    }


def verify(colocated, prompts, drafts, accept, on_progress=None, **options):
    """Rollouts of a request with drafts; the remaining options are those of `Colocated.request`."""
    request = replace(colocated.request(prompts, **options), cached_responses=drafts, accept=accept)
    return colocated.engine.generate(request, on_progress)


def handed_over(colocated, prompts, drafts, **options):
    """(row, log-probs of its draft) of every call of `accept`, which keeps nothing."""
    calls = []
    verify(colocated, prompts, drafts, lambda row, logprobs: calls.append((row, logprobs)) or 0, **options)
    return calls


def from_prefixes(colocated, prompts, prefixes, **options):
    return colocated.engine.generate(replace(colocated.request(prompts, **options), prefixes=prefixes))


@with_engines(VLLM)
def test_accept_sees_the_policys_logprobs_of_each_draft_once(colocated, prompts):
    """Twice the same drafts, so that the second time the KV cache is full of them, and again after a weight sync."""
    drafts = drafts_of(LENGTHS * 4)
    for step in range(2):
        for _ in range(2):
            seen = handed_over(colocated, prompts, drafts, group=6, length=100)
            assert sorted(row for row, _ in seen) == list(range(24))
            for row, logprobs in seen:
                prompt, draft = prompts[row // 6], drafts[row]
                exact = next_token_logprobs(colocated.policy, prompt + draft, 1.0)[len(prompt) - 1 : -1]
                expected = exact.gather(-1, torch.tensor(draft)[:, None]).squeeze(-1)
                torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
        colocated.perturb(step)
        colocated.sync()


@with_engines(VLLM)
@pytest.mark.parametrize("prompt_length", [31, 32, 33, 70])
def test_a_prompt_is_computed_once_for_its_drafts_and_no_logprob_is_lost_by_it(colocated, prompt_length, monkeypatch):
    """Half of the drafts are the same, so that the KV cache holds blocks that are to be scored; no draft alone would
    tell."""
    prompt, cached = [5 + position % 60 for position in range(prompt_length)], []
    drafts = drafts_of([50, 50, 40, 60])
    drafts |= {row + 4: draft for row, draft in drafts.items()}
    core = colocated.engine.llm.llm_engine.engine_core
    step = core.get_output

    def spied():
        outputs = step()
        # a scored draft is prefilled and finished in one step
        found = [output.prefill_stats for output in outputs.outputs if output.finish_reason is not None]
        cached.extend(stats.num_cached_tokens for stats in found if stats is not None)
        return outputs

    monkeypatch.setattr(core, "get_output", spied)
    seen = handed_over(colocated, [prompt], drafts, group=8, length=64)
    exact = {row: next_token_logprobs(colocated.policy, prompt + draft, 1.0) for row, draft in drafts.items()}
    for row, logprobs in seen:
        expected = exact[row][prompt_length - 1 : -1].gather(-1, torch.tensor(drafts[row])[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
    assert sorted(row for row, _ in seen) == list(drafts)
    whole_blocks = prompt_length // 32 * 32
    assert whole_blocks == 0 or cached.count(whole_blocks) >= 3


@with_engines(VLLM)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_rows_go_on_as_from_a_prefix_that_was_given(colocated, prompts, temperature):
    """All, none and some of a draft, mixed with rows that have none; no draw lies on a boundary here."""
    drafts = {row: draft for row, draft in drafts_of([40] * 16).items() if row % 4 != 3}
    kept = {row: [40, 0, row][row % 4] for row in drafts}
    prefixes = [drafts[row][: kept[row]] if row in drafts else [] for row in range(16)]
    options = {"group": 4, "length": 50, "temperature": temperature}
    verified = verify(colocated, prompts, drafts, lambda row, logprobs: kept[row], **options)
    given = from_prefixes(colocated, prompts, prefixes, **options)
    assert verified.request.prefixes == prefixes
    assert verified.response_ids == given.response_ids
    assert verified.finish_reasons == given.finish_reasons
    torch.testing.assert_close(sampling_logprobs(verified), sampling_logprobs(given), atol=1e-4, rtol=0, equal_nan=True)


@with_engines(VLLM)
@pytest.mark.parametrize("block", [1, 7, 32, 50])
def test_drafts_are_scored_block_by_block_until_a_token_is_rejected(colocated, prompts, block):
    """With the outcome of scoring whole drafts; the engine sees no block behind the one in which a draft ends."""
    drafts, seen = drafts_of([40] * 16), {}
    kept = {row: [40, 0, row, 39][row % 4] for row in drafts}

    def accept(row, logprobs):
        seen.setdefault(row, []).append(logprobs)
        return min(kept[row], len(logprobs))

    options = {"group": 4, "length": 50}
    request = replace(
        colocated.request(prompts, **options), cached_responses=drafts, accept=accept, verify_block_length=block
    )
    in_blocks = colocated.engine.generate(request)
    whole = verify(colocated, prompts, drafts, lambda row, logprobs: kept[row], **options)
    assert in_blocks.response_ids == whole.response_ids
    assert in_blocks.request.prefixes == whole.request.prefixes
    exact = dict(handed_over(colocated, prompts, drafts, **options))
    for row, calls in seen.items():
        needed = [min(start + block, 40) for start in range(0, 40, block) if start <= kept[row]]
        assert [len(logprobs) for logprobs in calls] == needed
        torch.testing.assert_close(torch.tensor(calls[-1]), torch.tensor(exact[row][: needed[-1]]), atol=1e-4, rtol=0)


@with_engines(VLLM)
def test_sampling_logprobs_are_unknown_where_a_draft_was_kept_and_the_policys_after_it(colocated, prompts):
    rollouts = verify(colocated, prompts, drafts_of([20] * 4), lambda row, logprobs: 5 * row, length=40)
    expected = policy_logprobs(colocated.policy, rollouts, 1.0)
    is_kept = torch.tensor(
        [position < 5 * row for row, response in enumerate(rollouts.response_ids) for position in range(len(response))]
    )
    expected = expected.masked_fill(is_kept, math.nan)
    torch.testing.assert_close(sampling_logprobs(rollouts), expected, atol=1e-3, rtol=0, equal_nan=True)


@with_engines(VLLM)
def test_a_greedy_response_survives_any_cut(colocated, prompts, monkeypatch):
    sixth_token = colocated.generate(prompts, temperature=0.0).response_ids[0][5]
    monkeypatch.setattr(colocated.engine, "stop_token_ids", frozenset({sixth_token}))
    whole = colocated.generate(prompts, temperature=0.0)
    drafts = {row: whole.response_ids[row // 13] for row in range(52)}
    kept = {row: min(row % 13, len(drafts[row])) for row in drafts}
    rollouts = verify(colocated, prompts, drafts, lambda row, logprobs: kept[row], group=13, temperature=0.0)
    assert rollouts.response_ids == list(drafts.values())
    assert rollouts.finish_reasons == [reason for reason in whole.finish_reasons for _ in range(13)]


@with_engines(["vllm-llama"])
def test_drafts_that_are_kept_whole_generate_nothing(colocated, prompts):
    """By a stop token, by the limit of three tokens, by both, and by a stop token alone."""
    drafts, reports = {0: [8, 30], 1: [8, 8, 8], 2: [8, 8, 2], 3: [2]}, []
    rollouts = verify(
        colocated, prompts, drafts, lambda row, logprobs: len(logprobs), on_progress=reports.append, length=3
    )
    assert rollouts.response_ids == list(drafts.values())
    assert rollouts.finish_reasons == ["stop", "length", "stop", "stop"]
    assert sampling_logprobs(rollouts).isnan().all()
    assert (reports[-1].rows_done, reports[-1].num_tokens, rollouts.num_generated_tokens) == (4, 0, 0)


@with_engines(["vllm-llama"])
def test_tokens_that_scoring_samples_are_not_counted(colocated, prompts):
    reports = []
    rollouts = verify(
        colocated, prompts, drafts_of([5, 6, 7, 8]), lambda row, logprobs: row, on_progress=reports.append
    )
    assert rollouts.num_generated_tokens == rollouts.num_tokens - 0 - 1 - 2 - 3
    assert (reports[-1].rows_done, reports[-1].num_tokens) == (4, rollouts.num_generated_tokens)


@with_engines(["vllm-llama"])
def test_a_draft_as_long_as_the_engine_can_go_is_verified_too(colocated):
    """Scoring asks vLLM for one token more; where the model has no position for it, the draft's last token is generated
    anew."""
    prompt, draft, lengths = [5] * (MAX_LENGTH - 12), [8] * 12, []
    rollouts = verify(
        colocated, [prompt], {0: draft}, lambda row, logprobs: lengths.append(len(logprobs)) or len(logprobs)
    )
    assert lengths == [11]
    assert rollouts.response_ids[0][:11] == draft[:11] and len(rollouts.response_ids[0]) == 12
    assert rollouts.request.prefixes == [draft[:11]]


@with_engines(["vllm-llama"])
def test_expected_lengths_decide_which_draft_is_verified_first(colocated, prompts):
    order = []
    request = replace(
        colocated.request(prompts[:1], group=40),
        cached_responses=drafts_of([3] * 40),
        accept=lambda row, logprobs: order.append(row) or 0,
        expected_lengths=[*range(40)],
    )
    colocated.engine.generate(request)
    assert set(order[:32]) == set(range(8, 40))  # 32 places


@with_engines(["transformers-llama"])
def test_an_engine_that_cannot_verify_refuses_drafts(colocated, prompts):
    with pytest.raises(
        ValueError, match="TransformersEngine cannot verify cached responses; verify with the policy, or use VLLM"
    ):
        verify(colocated, prompts, {0: [8]}, lambda row, logprobs: 0)


@with_engines(["vllm-llama"])
def test_engine_is_usable_after_an_exception_in_accept(colocated, prompts):
    """The tenth draft fails, with others waiting, scored and already generating."""
    expected = colocated.generate(prompts, group=12)
    calls = []

    def accept(row, logprobs):
        calls.append(row)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return 1

    with pytest.raises(KeyboardInterrupt):
        verify(colocated, prompts, drafts_of([3] * 48), accept, group=12)
    assert len(calls) == 10
    colocated.sync()  # flushes the KV cache, which it could not while rows are running
    assert colocated.generate(prompts, group=12).response_ids == expected.response_ids


@with_engines(["vllm-llama"])
def test_engine_is_usable_after_a_request_that_it_refuses(colocated, prompts):
    """The second row does not fit; the first has been queued by then."""
    expected = colocated.generate(prompts, group=4)
    with pytest.raises(Exception, match="maximum model length"):
        colocated.generate([prompts[0], [5] * (MAX_LENGTH + 1)])
    colocated.sync()
    assert colocated.generate(prompts, group=4).response_ids == expected.response_ids


@with_engines(VLLM)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rollouts_have_the_distribution_that_the_rule_documents(colocated, prompts, level):
    """Drafts of two tokens by the policy at temperature 1.7, of which the first may end the response; kept, cut and
    continued by the engine."""
    num_samples = 2 * NUM_SAMPLES
    prompt, rule = prompts[2], RatioAcceptance(1.2, level=level)
    draft, target = (pair_distribution(colocated.policy, prompt, t).view(128, 128) for t in (1.7, 1.0))  # [V, V]
    # log-probs of both tokens of every pair, [V, V, 2]
    previous_logprobs, target_logprobs = (
        torch.stack([pairs.sum(-1, keepdim=True).expand_as(pairs), pairs / pairs.sum(-1, keepdim=True)], -1).log()
        for pairs in (draft, target)
    )
    chosen = torch.multinomial(
        draft.flatten(), num_samples, replacement=True, generator=torch.Generator().manual_seed(5)
    )
    drafts = []
    for sample, pair in enumerate(chosen.tolist()):
        first, second = divmod(pair, 128)
        token_ids = [first] if first in STOP_TOKEN_IDS else [first, second]
        logprobs = previous_logprobs[first, second, : len(token_ids)].numpy()
        drafts.append(CachedRollout("0", sample, np.array(token_ids), logprobs, logprobs, "stop", 0, 0))
    request = colocated.request([prompt], group=num_samples, length=2)
    ReuseRound(request, drafts, rule).verify_in_engine(block_length=1)
    rollouts = colocated.engine.generate(request)
    pairs = [response[0] * 128 + (response[1] if len(response) > 1 else 0) for response in rollouts.response_ids]

    accept = rule.acceptance_probability(target_logprobs, previous_logprobs, previous_logprobs)  # [V, V, 2]
    kept_first = draft.sum(-1) * accept[:, 0, 0]  # [V]
    kept = draft * accept.prod(-1)  # [V, V]
    emitted = kept + (kept_first - kept.sum(-1))[:, None] * target_logprobs[..., 1].exp()
    emitted += (1 - kept_first.sum()) * target
    assert float(emitted.sum()) == pytest.approx(1)
    assert abs(chi_square_excess(pairs, emitted.flatten())) < 6
    assert chi_square_excess(pairs, target.flatten()) > 12  # not exact
