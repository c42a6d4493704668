"""PrefixCache with vLLM: drafts verified by the policy and by the engine come to the same in float32."""

import json
import shutil
from functools import partial

import pytest
import torch
from reuse_runs import GROUP, MAX_LENGTH, STEPS, fit, grpo, questions, rows_of, spread_but_why
from training import QUESTIONS, with_many_stops

from lit_specrl import DAPO
from lit_specrl.callbacks import PrefixCache, RolloutCallback, SpeculativeRollout
from lit_specrl.engines import VLLMEngine
from lit_specrl.prefix_cache import BoundedShare

NUM_ROWS = 2 * GROUP  # of a step
STILL = 2 * STEPS  # steps at the beginning in which the policy does not change


class KeptEngine(VLLMEngine):
    """Outlives the runs that use it, for a start takes seconds; keeps how many rows it generated or scored each
    time."""

    def __init__(self):
        super().__init__(dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25, max_model_len=128)
        self.num_rows, self.num_scored = [], []

    def start(self, *arguments):
        if self.llm is None:
            super().start(*arguments)
        self.num_rows, self.num_scored = [], []

    def continue_rows(self, request, rows, meter):
        self.num_rows.append(len(rows))
        self.num_scored.append(len(request.cached_responses))
        return super().continue_rows(request, rows, meter)

    def shutdown(self):
        self.policy_version = None


@pytest.fixture(scope="module", params=["Llama", "Qwen"])
def model_folder(request, tiny_model, tiny_qwen, tmp_path_factory):
    model = tiny_model if request.param == "Llama" else tiny_qwen
    return with_many_stops(model, tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="module")
def engine(model_folder):
    engine = KeptEngine()
    yield engine
    VLLMEngine.shutdown(engine)


class Drafts(RolloutCallback):
    """The log-probs that each row of a step is kept with, and those that the engine reported."""

    def __init__(self, cache):
        self.cache, self.pairs = cache, []

    def on_rollout_end(self, trainer, pl_module, rollouts):
        self.rollouts = rollouts

    def on_train_batch_end(self, *arguments):
        kept = [self.cache.store.get(*key).previous_logprobs.tolist() for key in rows_of(self.rollouts)]
        self.pairs.append((kept, self.rollouts.sampling_logprobs))


