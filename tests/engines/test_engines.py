"""What both engines promise: the policy's own distribution, its log-probs, and seeds that decide the sample."""

from collections import Counter

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

from lit_specrl.engines import TransformersEngine
from lit_specrl.engines.base import ProgressMeter

EXACT = ["transformers-llama", "transformers-qwen", "vllm-llama", "vllm-qwen"]


# ---------------------------------------------------------------------------------------------------------- log-probs


@with_engines(EXACT)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_logprobs_are_the_policys_after_every_weight_sync(colocated, prompts, temperature):
    """vLLM 0.32 on a CPU goes on with the previous weights of a tied head; an unflushed KV cache would show too."""
    for step in range(3):
        rollouts = colocated.generate(prompts, group=4, temperature=temperature)
        expected = policy_logprobs(colocated.policy, rollouts, temperature)
        torch.testing.assert_close(sampling_logprobs(rollouts), expected, atol=1e-3, rtol=0)
        colocated.perturb(step)
        colocated.sync()


@with_engines(["bf16-llama"])
def test_bfloat16_engine_stays_near_the_policy(colocated, prompts):
    """Bounds in nats; seen here: 0.028 on average, 0.16 at most."""
    for step in range(2):
        rollouts = colocated.generate(prompts, group=8)
        difference = (sampling_logprobs(rollouts) - policy_logprobs(colocated.policy, rollouts, 1.0)).abs()
        assert difference.mean() < 0.05
        assert difference.max() < 0.4
        colocated.perturb(step)
        colocated.sync()


@with_engines(VLLM)
def test_greedy_tokens_are_the_same_in_both_engines(colocated, prompts):
    ours = TransformersEngine()
    ours.start(colocated.policy, colocated.folder, MAX_LENGTH, STOP_TOKEN_IDS)
    for step in range(2):
        ours.load_weights([], colocated.engine.policy_version)
        request = colocated.request(prompts, length=32, temperature=0.0)
        expected, rollouts = ours.generate(request), colocated.engine.generate(request)
        assert rollouts.response_ids == expected.response_ids
        assert rollouts.finish_reasons == expected.finish_reasons
        torch.testing.assert_close(sampling_logprobs(rollouts), sampling_logprobs(expected), atol=1e-3, rtol=0)
        colocated.perturb(step)
        colocated.sync()


@with_engines(EXACT)
def test_greedy_tokens_are_the_most_likely_ones(colocated, prompts):
    rollouts = colocated.generate(prompts, temperature=0.0)
    for prompt, response in zip(prompts, rollouts.response_ids, strict=True):
        logprobs = next_token_logprobs(colocated.policy, prompt + response, 1.0)[len(prompt) - 1 : -1]
        assert response == logprobs.argmax(-1).tolist()


@with_engines(EXACT)
def test_changed_weights_change_the_next_responses(colocated, prompts):
    before = colocated.generate(prompts, temperature=0.0).response_ids
    colocated.perturb(seed=0)
    colocated.sync()
    assert colocated.generate(prompts, temperature=0.0).response_ids != before


@with_engines(["transformers-llama", "vllm-llama"])
def test_stale_weights_are_refused(colocated, prompts):
    request = colocated.request(prompts)
    colocated.sync()
    with pytest.raises(RuntimeError, match=r"holds weights of policy version \d+.*call load_policy"):
        colocated.engine.generate(request)


# -------------------------------------------------------------------------------------------------------------- seeds


