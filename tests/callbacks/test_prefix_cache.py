"""PrefixCache in a real Trainer: what it changes, and what it does not."""

import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reuse_runs import FROZEN, GROUP, SGD, STEPS, Trace, fit, grpo, last_responses, questions, rows_of, spread_but_why
from training import assert_identical, small_tokens, weights_of, with_many_stops

from lit_specrl import DAPO, GRPO, PPO, KLPenalty, PromptDataModule, SeparateCritic, SharedTrunkCritic
from lit_specrl.callbacks import PrefixCache, RolloutCallback, SpeculativeRollout
from lit_specrl.callbacks.prefix_cache import reward_outruns_accuracy
from lit_specrl.data import ArithmeticSource
from lit_specrl.engines import TransformersEngine, VLLMEngine
from lit_specrl.engines.base import Continuation
from lit_specrl.models.policy import Policy
from lit_specrl.prefix_cache.lenience import AdaptiveLenience

EVERYTHING = math.inf  # a lenience
NUM_ROWS = 2 * GROUP  # of a step
SETTLED = [0.0] * STEPS + [1.0] * 2 * STEPS  # a fraction that is 1 from the second epoch on


@pytest.fixture(scope="module")
def qwen_folder(tiny_qwen, tmp_path_factory):
    return with_many_stops(tiny_qwen, tmp_path_factory.mktemp("reuse") / "qwen")


@pytest.fixture
def run(model_folder, tmp_path):
    """Train on the questions for three epochs; returns the module and what happened."""

    def run(*callbacks, module=None, data=None, max_epochs=3, trainer=None, **options):
        module = module or grpo(model_folder, **options)
        data = data or questions(tmp_path)
        return module, fit(module, data, *callbacks, max_epochs=max_epochs, **trainer or {})

    return run


def without_cache(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("prefix_cache/")}


# ------------------------------------------------------------------------------------------------------ nothing reused


def test_the_first_epoch_is_that_of_a_run_without_the_cache(run):
    plain, expected = run(max_epochs=1)
    cached, trace = run(PrefixCache(), max_epochs=1)
    assert trace.tokens == expected.tokens
    assert [[rollouts.request.seeds for rollouts in rounds] for rounds in trace.rounds] == [
        [rollouts.request.seeds for rollouts in rounds] for rounds in expected.rounds
    ]
    assert [without_cache(metrics) for metrics in trace.learned] == expected.learned
    assert_identical(weights_of(cached), weights_of(plain))


@pytest.mark.parametrize(
    ("options", "hits"), [({"lenience": 0.0}, SETTLED), ({"acceptance": "off"}, None)], ids=["lenience 0", "off"]
)
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_a_cache_that_keeps_nothing_changes_nothing(run, options, hits, num_iterations):
    plain, expected = run(num_iterations=num_iterations)
    cached, trace = run(PrefixCache(**options), num_iterations=num_iterations)
    assert trace.tokens == expected.tokens
    assert [without_cache(metrics) for metrics in trace.learned] == expected.learned
    assert_identical(weights_of(cached), weights_of(plain))
    if hits is None:
        assert not any(name.startswith("prefix_cache/") for metrics in trace.metrics for name in metrics)
    else:
        assert trace.of_cache("hit_fraction") == hits
        assert trace.of_cache("saved_tokens") == [0.0] * 3 * STEPS


# --------------------------------------------------------------------------------------------------- everything reused


class CountingEngine(TransformersEngine):
    """Keeps how many rows it was asked to generate each time."""

    def __init__(self):
        super().__init__()
        self.num_rows = []

    def continue_rows(self, request, rows, meter):
        self.num_rows.append(len(rows))
        return super().continue_rows(request, rows, meter)


