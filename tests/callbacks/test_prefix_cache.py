"""PrefixCache in a real Trainer: what it keeps, what it leaves alone, and what it refuses."""

import math

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reuse_runs import FROZEN, GROUP, STEPS, Trace, fit, grpo, questions
from training import assert_identical, weights_of, with_many_stops

from lit_specrl import PromptDataModule
from lit_specrl.callbacks import PrefixCache, RolloutCallback, SpeculativeRollout
from lit_specrl.engines import TransformersEngine, VLLMEngine
from lit_specrl.models.policy import Policy
from lit_specrl.prefix_cache.lenience import AdaptiveLenience

NUM_ROWS = 2 * GROUP  # of a step
SETTLED = [0.0] * STEPS + [1.0] * 2 * STEPS  # a fraction that is 1 from the second epoch on


@pytest.fixture(scope="module")
def qwen_folder(tiny_qwen, tmp_path_factory):
    return with_many_stops(tiny_qwen, tmp_path_factory.mktemp("reuse") / "qwen")


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
@pytest.mark.parametrize("truncation", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
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