@with_engines(EXACT)
def test_a_seed_decides_its_row_whatever_else_is_generated(colocated, prompts):
    """Exact for TransformersEngine; for vLLM in float32 because no draw lies within rounding of a boundary here."""
    whole = colocated.generate(prompts, group=3)
    assert colocated.generate(prompts, group=3).response_ids == whole.response_ids

    backwards = colocated.generate(prompts[::-1], seeds=list(range(12))[::-1], group=3)
    assert backwards.response_ids[::-1] == whole.response_ids

    alone = [colocated.generate([prompts[row // 3]], seeds=[row]).response_ids[0] for row in range(12)]
    assert alone == whole.response_ids


@with_engines(EXACT)
def test_other_seeds_give_other_responses(colocated, prompts):
    rollouts = colocated.generate([prompts[0]], group=8)
    assert len(set(map(tuple, rollouts.response_ids))) == 8


@with_engines(["transformers-llama"])
@pytest.mark.parametrize("max_rows", [1, 5])
def test_rows_decoded_in_portions_are_the_same(colocated, prompts, monkeypatch, max_rows):
    at_once = colocated.generate(prompts, group=3)
    monkeypatch.setattr(colocated.engine, "max_rows", max_rows)
    in_portions = colocated.generate(prompts, group=3)
    assert in_portions.response_ids == at_once.response_ids
    assert in_portions.finish_reasons == at_once.finish_reasons
    torch.testing.assert_close(sampling_logprobs(in_portions), sampling_logprobs(at_once))


# ------------------------------------------------------------------------------------------------------ ends of rows


@with_engines(EXACT)
def test_responses_end_with_a_stop_token_or_at_the_limit(colocated, prompts):
    rollouts = colocated.generate(prompts, group=16, length=20)
    assert {"stop", "length"} == set(rollouts.finish_reasons)
    for response, reason in zip(rollouts.response_ids, rollouts.finish_reasons, strict=True):
        assert not STOP_TOKEN_IDS & set(response[:-1])
        assert reason == ("stop" if response[-1] in STOP_TOKEN_IDS else "length")
        assert len(response) <= 20 if reason == "stop" else len(response) == 20
    assert [len(row) for row in rollouts.sampling_logprobs] == [len(row) for row in rollouts.response_ids]


@with_engines(["transformers-llama", "vllm-llama"])
def test_progress_ends_with_all_rows_and_all_tokens(colocated, prompts):
    reports = []
    rollouts = colocated.generate(prompts, group=4, on_progress=reports.append)
    assert (reports[-1].rows_done, reports[-1].num_rows, reports[-1].num_tokens) == (16, 16, rollouts.num_tokens)


# ------------------------------------------------------------------------------------------------------ distribution


@with_engines(EXACT)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_tokens_follow_the_policys_softmax(colocated, prompts, temperature):
    """First token, and first and second together, against the exact probabilities.

    A correct engine rarely exceeds 3 standard deviations; sampling at another temperature is off by more than 30.
    """
    prompt = prompts[2]
    rollouts = colocated.generate([prompt], group=NUM_SAMPLES, length=2, temperature=temperature)
    firsts = [response[0] for response in rollouts.response_ids]
    pairs = [response[0] * 128 + (response[1] if len(response) > 1 else 0) for response in rollouts.response_ids]
    exact = pair_distribution(colocated.policy, prompt, temperature)
    assert abs(chi_square_excess(firsts, exact.view(128, 128).sum(-1))) < 6
    assert abs(chi_square_excess(pairs, exact)) < 6
    assert chi_square_excess(pairs, pair_distribution(colocated.policy, prompt, 1.7 - temperature)) > 20


@with_engines(["transformers-llama", "vllm-llama"])
def test_top_k_and_top_p_keep_the_most_likely_tokens_only(colocated, prompts):
    probabilities, order = next_token_logprobs(colocated.policy, prompts[2], 1.0)[-1].exp().sort(descending=True)
    nucleus = int((probabilities.cumsum(-1) < 0.5).sum()) + 1
    for truncation, support in [({"top_k": 5}, 5), ({"top_p": 0.5}, nucleus)]:
        rollouts = colocated.generate([prompts[2]], group=400, length=1, **truncation)
        counts = Counter(response[0] for response in rollouts.response_ids)
        assert set(counts) <= set(order[:support].tolist())
        assert len(counts) > 0.8 * support
        truncated = (probabilities[:support] / probabilities[:support].sum()).log()
        kept = dict(zip(order[:support].tolist(), truncated.tolist(), strict=True))
        expected = [kept[response[0]] for response in rollouts.response_ids]
        torch.testing.assert_close(sampling_logprobs(rollouts), torch.tensor(expected), atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------- the trainer's process


@with_engines(["vllm-llama"])
def test_the_trainers_autocast_does_not_reach_the_engine(colocated, prompts, monkeypatch):
    """The kernels of vLLM 0.32 on a CPU take no notice of autocast, so its state is watched as well as the outcome."""
    plain = colocated.generate(prompts, group=4)
    core, states = colocated.engine.llm.llm_engine.engine_core, set()
    step = core.get_output
    monkeypatch.setattr(core, "get_output", lambda: states.add(torch.is_autocast_enabled("cpu")) or step())
    with torch.autocast("cpu", torch.bfloat16):
        colocated.sync()
        inside = colocated.generate(prompts, group=4)
    assert inside.response_ids == plain.response_ids
    assert inside.sampling_logprobs == plain.sampling_logprobs
    assert states == {False}


@with_engines(["vllm-llama"])
def test_prompts_beyond_one_prefill_keep_their_seeds(colocated):
    """vLLM 0.32 rewound the generator of a partly prefilled row: "CPU Generator does not use offset"."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(7, 100, (32, 200), generator=generator).tolist()  # 6400 tokens, 4096 fit one prefill
    together = colocated.generate(prompts, length=4)
    alone = [colocated.generate([prompts[row]], seeds=[row], length=4).response_ids[0] for row in (0, 20, 31)]
    assert [together.response_ids[row] for row in (0, 20, 31)] == alone


@with_engines(["transformers-llama", "vllm-llama"])
def test_engine_is_usable_after_an_exception_in_the_listener(colocated, prompts, monkeypatch):
    expected = colocated.generate(prompts, group=4)

    def interrupt(progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressMeter.__init__, "__defaults__", (0.0,))  # report after every step
    with pytest.raises(KeyboardInterrupt):
        colocated.generate(prompts, group=4, on_progress=interrupt)
    monkeypatch.undo()
    assert colocated.policy.training
    colocated.sync()  # flushes the KV cache, which it could not while rows are running
    assert colocated.generate(prompts, group=4).response_ids == expected.response_ids


@with_engines(["transformers-llama", "vllm-llama"])
def test_engine_starts_again_after_shutdown(colocated, prompts):
    expected = colocated.generate(prompts, group=4)
    colocated.engine.shutdown()
    assert colocated.engine.policy_version is None
    colocated.engine.shutdown()  # twice does no harm
    colocated.start()
    with pytest.raises(RuntimeError, match="version None"):
        colocated.engine.generate(expected.request)
    colocated.sync()
    assert colocated.generate(prompts, group=4).response_ids == expected.response_ids