UNCHANGED = {
    "Llama": {},
    "Qwen": {"qwen": True},
    "warm": {"temperature": 0.6},
    "several blocks and micro-batches": {"block_length": 3, "micro_batch_tokens": 60},
    "low-rank adapters": {"lora": {"r": 4, "target_modules": "all-linear"}},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_an_unchanged_policy_says_everything_again_without_the_engine(run, model_folder, qwen_folder, case):
    """With gradient checkpointing, layers in training mode keep no keys and values, and the first draft ended the
    run."""
    options = dict(UNCHANGED[case])
    block_length, folder = options.pop("block_length", 128), qwen_folder if options.pop("qwen", 0) else model_folder
    engine = CountingEngine()
    module = grpo(folder, optimizer=FROZEN, **options)
    _, trace = run(PrefixCache(block_length=block_length), SpeculativeRollout(engine), module=module)
    assert engine.num_rows == [NUM_ROWS] * STEPS
    assert trace.tokens[STEPS:] == trace.tokens[:STEPS] * 2
    for name in ("hit_fraction", "reuse_fraction", "full_reuse_fraction"):
        assert trace.of_cache(name) == SETTLED
    assert trace.of_cache("generated_tokens")[STEPS:] == [0.0] * 2 * STEPS


def test_steps_without_any_generation_report_all_that_others_do(run):
    _, trace = run(PrefixCache(), optimizer=FROZEN, num_iterations=2, beta=0.05)
    first, later = trace.metrics[0], trace.metrics[STEPS]
    assert {name for name in set(first) - set(later) if not name.startswith("sampling/")} == {
        "timing_s/start_engine"  # nothing was sampled, so that there is nothing to compare
    }
    assert all(math.isfinite(value) for value in later.values())
    same = ["reward", "reward_std", "completions/mean_length", "completions/clipped_ratio", "rewards/small_tokens/mean"]
    assert [later[name] for name in same] == [first[name] for name in same]
    assert later["perf/rollout_tokens_per_s"] == 0


def test_rounding_to_bfloat16_costs_little_of_the_reuse(run):
    _, trace = run(PrefixCache(), optimizer=FROZEN, trainer={"precision": "bf16-mixed"})
    assert min(trace.of_cache("reuse_fraction")[STEPS:]) > 0.8


@pytest.mark.parametrize("acceptance", ["ratio", "sequence"])
def test_block_length_changes_nothing_but_time(run, acceptance):
    traces = [run(PrefixCache(acceptance=acceptance, block_length=length))[1] for length in (1, 4, 128, None)]
    assert all(trace.tokens == traces[0].tokens for trace in traces)
    assert 0.1 < traces[0].of_cache("reuse_fraction")[-1] < 0.9
    assert set(traces[1].of_cache("block_length")[STEPS:]) == {4}


def test_blocks_are_longer_where_drafts_are_kept_than_where_they_are_not(run):
    kept, rejected = (
        run(PrefixCache(), **options)[1].of_cache("block_length")[STEPS:] for options in ({"optimizer": FROZEN}, {})
    )
    assert kept[0] == rejected[0] == 128
    assert min(kept[1:]) > max(rejected[1:])


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
    passes, token_statistics = [], module.token_statistics

    def spy(policy, experience, rows=None):
        whose = "policy" if policy is module.policy else "reference"
        computed = list(range(experience.num_rows)) if rows is None else rows
        if computed:
            passes.append((module.step, whose, computed))
        return token_statistics(policy, experience, rows)

    module.token_statistics = spy
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


# ------------------------------------------------------------------------------------------------ which drafts are used


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


# ---------------------------------------------------------------------------------------------------------- evaluation


class Contents(RolloutCallback):
    """The rows in the cache when an evaluation begins and when it has ended."""

    def __init__(self, cache):
        self.cache, self.before, self.after = cache, [], []

    def rows(self):
        return [(row.uid, row.sample, row.step, row.token_ids.tolist()) for row in self.cache.store]

    def on_validation_start(self, trainer, pl_module):
        self.before.append(self.rows())

    def on_validation_end(self, trainer, pl_module):
        self.after.append(self.rows())

    on_test_start, on_test_end = on_validation_start, on_validation_end


def test_evaluation_generates_afresh_and_leaves_the_cache_alone(run, model_folder, tmp_path):
    """Questions, weights and seeds are those of a run without the cache; so are its validations."""
    import lightning as L

    def data():
        module = questions(tmp_path)
        path = module.sources["train"]
        source = next(iter(path.values()))
        return PromptDataModule(
            source, validation=source, test=source, batch_size=2, max_prompt_length=64, shuffle=False
        )

    trainer = {"num_sanity_val_steps": -1, "val_check_interval": 1}
    _, expected = run(data=data(), optimizer=FROZEN, trainer=trainer, max_epochs=2)
    cache = PrefixCache()
    contents = Contents(cache)
    module, trace = run(cache, contents, data=data(), optimizer=FROZEN, trainer=trainer, max_epochs=2)
    assert trace.of_cache("reuse_fraction") == [0.0, 0.0, 1.0, 1.0]
    assert [rollouts.response_ids for rollouts in trace.evaluation] == [
        rollouts.response_ids for rollouts in expected.evaluation
    ]
    assert all(not rollouts.request.prefixes and not rollouts.request.cached_responses for rollouts in trace.evaluation)
    assert [len(rows) for rows in contents.before] == [0, NUM_ROWS, 2 * NUM_ROWS, 2 * NUM_ROWS, 2 * NUM_ROWS]

    tested = Trace()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", callbacks=[cache, contents, tested], **options).test(module, datamodule=data())
    assert len(tested.evaluation) == 2
    assert all(not rollouts.request.prefixes for rollouts in tested.evaluation)
    assert contents.after == contents.before and len(contents.after) == 6


# ------------------------------------------------------------------------------------------------------- control group


def control_rows(rollouts):
    return [row for row, prefix in enumerate(rollouts.request.prefixes) if not prefix]


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 1), (0.01, 1), (0.5, 2), (0.7, 3)])
def test_some_rows_of_each_group_are_fresh_and_others_in_each_step(run, fraction, count):
    """The policy stands still, so that fresh rows are those of a run without the cache."""
    _, expected = run(optimizer=FROZEN, max_epochs=6)
    _, trace = run(PrefixCache(EVERYTHING, control_fraction=fraction), optimizer=FROZEN, max_epochs=6)
    chosen = {}
    for (rollouts,), (plain,) in zip(trace.rounds[STEPS:], expected.rounds[STEPS:], strict=True):
        rows = control_rows(rollouts)
        assert [sum(row // GROUP == group for row in rows) for group in range(2)] == [count, count]
        assert [rollouts.response_ids[row] for row in rows] == [plain.response_ids[row] for row in rows]
        for group, uid in enumerate(rollouts.prompts.uids):
            chosen.setdefault(uid, []).append([row % GROUP for row in rows if row // GROUP == group])
    assert all(len(set(map(tuple, samples))) > 1 for samples in chosen.values())
    assert trace.of_cache("hit_fraction")[STEPS:] == [1 - count / GROUP] * 5 * STEPS


def test_reward_gap_compares_reused_and_fresh_rows_of_the_same_group(run):
    _, trace = run(PrefixCache(EVERYTHING, control_fraction=0.5))
    for (rollouts,), metrics in zip(trace.rounds[STEPS:], trace.metrics[STEPS:], strict=True):
        fresh, gaps = control_rows(rollouts), []
        for group in range(2):
            rewards = {row: rollouts.total_rewards[row] for row in range(group * GROUP, (group + 1) * GROUP)}
            apart = [[reward for row, reward in rewards.items() if (row in fresh) is side] for side in (False, True)]
            gaps.append(sum(apart[0]) / 2 - sum(apart[1]) / 2)
        assert metrics["prefix_cache/reward_gap"] == pytest.approx(sum(gaps) / 2)
        assert abs(sum(gaps)) > 1e-3
    assert not any("prefix_cache/reward_gap" in metrics for metrics in trace.metrics[:STEPS])


def test_single_rows_are_fresh_now_and_then(run, model_folder):
    module = PPO(model_folder, [small_tokens], num_generations=1, max_completion_length=6, optimizer=FROZEN)
    _, trace = run(PrefixCache(control_fraction=0.4), module=module, max_epochs=16)
    hits = trace.of_cache("hit_fraction")[STEPS:]
    assert 0.4 < sum(hits) / len(hits) < 0.8


# ------------------------------------------------------------------------------------------------------------- metrics

NAMES = {
    f"prefix_cache/{name}"
    for name in (
        "hit_fraction",
        "reuse_fraction",
        "full_reuse_fraction",
        "verified_length_mean",
        "cached_length_mean",
        "generated_tokens",
        "saved_tokens",
        "reward_gap",
        "drift",
        "age",
        "bytes",
        "block_length",
        "kl",
        "lenience",
    )
} | {"timing_s/verify"}


def test_everything_is_logged_under_its_name(run, tmp_path):
    run(PrefixCache(control_fraction=0.25), trainer={"logger": CSVLogger(tmp_path, name="", version="run")})
    header, *lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    last = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert {name for name in last if name.startswith("prefix_cache/")} == {name for name in NAMES if "/" in name} - {
        "timing_s/verify"
    }
    assert all(last[name] for name in NAMES)


def test_the_metrics_are_what_they_say(run):
    """Recorded log-probs of a step belong to the policy that it began with; everything follows from them and the
    tokens."""
    sizes, scores, cache = [], [], PrefixCache(lenience=1.2)

    class Observer(RolloutCallback):
        def on_train_batch_start(self, *arguments):
            sizes.append(sum(row.num_bytes for row in cache.store))

        def on_rollout_start(self, trainer, pl_module, request):
            """Today's log-probs of all that is cached, also of what will be rejected."""
            rows = {
                (uid, sample): (prompt, cache.store.get(uid, sample).token_ids.tolist())
                for prompt, uid in enumerate(request.prompts.uids)
                for sample in range(GROUP)
                if cache.store.get(uid, sample) is not None
            }
            scored = (
                pl_module.scorer.response_logprobs(request.prompts, *map(list, zip(*rows.values(), strict=True)))
                if rows
                else []
            )
            scores.append({key: row.tolist() for key, row in zip(rows, scored, strict=True)})

    _, trace = run(cache, Observer())
    known = {}  # (step, tokens, log-probs at the last visit, log-probs when generated) of each row
    for step, ((rollouts,), experience, metrics) in enumerate(
        zip(trace.rounds, trace.experiences, trace.metrics, strict=True)
    ):
        drafts, reused, drift, kl, ages, num_whole = [], [], [], [], [], 0
        update = {}
        for row, key in enumerate(rows_of(rollouts)):
            ids, length = rollouts.response_ids[row], len(rollouts.request.prefix(row))
            now = experience.recorded_logprobs[row, : len(ids)].tolist()
            generated = list(now)
            if key in known:
                last_step, draft, verified, of_draft = known[key]
                drafts.append(len(draft))
                ages.append(step - last_step)
                reused.append(length)
                num_whole += length == len(ids)
                drift += [abs(new - old) for new, old in zip(now[:length], of_draft, strict=False)]
                changes = [new - old for new, old in zip(scores[step][key], verified, strict=True)]
                kl += [math.exp(change) - change - 1 for change in changes]
                generated[:length] = of_draft[:length]
            update[key] = step, ids, now, generated
        num_tokens = rollouts.num_tokens
        expected = {
            "hit_fraction": len(drafts) / NUM_ROWS,
            "reuse_fraction": sum(reused) / num_tokens,
            "full_reuse_fraction": num_whole / NUM_ROWS,
            "generated_tokens": num_tokens - sum(reused),
            "saved_tokens": sum(reused),
            "bytes": sizes[step],
            "lenience": 1.2,
        }
        if known.keys() & update.keys():
            expected |= {
                "verified_length_mean": sum(reused) / len(drafts),
                "cached_length_mean": sum(drafts) / len(drafts),
                "age": sum(ages) / len(drafts),
                "drift": sum(drift) / len(drift),
                "kl": sum(kl) / len(kl),
            }
            assert 0 < sum(reused) < num_tokens and expected["kl"] > 1e-4
        for name, value in expected.items():
            assert metrics[f"prefix_cache/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-6), (step, name)
        known |= update
    assert len(trace.rounds) == 3 * STEPS


@pytest.mark.parametrize("target", [0.1, 0.4])
def test_adaptive_lenience_follows_the_kl_that_is_reported(run, target):
    adaptive = AdaptiveLenience(target=target, min_fraction=0.3, smoothing=0)
    _, trace = run(PrefixCache(adaptive_lenience=adaptive), max_epochs=5)
    expected = 1.0, 0.3
    for metrics in trace.metrics:
        assert (metrics["prefix_cache/lenience"], metrics["prefix_cache/cached_fraction"]) == pytest.approx(expected)
        if "prefix_cache/kl" in metrics:
            allowance = target / metrics["prefix_cache/kl"]
            expected = min(max(allowance, 1.0), math.exp(0.5)), min(max(allowance, 0.3), 1.0)
    assert len(set(trace.of_cache("lenience" if target == 0.4 else "cached_fraction"))) > 2


def test_a_policy_that_moves_too_fast_reuses_in_few_groups(run):
    """Groups have drafts for all of their rows or for none; those without are neither verified nor cut."""
    adaptive = AdaptiveLenience(target=1e-9, min_fraction=0.5)
    _, trace = run(PrefixCache(adaptive_lenience=adaptive), max_epochs=8)
    hits = trace.of_cache("hit_fraction")[STEPS:]
    assert {0.0, 0.5} < set(hits) <= {0.0, 0.5, 1.0}
    assert sum(hits) / len(hits) == pytest.approx(0.5, abs=0.2)
    assert set(trace.of_cache("cached_fraction")) == {0.5}


@pytest.mark.parametrize(
    ("max_reuses", "expected"), [(1, [0, 1, 0, 1, 0, 1]), (2, [0, 1, 1, 0, 1, 1]), (None, [0, 1, 1, 1, 1, 1])]
)
def test_responses_are_renewed_after_so_many_reuses_in_the_same_epoch(run, max_reuses, expected):
    _, trace = run(PrefixCache(lenience=20.0, max_reuses=max_reuses), max_epochs=6)
    assert trace.of_cache("hit_fraction") == [float(hit) for hit in expected for _ in range(STEPS)]


def test_drift_bound_ends_what_lenience_would_keep(run):
    _, free = run(PrefixCache(lenience=20.0), max_epochs=6)
    _, bounded = run(PrefixCache(lenience=20.0, drift_bound=0.1), max_epochs=6)
    largest = [max(metrics.get("prefix_cache/drift", 0.0) for metrics in trace.metrics) for trace in (bounded, free)]
    assert largest[0] < largest[1]
    assert sum(bounded.of_cache("saved_tokens")) < sum(free.of_cache("saved_tokens"))


# ------------------------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize(("max_reuses", "num_warnings"), [(None, 1), (2, 0)])
def test_responses_that_are_never_renewed_are_warned_about_once(run, max_reuses, num_warnings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, trace = run(PrefixCache(lenience=math.inf, max_reuses=max_reuses), max_epochs=1 + -(-12 // STEPS))
    assert trace.of_cache("reuse_fraction")[STEPS] == 1.0
    assert sum("kept more than 98 %" in str(warning.message) for warning in caught) == num_warnings


def test_drafts_of_which_nothing_is_kept_are_warned_about_once(run):
    """Five steps with drafts must be useless in succession; steps of the first epoch have none."""
    sgd = partial(torch.optim.SGD, lr=50.0)
    with pytest.warns(UserWarning, match="PrefixCache kept less than 2 % of the cached tokens in 5 steps") as caught:
        _, trace = run(PrefixCache(lenience=1e-6), optimizer=sgd, max_epochs=5)
    assert max(trace.of_cache("reuse_fraction")) < 0.02
    assert sum("PrefixCache kept less" in str(warning.message) for warning in caught) == 1


def test_useful_drafts_are_not_warned_about(run, recwarn):
    _, trace = run(PrefixCache(), max_epochs=5)
    assert min(trace.of_cache("reuse_fraction")[STEPS:]) > 0.02
    assert not [warning for warning in recwarn if "PrefixCache kept" in str(warning.message)]


@pytest.mark.parametrize(
    ("rewards", "accuracies", "outruns"),
    [
        ([0.5, 0.6, 0.7], [0.40, 0.38, 0.35], True),
        ([0.1, 0.5, 0.6, 0.7], [0.1, 0.40, 0.38, 0.35], True),  # the last three count
        ([0.6, 0.7], [0.38, 0.35], False),
        ([], [], False),
        ([0.5, 0.6, 0.6], [0.40, 0.38, 0.35], False),
        ([0.5, 0.4, 0.7], [0.40, 0.38, 0.35], False),
        ([0.5, 0.6, 0.7], [0.40, 0.38, 0.38], False),
        ([0.5, 0.6, 0.7, 0.8], [0.40, 0.38, 0.35, 0.36], False),
        ([0.7, 0.6, 0.5], [0.35, 0.38, 0.40], False),
    ],
)
def test_reward_outruns_accuracy_where_one_rises_and_the_other_falls_twice(rewards, accuracies, outruns):
    assert reward_outruns_accuracy(list(zip(rewards, accuracies, strict=True))) is outruns


@pytest.mark.parametrize(("slope", "num_warnings"), [(-0.1, 2), (0.1, 0)])
def test_rewards_that_rise_while_accuracy_falls_are_warned_about(run, model_folder, recwarn, slope, num_warnings):
    """A validation after each of seven steps; three make a warning, and then counting begins anew."""
    warnings.simplefilter("always")
    module = None

    def scripted(completions, **columns):
        training = module.trainer.training
        return [0.1 * module.step if training else 1 + slope * module.step] * len(completions)

    module = GRPO(model_folder, [scripted], num_generations=2, max_completion_length=4)
    data = PromptDataModule(
        ArithmeticSource(14),
        validation=ArithmeticSource(2, split="validation"),
        batch_size=2,
        max_prompt_length=64,
    )
    run(PrefixCache(), module=module, data=data, max_epochs=1, trainer={"val_check_interval": 1})
    found = [warning for warning in recwarn if "training reward rises while validation" in str(warning.message)]
    assert len(found) == num_warnings


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lenience": -0.5}, "lenience must not be negative, got -0.5"),
        ({"lenience": math.nan}, "lenience must not be negative, got nan"),
        ({"drift_bound": -1.0}, r"drift_bound must not be negative, got -1\.0"),
        ({"drift_bound": 1.0, "acceptance": "full"}, r"drift_bound=1\.0 belongs to acceptance='ratio'.*by 'full'"),
        ({"acceptance": "greedy"}, "acceptance must be 'ratio', 'sequence', 'random', 'full' or 'off', got 'greedy'"),
        ({"max_reuses": 0}, "max_reuses must be at least 1, got 0; use acceptance='off'"),
        (
            {"adaptive_lenience": AdaptiveLenience(0.1), "acceptance": "random"},
            "adaptive_lenience steers acceptance='ratio' or 'sequence', got 'random'",
        ),
        ({"control_fraction": 1.0}, r"control_fraction must lie in \[0, 1\), got 1\.0"),
        ({"control_fraction": -0.1}, r"control_fraction must lie in \[0, 1\), got -0\.1"),
        ({"block_length": 0}, "block_length must be at least 1 token, got 0"),
        ({"verifier": "vllm"}, "verifier must be 'policy' or 'engine', got 'vllm'"),
        ({"max_bytes": 0}, "max_bytes must be positive, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixCache(**options)


@pytest.fixture
def no_policy(monkeypatch):
    """Fails the test when weights are loaded."""

    def build(*arguments, **options):
        pytest.fail("a model was loaded before the combination was checked")

    monkeypatch.setattr(Policy, "build", build)


@pytest.mark.usefixtures("no_policy")
@pytest.mark.parametrize("truncation", [{"top_p": 0.9}, {"top_k": 20}])
def test_ratios_of_truncated_distributions_are_refused(run, truncation):
    with pytest.raises(MisconfigurationException, match=r"compares log-probs of the whole softmax.*use top_p=1\.0"):
        run(PrefixCache(), importance_sampling=None, **truncation)


@pytest.mark.parametrize("acceptance", ["full", "random", "off"])
def test_rules_without_ratios_go_with_truncated_distributions(run, acceptance):
    _, trace = run(PrefixCache(acceptance=acceptance), importance_sampling=None, top_p=0.9, max_epochs=2)
    assert len(trace.metrics) == 2 * STEPS


@pytest.mark.usefixtures("no_policy")
def test_an_engine_that_verifies_is_refused_at_other_temperatures(run):
    with pytest.raises(MisconfigurationException, match=r"scores at temperature 1, rollouts are sampled at 0\.7"):
        run(PrefixCache(verifier="engine"), SpeculativeRollout(VLLMEngine()), temperature=0.7)


@pytest.mark.parametrize("engine", [TransformersEngine(), None], ids=["TransformersEngine", "default"])
def test_an_engine_that_cannot_verify_is_refused_by_name(run, engine):
    """Without SpeculativeRollout the engine is made with the first rollout, and the message told of a NoneType."""
    callbacks = [SpeculativeRollout(engine)] if engine else []
    with pytest.raises(
        MisconfigurationException, match=r"needs SpeculativeRollout\(engine=VLLM.*found TransformersEngine"
    ):
        run(PrefixCache(verifier="engine"), *callbacks)


def test_other_modules_are_refused():
    message = "PrefixCache works with an RLVRModule such as GRPO, got BoringModel"
    with pytest.raises(MisconfigurationException, match=message):
        fit(BoringModel(), None, PrefixCache())
