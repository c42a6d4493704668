"""Speculation in the running engine: every drafter, at every length, samples what the policy says."""

import math

import numpy as np
import pytest
import torch
from colocated import STOP_TOKEN_IDS, Colocated
from tiny_models import build_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_specrl.drafting import DraftModel, Eagle3Drafter, HistoryDrafter, NGramDrafter
from lit_specrl.drafting.drafters import Drafter
from lit_specrl.engines import VLLMEngine
from lit_specrl.engines.stop_strings import StopStrings

PROMPTS = [[1, 5, 9, 30, 31, 9, 30, 31, 9], [4, 4, 8, 4, 4, 8, 4, 4], [7, 50, 51, 52]]
GROUP, LENGTH = 96, 16
LOOK_UP = ["ngram", "history", "siblings"]
HEADS = ["head", "head of few tokens"]
LIKELIEST = ["head of few tokens, likeliest"]  # drafts that are not sampled
ALL = [*LOOK_UP, "small model", "same model", *HEADS, *LIKELIEST]


@pytest.fixture(scope="session")
def policy_model(make_llama):
    """Three layers, which an EAGLE-3 head reads."""
    return make_llama(num_hidden_layers=3)


class Lengths:
    """Drafts as many tokens as the pattern says, one entry a step."""

    def __init__(self, pattern):
        self.pattern, self.number, self.steps = pattern, 0, []

    def length(self, num_active, age):
        self.number += 1
        return self.pattern[self.number % len(self.pattern)]

    def observe(self, step):
        self.steps.append(step)


class LengthsByRow(Lengths):
    """Drafts another number of tokens in every row and step."""

    def __init__(self):
        super().__init__([4])
        self.chances = []

    def row_lengths(self, chances, remaining):
        assert chances.shape[1] == 4 and remaining.shape == (len(chances),)
        self.chances.append(chances)
        return (np.arange(len(chances)) + len(self.chances)) % 5


def build_drafter(kind, policy_model, make_llama, folder) -> Drafter | None:
    if kind in LIKELIEST:
        drafter = build_drafter(kind.removesuffix(", likeliest"), policy_model, make_llama, folder)
        drafter.sampled = False
        return drafter
    if kind in HEADS:
        policy = AutoModelForCausalLM.from_pretrained(policy_model)
        return Eagle3Drafter.build(policy, policy_model, folder / "head", None, 48 if "few" in kind else None)
    if kind == "ngram":
        return NGramDrafter(3, min_match=1, max_match=3)
    if kind in ("history", "siblings"):
        return HistoryDrafter(4, min_chance=0.0)  # all that is found is drafted
    if kind == "same model":
        return DraftModel(policy_model, 3)
    if kind == "small model":
        return DraftModel(make_llama(num_hidden_layers=1, initializer_range=0.15), 3)
    return None


def start(kind, policy_model, make_llama, folder):
    waiting = kind == "ngram"  # not all rows fit at once
    engine = VLLMEngine(dtype="float32", max_num_seqs=100 if waiting else 400, cpu_kv_cache_gib=0.25)
    engine.drafter = build_drafter(kind, policy_model, make_llama, folder)
    colocated = Colocated(engine, policy_model)
    colocated.has_past = kind == "history"  # siblings are read in a first epoch
    colocated.sync()
    return colocated


def past_responses(colocated, **sampling):
    """Of other seeds, so that some of what they say comes again."""
    request = colocated.request(PROMPTS, group=GROUP, length=LENGTH, **sampling)
    request.seeds = [seed + 10_000 for seed in request.seeds]
    return dict(enumerate(colocated.engine.generate(request).response_ids))


def generate(colocated, lengths=None, **sampling):
    request = colocated.request(PROMPTS, group=GROUP, length=LENGTH, **sampling)
    if colocated.has_past:
        request.past_responses = past_responses(colocated, **sampling)
    colocated.engine.speculation_control = lengths
    try:
        return colocated.engine.generate(request)
    finally:
        colocated.engine.speculation_control = None


@pytest.fixture(scope="module")
def plain(policy_model, make_llama, tmp_path_factory):
    """Responses of an engine that cannot speculate, by temperature."""
    colocated = start(None, policy_model, make_llama, tmp_path_factory.mktemp("plain"))
    rollouts = {temperature: generate(colocated, temperature=temperature) for temperature in (0.0, 0.7, 1.0)}
    rollouts["penalty"] = generate(colocated, repetition_penalty=1.3)
    colocated.engine.shutdown()
    return rollouts


@pytest.fixture(scope="module")
def started(request, plain, policy_model, make_llama, tmp_path_factory):
    colocated = start(request.param, policy_model, make_llama, tmp_path_factory.mktemp("drafter"))
    yield colocated
    colocated.engine.shutdown()