def late(optimizer):
    """A learning rate of 0 in the first two epochs."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= STILL))


@pytest.fixture(scope="module")
def run(model_folder, engine, tmp_path_factory):
    """Four epochs, two of them with a policy that stands still and two with one that learns a little."""

    def run(verifier, algorithm=grpo, lenience=1.0, acceptance="ratio", block_length=None, **options):
        module = algorithm(model_folder, optimizer=partial(torch.optim.SGD, lr=0.05), lr_scheduler=late)
        cache = PrefixCache(lenience, acceptance, verifier=verifier, block_length=block_length, **options)
        drafts, folder = Drafts(cache), tmp_path_factory.mktemp("run")
        trace = fit(module, questions(folder), cache, drafts, SpeculativeRollout(engine), max_epochs=4)
        trace.drafts, trace.num_rows, trace.num_scored = drafts.pairs, engine.num_rows, engine.num_scored
        return trace

    return run


@pytest.fixture(scope="module")
def traces(run):
    return {verifier: run(verifier) for verifier in ("policy", "engine")}


def test_both_verifiers_give_the_same_tokens(traces):
    """Coins and seeds are the same; no draw lies within rounding of a boundary here."""
    by_policy, by_engine = traces["policy"], traces["engine"]
    assert by_engine.tokens == by_policy.tokens
    assert [[rollouts.request.prefixes for rollouts in rounds] for rounds in by_engine.rounds[STEPS:]] == [
        [rollouts.request.prefixes for rollouts in rounds] for rounds in by_policy.rounds[STEPS:]
    ]
    assert any(0 < fraction < 1 for fraction in by_policy.of_cache("reuse_fraction"))
    for name in ("saved_tokens", "hit_fraction", "age", "full_reuse_fraction"):
        assert by_engine.of_cache(name) == by_policy.of_cache(name)
    for name in ("drift", "kl"):
        for metrics, expected in zip(by_engine.metrics[STEPS:], by_policy.metrics[STEPS:], strict=True):
            found = metrics[f"prefix_cache/{name}"]
            assert found == pytest.approx(expected[f"prefix_cache/{name}"], rel=1e-2, abs=1e-4)
    assert by_engine.metrics[-1]["reward"] == by_policy.metrics[-1]["reward"]


def test_both_verifiers_judge_sequences_alike(run):
    """In blocks of four tokens, over which the ratios go on."""
    by_policy, by_engine = (run(verifier, acceptance="sequence", block_length=4) for verifier in ("policy", "engine"))
    assert by_engine.tokens == by_policy.tokens
    assert any(0 < fraction < 1 for fraction in by_policy.of_cache("reuse_fraction"))


def test_both_verifiers_keep_to_the_share_that_is_offered(run):
    """Rows of which all that is offered is kept go on behind it."""
    by_policy, by_engine = (run(verifier, reuse_policy=BoundedShare(0.5)) for verifier in ("policy", "engine"))
    assert by_engine.tokens == by_policy.tokens
    [before], [after] = by_policy.rounds[STILL - STEPS], by_engine.rounds[STILL]
    assert [len(prefix) for prefix in after.request.prefixes] == [len(ids) // 2 for ids in before.response_ids]


@pytest.mark.parametrize("verifier", ["policy", "engine"])
def test_an_unchanged_policy_says_everything_again(traces, verifier):
    trace = traces[verifier]
    assert trace.of_cache("reuse_fraction")[: STILL + 1] == [0.0] * STEPS + [1.0] * (STEPS + 1)
    assert trace.of_cache("generated_tokens")[STEPS : STILL + 1] == [0.0] * (STEPS + 1)
    assert trace.tokens[STEPS:STILL] == trace.tokens[:STEPS]


def test_the_engine_scores_drafts_only_where_it_is_the_verifier(traces):
    """What the policy has verified whole does not reach it."""
    assert traces["engine"].num_scored == [0] * STEPS + [NUM_ROWS] * 3 * STEPS
    assert traces["engine"].num_rows == [NUM_ROWS] * 4 * STEPS
    incomplete = [
        sum(rollouts.request.prefix(row) != ids for row, ids in enumerate(rollouts.response_ids))
        for (rollouts,) in traces["policy"].rounds
    ]
    assert traces["policy"].num_rows == [count for count in incomplete if count]
    assert not any(traces["policy"].num_scored)
    assert "timing_s/verify" in traces["policy"].metrics[-1]


def test_log_probs_of_the_engine_are_kept_as_it_reported_them(traces):
    for kept, reported in traces["engine"].drafts[:STEPS]:
        torch.testing.assert_close(kept, reported)
    for kept, reported in traces["policy"].drafts[:STEPS]:
        torch.testing.assert_close(kept, reported, rtol=0, atol=1e-4)
        assert kept != reported


def dapo(model, **options):
    return DAPO(
        model, [spread_but_why], num_generations=GROUP, max_completion_length=MAX_LENGTH, overlong_buffer=0, **options
    )


def test_dropped_groups_are_verified_by_the_engine_too(run):
    by_engine, by_policy = run("engine", dapo), run("policy", dapo)
    assert any(len(rounds) > 1 for rounds in by_engine.rounds)
    assert by_engine.of_cache("hit_fraction")[-1] == 1.0
    assert by_engine.tokens == by_policy.tokens
    assert by_engine.of_cache("saved_tokens") == by_policy.of_cache("saved_tokens")


@pytest.mark.parametrize("model_folder", ["Llama"], indirect=True)
@pytest.mark.parametrize("num_spare_positions", [100, 0])
def test_the_longest_draft_of_the_longest_prompt_can_be_scored(model_folder, tmp_path, num_spare_positions):
    """vLLM wants room for one token more, also where it shall only score: "longer than the maximum model length".

    Where the model has no position left, the last token of such a draft is generated again.
    """
    module = grpo(model_folder)
    num_tokens = max(len(module.tokenizer(question)["input_ids"]) for question in QUESTIONS) + 3  # of the template
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = num_tokens + MAX_LENGTH + num_spare_positions
    (folder / "config.json").write_text(json.dumps(config))

    data = questions(tmp_path, max_prompt_length=num_tokens)
    engine = VLLMEngine(dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25)
    module = grpo(str(folder), optimizer=partial(torch.optim.SGD, lr=0.0))
    trace = fit(module, data, PrefixCache(verifier="engine"), SpeculativeRollout(engine), max_epochs=2)
    assert data.num_dropped == {"train": 0}
    longest = sum(
        len(rollouts.prompts.prompt_ids[row // GROUP]) + len(ids) == num_tokens + MAX_LENGTH
        for (rollouts,) in trace.rounds[:STEPS]
        for row, ids in enumerate(rollouts.response_ids)
    )
    assert longest > 0
    assert sum(trace.of_cache("generated_tokens")[STEPS:]) == (0 if num_spare_positions else longest)
    assert trace.of_cache("hit_fraction")[STEPS:] == [1.0] * STEPS
