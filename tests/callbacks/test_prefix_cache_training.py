"""PrefixCache in a real Trainer: reused rollouts train as if the engine had given them."""

import math
from functools import partial

import pytest
import torch
from reuse_runs import FROZEN, GROUP, SGD, STEPS, grpo, last_responses, questions, rows_of, spread_but_why
from training import small_tokens, weights_of

from lit_specrl import DAPO, PPO, KLPenalty, SeparateCritic, SharedTrunkCritic
from lit_specrl.callbacks import PrefixCache, RolloutCallback, SpeculativeRollout
from lit_specrl.engines import TransformersEngine
from lit_specrl.engines.base import Continuation
from lit_specrl.models.policy import Policy

EVERYTHING = math.inf  # a lenience
NUM_ROWS = 2 * GROUP  # of a step
SETTLED = [0.0] * STEPS + [1.0] * 2 * STEPS  # a fraction that is 1 from the second epoch on


# -------------------------------------------------------------------------------------- reused rollouts are like others


class ReplayEngine(TransformersEngine):
    """Gives the response that the same sample got in an earlier step, and generates where there is none; without any
    cache."""

    def __init__(self):
        super().__init__()
        self.last, self._of_step = {}, {}

    def continue_rows(self, request, rows, meter):
        size = request.sampling.num_generations
        keys = [(request.prompts.uids[row // size], row % size) for row in rows]
        fresh = [row for row, key in zip(rows, keys, strict=True) if key not in self.last]
        generated = dict(zip(fresh, super().continue_rows(request, fresh, meter), strict=True))
        responses = [generated.get(row) or self.last[key] for row, key in zip(rows, keys, strict=True)]
        self._of_step |= {
            key: Continuation(response.token_ids, [math.nan] * len(response.token_ids), response.finish_reason)
            for key, response in zip(keys, responses, strict=True)
        }
        return responses

    def end_step(self):
        self.last |= self._of_step


class EndOfStep(RolloutCallback):
    def __init__(self, engine):
        self.engine = engine

    def on_train_batch_end(self, *arguments):
        self.engine.end_step()


COMMON = {"num_generations": GROUP, "max_completion_length": 12, "optimizer": SGD}
ALGORITHMS = {
    "GRPO": partial(grpo),
    "GRPO, several updates": partial(grpo, num_minibatches=2, num_iterations=2),
    "GRPO, KL in the loss": partial(grpo, beta=0.1),
    "GRPO, KL in the reward": partial(grpo, beta=0.1, kl=KLPenalty(in_reward=True), num_iterations=2),
    "GRPO, truncated rows masked": partial(grpo, mask_truncated_completions=True),
    "GRPO, adapters": partial(grpo, lora={"r": 4, "target_modules": "all-linear"}, beta=0.1),
    "DAPO": lambda model: DAPO(model, [spread_but_why], overlong_buffer=0, **COMMON),
    "DAPO, several updates": lambda model: DAPO(model, [spread_but_why], num_minibatches=2, beta=0.1, **COMMON),
    "PPO": lambda model: PPO(model, [small_tokens], SeparateCritic(optimizer=SGD), lam=0.9, **COMMON),
    "PPO, KL, warm-up": lambda model: PPO(
        model, [small_tokens], SeparateCritic(optimizer=SGD, warmup_steps=3), beta=0.1, num_minibatches=2, **COMMON
    ),
    "PPO, shared trunk": lambda model: PPO(model, [small_tokens], SharedTrunkCritic(optimizer=SGD), beta=0.1, **COMMON),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("acceptance", ["full", "ratio"])
def test_reused_rollouts_train_as_if_the_engine_had_given_them(run, model_folder, algorithm, acceptance):
    """Six steps against an engine that repeats itself, from which the module learns rewards and log-probs anew.

    What verification found by blocks differs from that in the last digits; without it nothing differs.
    """
    make, engine = ALGORITHMS[algorithm], ReplayEngine()
    expected_module, expected = run(EndOfStep(engine), SpeculativeRollout(engine), module=make(model_folder))
    cache = PrefixCache(acceptance="full") if acceptance == "full" else PrefixCache(lenience=EVERYTHING)
    module, trace = run(cache, module=make(model_folder))
    assert trace.tokens == expected.tokens
    assert sum(trace.of_cache("saved_tokens")) > 0.5 * sum(trace.of_cache("generated_tokens"))
    tolerance = {"rtol": 0, "atol": 0} if acceptance == "full" else {}
    torch.testing.assert_close(weights_of(module), weights_of(expected_module), **tolerance)
    for metrics, expected_metrics in zip(trace.learned, expected.learned, strict=True):
        for name, value in expected_metrics.items():
            assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def passes_of(module):
    """Fills up, while the module trains, with whose log-probs were computed of which rows."""
    passes, configure_model = [], module.configure_model

    def configure():
        configure_model()
        token_statistics = module.scorer.token_statistics

        def spy(experience, rows=None, policy=None):
            whose = "policy" if policy in (None, module.policy) else "reference"
            if rows is None or rows:
                passes.append((module.step, whose, list(range(experience.num_rows)) if rows is None else rows))
            return token_statistics(experience, rows, policy)

        module.scorer.token_statistics = spy

    module.configure_model = configure
    return passes


def unknown_rows(rollouts):
    """Rows that were not taken over whole."""
    return [row for row, ids in enumerate(rollouts.response_ids) if rollouts.request.prefix(row) != ids]


@pytest.mark.parametrize("reuse_rewards", [True, False])
def test_nothing_that_is_known_is_computed_or_asked_again(run, model_folder, reuse_rewards):
    asked = []

    def asking(completion_ids, **columns):
        asked.append(completion_ids)
        return small_tokens(completion_ids)

    module = grpo(model_folder, [asking], num_iterations=2, beta=0.1)
    passes = passes_of(module)
    _, trace = run(PrefixCache(lenience=1.5, reuse_rewards=reuse_rewards), module=module)
    unknown = [unknown_rows(rollouts) for (rollouts,) in trace.rounds]
    assert unknown[:STEPS] == [list(range(NUM_ROWS))] * STEPS
    assert all(0 < len(rows) < NUM_ROWS for rows in unknown[STEPS:])
    assert passes == [(step, whose, rows) for step, rows in enumerate(unknown) for whose in ("policy", "reference")]
    to_ask = unknown if reuse_rewards else [range(NUM_ROWS)] * len(unknown)
    assert asked == [
        [rollouts.response_ids[row] for row in rows] for (rollouts,), rows in zip(trace.rounds, to_ask, strict=True)
    ]


def test_with_one_update_a_step_only_rows_that_it_skips_are_scored_besides(run, model_folder):
    """The training forward finds the log-probs of the others."""
    module = grpo(model_folder, [spread_but_why])
    passes = passes_of(module)
    _, trace = run(PrefixCache(lenience=EVERYTHING), module=module)
    assert passes == [(1, "policy", list(range(GROUP)))]  # "Why?" in the first epoch; known from then on
    assert trace.of_cache("reuse_fraction") == SETTLED


def test_rewards_are_not_called_when_all_are_known(run, model_folder):
    """A reward that compares responses with the longest one failed on a step of nothing but reused rows."""

    def share_of_longest(completion_ids, **columns):
        longest = max(len(ids) for ids in completion_ids)
        return [len(ids) / longest for ids in completion_ids]

    _, trace = run(PrefixCache(), module=grpo(model_folder, [share_of_longest], optimizer=FROZEN))
    assert trace.of_cache("full_reuse_fraction") == SETTLED


class Recomputed(RolloutCallback):
    """Log-probs of every step's rows, found once more before the update."""

    def __init__(self, model_folder):
        self.reference, self.pairs = Policy.build(model_folder), []

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        whole = [row for row in range(rollouts.num_rows) if row not in unknown_rows(rollouts)]
        for policy, taken in [
            (pl_module.policy, experience.old_logprobs),
            (self.reference, experience.reference_logprobs),
        ]:
            found = pl_module.scorer.token_statistics(experience, policy=policy).logprobs
            self.pairs.append((taken[whole], found[whole]))


def test_logprobs_from_the_cache_are_those_that_would_be_computed(run, model_folder):
    recomputed = Recomputed(model_folder)
    run(PrefixCache(lenience=1.5), recomputed, num_iterations=2, beta=0.1)
    assert sum(len(taken) for taken, _ in recomputed.pairs) > NUM_ROWS
    for taken, found in recomputed.pairs:
        torch.testing.assert_close(taken, found)


# -------------------------------------------------------------------------------------- which cached responses are used


def check_prefixes(trace, whole):
    """Every prefix begins what the same sample of the same prompt said last; with `whole` it is all of that."""
    for step, rounds in enumerate(trace.rounds):
        last = last_responses(trace, step)
        for rollouts in rounds:
            for row, key in enumerate(rows_of(rollouts)):
                prefix = rollouts.request.prefix(row)
                draft = last.get(key, [])
                assert prefix == (draft if whole else draft[: len(prefix)])
                assert rollouts.response_ids[row][: len(prefix)] == prefix


@pytest.mark.parametrize("lenience", [1.0, EVERYTHING])
def test_shuffled_prompts_find_their_own_responses(run, tmp_path, lenience):
    _, trace = run(PrefixCache(lenience), data=questions(tmp_path, shuffle=True))
    assert [rounds[0].prompts.uids for rounds in trace.rounds[:STEPS]] != [
        rounds[0].prompts.uids for rounds in trace.rounds[STEPS : 2 * STEPS]
    ]
    assert trace.of_cache("hit_fraction") == SETTLED
    check_prefixes(trace, whole=lenience == EVERYTHING)


def test_equal_questions_have_responses_of_their_own(run, tmp_path):
    data = questions(tmp_path, ["Hi", "Hi", "Why?", "Hi"])
    _, trace = run(PrefixCache(EVERYTHING), data=data)
    assert len(last_responses(trace)) == 4 * GROUP
    assert trace.of_cache("hit_fraction") == SETTLED
    check_prefixes(trace, whole=True)


def test_prompts_that_sat_out_an_epoch_are_found_later(run, tmp_path):
    """Three of four questions an epoch, in another order each time."""
    data = questions(tmp_path, batch_size=3, shuffle=True)
    _, trace = run(PrefixCache(EVERYTHING), data=data, max_epochs=6)
    assert {round(hits * 3) for hits in trace.of_cache("hit_fraction")} == {0, 2, 3}
    check_prefixes(trace, whole=True)


@pytest.mark.parametrize("lenience", [1.0, EVERYTHING])
def test_groups_that_dynamic_sampling_drops_are_cached_too(run, model_folder, lenience):
    _, trace = run(PrefixCache(lenience), module=ALGORITHMS["DAPO"](model_folder), max_epochs=4)
    check_prefixes(trace, whole=lenience == EVERYTHING)
    dropped = [
        (step, rollouts.prompts.prompts.index(prompt), rollouts)
        for step, rounds in enumerate(trace.rounds)
        for rollouts in rounds
        for prompt in rollouts.prompts.prompts
        if "Why?" in prompt
    ]
    assert len(dropped) >= 3
    for step, group, rollouts in dropped[1:]:
        prefixes = rollouts.request.prefixes[group * GROUP : (group + 1) * GROUP]
        assert any(prefixes), step
    assert any(len(rounds) > 1 for rounds in trace.rounds)


def test_dropped_groups_count_in_what_was_generated_and_saved(run, model_folder):
    _, trace = run(PrefixCache(), module=ALGORITHMS["DAPO"](model_folder), max_epochs=4)
    assert any(len(rounds) > 1 for rounds in trace.rounds)
    for metrics, rounds in zip(trace.metrics, trace.rounds, strict=True):
        saved = sum(len(prefix) for rollouts in rounds for prefix in rollouts.request.prefixes)
        assert metrics["prefix_cache/saved_tokens"] == saved
        num_tokens = sum(rollouts.num_tokens for rollouts in rounds)
        assert metrics["prefix_cache/generated_tokens"] == num_tokens - saved


def test_a_full_cache_forgets_the_oldest_and_nothing_else_happens(run, tmp_path):
    """About a thousand bytes a row: room for six of the eight prompts."""
    texts = [f"Question {number}" for number in range(8)]
    cache, counts = PrefixCache(EVERYTHING, max_bytes=6 * GROUP * 1000), []

    class Sizes(RolloutCallback):
        def on_train_batch_end(self, *arguments):
            counts.append((cache.store.num_bytes, len(cache.store)))

    data = questions(tmp_path, texts, shuffle=True)
    _, trace = run(cache, Sizes(), data=data, max_epochs=4)
    assert all(num_bytes <= 6 * GROUP * 1000 for num_bytes, _ in counts)
    assert counts[-1][1] < 8 * GROUP and cache.store.num_evicted > 0
    hits = trace.of_cache("hit_fraction")[4:]
    assert 0.2 < sum(hits) / len(hits) < 0.9
    last = last_responses(trace)
    assert all(row.token_ids.tolist() == last[row.uid, row.sample] for row in cache.store)
    newest = [key for rounds in trace.rounds[-2:] for rollouts in rounds for key in rows_of(rollouts)]
    assert all(cache.store.get(*key) is not None for key in newest)
    assert {name for metrics in trace.metrics for name, value in metrics.items() if not math.isfinite(value)} == {
        "prefix_cache/lenience"
    }