@pytest.fixture
def colocated(started):
    started.policy.load_state_dict(started.initial)
    started.sync()
    return started


@torch.no_grad()
def token_logprobs(colocated, rollouts, temperature):
    """[N] pairs of response and its log-softmax [R, V] under the policy."""
    for row, response in enumerate(rollouts.response_ids):
        prompt = rollouts.prompts.prompt_ids[rollouts.request.prompt_index(row)]
        logits = colocated.policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        yield torch.tensor(response), (logits.double() / temperature).log_softmax(-1)


def probability_transforms(colocated, rollouts, temperature):
    """For each response, numbers that are uniform on [0, 1) and independent exactly if its tokens come from the policy.

    The tokens are ordered by probability: what is sampled too sharply or too flatly, or from another context, shows.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for response, logprobs in token_logprobs(colocated, rollouts, temperature):
        probs = logprobs.exp()
        own = probs.gather(-1, response[:, None])
        above = (probs * (probs > own)).sum(-1)
        found.append(above + torch.rand(len(response), generator=generator, dtype=torch.float64) * own[:, 0])
    return found


def kolmogorov_distance(values):
    """Largest distance to the uniform distribution, in units of its standard deviation; 2.2 is rarer than 1 in
    10,000."""
    ordered, count = values.sort().values, len(values)
    ranks = torch.arange(count, dtype=torch.float64)
    return math.sqrt(count) * float(torch.maximum(ordered - ranks / count, (ranks + 1) / count - ordered).max())


def serial_correlation(rows):
    pairs = torch.cat([torch.stack([row[:-1], row[1:]]) for row in rows if len(row) > 1], dim=1)
    return float(torch.corrcoef(pairs)[0, 1]) * math.sqrt(pairs.shape[1])


# --------------------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("started", [None, *ALL], indirect=True)
@pytest.mark.parametrize("pattern", [[3], [0, 0, 3, 3, 1, 2]], ids=["constant", "changing"])
def test_every_token_has_the_policys_distribution(colocated, temperature, pattern):
    lengths = Lengths(pattern)
    rollouts = generate(colocated, lengths, temperature=temperature)
    rows = probability_transforms(colocated, rollouts, temperature)
    first, later = torch.stack([row[0] for row in rows]), torch.cat([row[1:] for row in rows])
    assert len(first) == 3 * GROUP and len(later) > 1500
    assert kolmogorov_distance(first) < 2.2
    assert kolmogorov_distance(later) < 2.2
    assert abs(serial_correlation(rows)) < 4
    drafted = sum(sum(step.drafted) for step in lengths.steps)
    accepted = sum(sum(step.accepted) for step in lengths.steps)
    assert (drafted > 0) == (colocated.engine.drafter is not None)
    if not isinstance(colocated.engine.drafter, NGramDrafter):  # random text hardly ever repeats itself
        assert (accepted > 0) == (drafted > 0)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("started", ["history", "siblings"], indirect=True)
def test_every_token_has_it_with_a_length_for_each_row(colocated, plain, temperature):
    lengths = LengthsByRow()
    rollouts = generate(colocated, lengths, temperature=temperature)
    rows = probability_transforms(colocated, rollouts, temperature)
    assert kolmogorov_distance(torch.stack([row[0] for row in rows])) < 2.2
    assert kolmogorov_distance(torch.cat([row[1:] for row in rows])) < 2.2
    assert abs(serial_correlation(rows)) < 4
    assert rollouts.response_ids == plain[temperature].response_ids
    drafted, accepted = (
        np.array([sum(c) for c in counts]) for counts in zip(*map(by_length, lengths.steps), strict=True)
    )
    assert drafted.sum() > accepted.sum() > 0
    assert any(len(set(np.diff([*step.drafted, 0]).tolist())) > 1 for step in lengths.steps)  # in one step, several
    assert all(chances.min() >= 0 and chances.max() < 1 for chances in lengths.chances)


@pytest.mark.parametrize("started", ["ngram", "siblings"], indirect=True)
def test_drafts_change_nothing_under_a_repetition_penalty_and_stop_strings(colocated, plain):
    penalised = generate(colocated, repetition_penalty=1.3)
    assert penalised.response_ids == plain["penalty"].response_ids
    whole, tokenizer = plain[1.0].response_ids, build_tokenizer()
    stop = [tokenizer.decode(response[4:6]) for response in whole[::40] if len(response) > 6]
    request = colocated.request(PROMPTS, group=GROUP, length=LENGTH, stop=stop)
    request.text_end = StopStrings(tokenizer, stop)
    rollouts = colocated.engine.generate(request)
    assert rollouts.response_ids == [response[: request.text_end(response)] for response in whole]
    assert rollouts.num_tokens < plain[1.0].num_tokens


def by_length(step):
    return step.drafted, step.accepted


@pytest.mark.parametrize("started", ["history", "siblings"], indirect=True)
def test_steps_tell_where_drafts_were_read(colocated):
    lengths = Lengths([4])
    generate(colocated, lengths)
    sources = {source for step in lengths.steps for source in step.by_source}
    assert "sibling" in sources and ("past" in sources) == colocated.has_past
    for step in lengths.steps:
        drafted, accepted = (sum(counts[k] for counts in step.by_source.values()) for k in (0, 1))
        assert (drafted, accepted) == (sum(step.drafted), sum(step.accepted))


@pytest.mark.parametrize("started", ["small model"], indirect=True)
def test_a_changed_policy_is_what_decides(colocated):
    """A sync changes the policy and not the drafter."""
    colocated.perturb(seed=3)
    colocated.sync()
    rows = probability_transforms(colocated, generate(colocated, Lengths([2])), 1.0)
    assert kolmogorov_distance(torch.cat(rows)) < 2.2


@pytest.mark.parametrize("started", [*LOOK_UP, *LIKELIEST], indirect=True)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_drafts_that_are_not_sampled_change_no_rollout(colocated, plain, temperature):
    assert (
        generate(colocated, Lengths([3, 0, 2]), temperature=temperature).response_ids == plain[temperature].response_ids
    )


@pytest.mark.parametrize("started", ALL, indirect=True)
def test_greedy_rollouts_are_the_same(colocated, plain):
    assert generate(colocated, Lengths([3, 0, 2]), temperature=0.0).response_ids == plain[0.0].response_ids


@pytest.mark.parametrize("started", ALL, indirect=True)
def test_seeds_and_lengths_decide_everything(colocated):
    first, second = (generate(colocated, Lengths([2, 3, 0])) for _ in range(2))
    assert first.response_ids == second.response_ids


@pytest.mark.parametrize("started", [None, *ALL], indirect=True)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(colocated, temperature):
    rollouts = generate(colocated, Lengths([3]), temperature=temperature)
    for recorded, (response, logprobs) in zip(
        rollouts.sampling_logprobs, token_logprobs(colocated, rollouts, temperature), strict=True
    ):
        expected = logprobs.gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(recorded).double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("started", ALL, indirect=True)
def test_responses_end_where_they_have_to(colocated):
    rollouts = generate(colocated, Lengths([3]))
    for response, reason in zip(rollouts.response_ids, rollouts.finish_reasons, strict=True):
        assert len(response) <= LENGTH and not STOP_TOKEN_IDS & set(response[:-1])
        assert reason == ("stop" if response[-1] in STOP_TOKEN_IDS else "length")


@pytest.mark.parametrize("started", [None, "small model"], indirect=True)
def test_truncated_sampling_stays_within_the_nucleus(colocated):
    rollouts = generate(colocated, Lengths([3]), top_k=5)
    for response, logprobs in token_logprobs(colocated, rollouts, 1.0):
        assert (logprobs.gather(-1, response[:, None]) >= logprobs.topk(5).values[:, -1:] - 1e-4).all()


@pytest.mark.parametrize("started", ["ngram"], indirect=True)
def test_vllms_own_sampling_still_needs_its_replacement(colocated):
    """It divides by temperatures that were never written. When this fails, vLLM has been repaired."""
    runner = colocated.engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    replaced = runner._sample
    del runner._sample
    try:
        rows = probability_transforms(colocated, generate(colocated, Lengths([3]), temperature=0.7), 0.7)
    finally:
        runner._sample = replaced
    assert kolmogorov_distance(torch.cat([row[1:] for row in rows])) > 4


# ------------------------------------------------------------------------------------------------------------ telemetry


@pytest.mark.parametrize("started", ["same model"], indirect=True)
def test_a_drafter_like_the_policy_is_always_right_also_after_a_pause(colocated):
    """While nothing is drafted the drafter computes nothing; when it begins again it knows all tokens again."""
    lengths = Lengths([3, 3, 0, 0, 0, 0])
    rollouts = generate(colocated, lengths)
    drafted, accepted = (
        [sum(counts) for counts in (s.drafted for s in lengths.steps)],
        [sum(s.accepted) for s in lengths.steps],
    )
    assert accepted == drafted and sum(drafted) > 500
    assert any(step.length == 0 for step in lengths.steps)
    assert sum(step.num_tokens for step in lengths.steps) <= sum(map(len, rollouts.response_ids)) - 3 * GROUP


@pytest.mark.parametrize("started", ["same model"], indirect=True)
def test_prompts_that_the_drafter_has_not_seen_are_not_taken_from_the_cache(colocated):
    """The first rollout computes them for the policy alone; the second, under the same weights, drafts."""
    generate(colocated, Lengths([0]))
    lengths = Lengths([3])
    generate(colocated, lengths)
    assert [step.accepted for step in lengths.steps] == [step.drafted for step in lengths.steps]


@pytest.mark.parametrize("started", ["ngram"], indirect=True)
def test_rows_that_wait_are_not_active(colocated):
    lengths = Lengths([3])
    generate(colocated, lengths)
    active = [step.num_active for step in lengths.steps]
    assert 20 < max(active) <= 100 and min(active) < 20


@pytest.mark.parametrize("started", ["small model"], indirect=True)
def test_steps_tell_what_was_drafted(colocated):
    rollouts = generate(colocated)  # nobody decides: as many as the drafter can
    steps = colocated.engine.decode_steps
    assert {step.length for step in steps} == {3}
    for step in steps:
        assert len(step.drafted) == len(step.accepted) == 3
        assert step.num_active >= step.drafted[0] >= step.accepted[0] >= step.accepted[1] >= step.accepted[2]
        assert step.num_active <= step.num_tokens <= step.num_active + sum(step.accepted)
    assert steps[-1].num_active < steps[0].num_active <= len(rollouts.response_ids)
    lengths = Lengths([2, 0])
    generate(colocated, lengths)
    # the steps without drafts are those that compute all rows again
    assert {step.length for step in lengths.steps} == {2} and not any(step.is_steady for step in lengths.steps)


@pytest.mark.parametrize("started", ["ngram"], indirect=True)
def test_steps_tell_how_far_the_rows_are(colocated):
    lengths = Lengths([0])
    colocated.engine.speculation_control = lengths
    colocated.generate(PROMPTS[:1], temperature=0.0, group=1, length=12)
    colocated.engine.speculation_control = None
    ages = [step.age for step in lengths.steps]
    assert ages == [1 + step for step in range(len(ages))] and ages


@pytest.mark.parametrize("started", ["ngram", "small model"], indirect=True)
def test_steps_tell_what_it_took_to_draft_again(colocated, started):
    """A model that has paused is shown what it missed; drafters that look tokens up miss nothing."""
    lengths = Lengths([0, 0, 0, 0, 3, 3])
    generate(colocated, lengths)
    catching_up = [step for step in lengths.steps if step.catch_up_s > 0]
    assert bool(catching_up) == isinstance(colocated.engine.drafter, DraftModel)
    assert all(step.length for step in catching_up)


@pytest.mark.parametrize("started", ["small model"], indirect=True)
def test_a_rollout_without_anything_to_generate_has_no_steps(colocated):
    generate(colocated)
    assert colocated.engine.decode_steps
    request = colocated.request(PROMPTS, length=4)
    request.prefixes = [[5, 6, 7, 8]] * len(PROMPTS)  # complete: reused whole
    assert colocated.engine.generate(request).response_ids == request.prefixes
    assert not colocated.engine.decode_steps


@pytest.mark.parametrize("started", ["ngram", "small model"], indirect=True)
def test_the_profile_times_each_setting(colocated):
    steps = colocated.engine.profile(20)
    steady = {(step.num_active, step.length) for step in steps if step.is_steady}
    assert steady == {(batch, length) for batch in (1, 4, 16, 20) for length in (0, 1, 3)}
    before = generate(colocated).response_ids
    colocated.engine.profile(20)
    assert generate(colocated).response_ids == before  # nothing is left behind


@pytest.mark.parametrize("started", ["small model"], indirect=True)
def test_lengths_beyond_the_drafter_are_refused(colocated):
    with pytest.raises(ValueError, match="the engine drafts from 0 to 3 tokens, got 4"):
        generate(colocated, Lengths([4]))
    assert generate(colocated).num_rows == 3 * GROUP


# --------------------------------------------------------------------------------------------------------------
# drafters


def test_values_that_no_drafter_can_have():
    with pytest.raises(ValueError, match="num_speculative_tokens must be at least 1, got 0; leave the drafter out"):
        HistoryDrafter(0)
    with pytest.raises(ValueError, match="1 <= min_match <= max_match is needed, got 3 and 2"):
        NGramDrafter(min_match=3, max_match=2)


def test_speculation_that_vllm_might_verify_loosely_is_refused():
    with pytest.raises(ValueError, match="give SpeculativeRollout a drafter, whose drafts are verified exactly"):
        VLLMEngine(options={"speculative_config": {"method": "ngram", "rejection_sample_method": "synthetic"}})


def test_a_draft_model_with_another_vocabulary_is_refused(policy_model, make_llama):
    other = make_llama(vocab_size=130)
    with pytest.raises(ValueError, match="has a vocabulary of 130 tokens, the policy one of 128"):
        DraftModel(other).check(LlamaConfig.from_pretrained(policy_model))
