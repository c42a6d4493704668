"""Drafters and the scheduler in real runs with vLLM: what is learned is what is learned without them."""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import reuse_runs
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reuse_runs import STEPS, fit, questions
from training import assert_identical, weights_of, with_many_stops

from lit_specrl.callbacks import AdaptiveScheduler, PrefixCache, SpeculativeRollout
from lit_specrl.callbacks.speculative_rollout import speculation_metrics
from lit_specrl.cli.fit import train as command_line
from lit_specrl.drafting import DraftModel, HistoryDrafter, NGramDrafter
from lit_specrl.drafting.scheduler.length_schedule import DecodeStep, LengthSchedule
from lit_specrl.engines import TransformersEngine, VLLMEngine


def grpo(model, temperature=0.3):
    """Sampled so sharply that a text often comes again."""
    return reuse_runs.grpo(model, temperature=temperature)


class KeptEngine(VLLMEngine):
    """Outlives the runs that use it, for a start takes seconds."""

    def __init__(self):
        super().__init__(dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25, max_model_len=128)

    def start(self, *arguments):
        if self.llm is None:
            super().start(*arguments)
        self.speculation_control = self.speculation_control if self.drafter else None

    def shutdown(self):
        self.policy_version = self.speculation_control = None


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    return with_many_stops(tiny_model, tmp_path_factory.mktemp("speculation") / "model")


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """Three epochs without drafts: what was generated, what was learned, the weights at the end."""
    engine, module = KeptEngine(), grpo(model)
    trace = fit(module, questions(tmp_path_factory.mktemp("plain")), SpeculativeRollout(engine), max_epochs=3)
    VLLMEngine.shutdown(engine)
    return trace, weights_of(module)


@pytest.fixture(scope="module")
def history(plain):
    """The engine and the drafter that most tests share; after the plain engine, for one process should not hold
    both."""
    engine = KeptEngine()
    yield engine, HistoryDrafter(3)
    VLLMEngine.shutdown(engine)


def constant(max_length, drafting_costs):
    """A schedule that has seen drafts cost nothing, or far too much."""
    schedule = LengthSchedule(max_length, probe_fraction=0.0)
    schedule.profile(
        [
            DecodeStep(
                num_active=batch,
                length=length,
                seconds=(1e6 if drafting_costs else 1e-6) if length else 1.0,
                num_tokens=batch,
            )
            for batch in (1, 16)
            for length in (0, 1, max_length)
            for _ in range(50)
        ]
    )
    return schedule


LEARNED = ["reward", "loss", "grad_norm"]


def assert_same_run(trace, module, plain):
    expected, weights = plain
    assert trace.tokens == expected.tokens
    assert_identical(weights_of(module), weights)
    for name in LEARNED:
        if name in expected.metrics[0]:
            assert [step[name] for step in trace.metrics] == [step[name] for step in expected.metrics]


def test_history_alone_changes_nothing_but_the_number_of_steps(history, model, plain, tmp_path):
    engine, drafter = history
    module = grpo(model)
    callbacks = [PrefixCache(acceptance="off"), SpeculativeRollout(engine, drafter)]
    trace = fit(module, questions(tmp_path), *callbacks, max_epochs=3)
    assert_same_run(trace, module, plain)
    assert all(step["speculation/length"] > 0 for step in trace.metrics)  # from siblings in the first epoch
    read = [any(name.startswith("speculation/drafted_by_source/past") for name in step) for step in trace.metrics]
    assert read == [False] * STEPS + [True] * 2 * STEPS
    late = trace.metrics[STEPS:]
    assert sum(step["speculation/acceptance_length"] for step in late) > len(late)
    assert all(0 <= step["speculation/acceptance_rate"] <= 1 for step in late)
    assert all(step["prefix_cache/reuse_fraction"] == 0 for step in trace.metrics)


@pytest.mark.parametrize("drafting_costs", [False, True])
def test_the_scheduler_changes_nothing_either(history, model, plain, tmp_path, drafting_costs):
    engine, drafter = history
    module, scheduler = grpo(model), AdaptiveScheduler(probe_fraction=0.0)
    scheduler.schedule = constant(3, drafting_costs)
    callbacks = [PrefixCache(acceptance="off"), SpeculativeRollout(engine, drafter), scheduler]
    trace = fit(module, questions(tmp_path), *callbacks, max_epochs=3)
    assert_same_run(trace, module, plain)
    if drafting_costs:
        assert {step["speculation/off_reason"] for step in trace.metrics} == {1.0}
        assert {step["speculation/length"] for step in trace.metrics} == {0.0}
    else:
        assert trace.metrics[STEPS]["speculation/length"] > 0
    for step in trace.metrics:
        assert step["speculation/step_s_predicted"] > 0 and step["speculation/measured_gain"] > 0


def test_the_first_rollout_is_preceded_by_a_profile(history, model, tmp_path):
    engine, drafter = history
    scheduler = AdaptiveScheduler()
    callbacks = [PrefixCache(), SpeculativeRollout(engine, drafter), scheduler]
    trace = fit(grpo(model), questions(tmp_path), *callbacks, max_epochs=2)
    assert ["timing_s/profile_speculation" in step for step in trace.metrics] == [True] + [False] * (2 * STEPS - 1)
    assert scheduler.schedule.latency.num_steps > 20


@pytest.mark.parametrize("verifier", ["policy", "engine"])
def test_verified_prefixes_are_continued_from_the_rest_of_their_drafts(history, model, tmp_path, verifier):
    engine, drafter = history
    cache = PrefixCache(lenience=1.0, verifier=verifier)
    module = grpo(model, temperature=0.3 if verifier == "policy" else 1.0)
    trace = fit(module, questions(tmp_path), cache, SpeculativeRollout(engine, drafter), max_epochs=3)
    later = trace.metrics[STEPS:]
    assert any(step["prefix_cache/reuse_fraction"] > 0 for step in later)
    assert any(step.get("speculation/length", 0) > 0 for step in later)


def test_a_resumed_run_is_the_same_to_the_bit(history, model, plain, tmp_path):
    """Also with a scheduler, whose decisions depend on the clock: the products of so small a model round alike at all
    lengths."""
    engine, drafter = history

    def callbacks():
        saver = ModelCheckpoint(
            tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
        )
        scheduler = AdaptiveScheduler()
        return [PrefixCache(acceptance="off"), SpeculativeRollout(engine, drafter), scheduler, saver], scheduler

    first, scheduler = callbacks()
    fit(grpo(model), questions(tmp_path), *first, max_epochs=1)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    saved, learnt = content["adaptive_scheduler"], content["drafter_knowledge"]["state"]
    assert saved == scheduler.schedule.state_dict()
    assert learnt == drafter.state_dict() != HistoryDrafter().state_dict()

    del drafter.chances  # another process knows nothing of them
    begin = []
    module, (second, scheduler) = grpo(model), callbacks()
    watcher = LambdaCallback(on_train_start=lambda trainer, module: begin.append(drafter.state_dict()))
    trace = fit(module, questions(tmp_path), *second, watcher, max_epochs=3, ckpt_path=checkpoint)
    assert begin == [learnt]
    assert trace.tokens == plain[0].tokens[STEPS:]
    assert_identical(weights_of(module), plain[1])
    assert scheduler.schedule.latency.num_steps > saved["latency"]["counts"][0][0]
    assert "timing_s/profile_speculation" not in trace.metrics[0]


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            lambda: [AdaptiveScheduler()],
            r"AdaptiveScheduler needs something to schedule; give SpeculativeRollout a drafter",
        ),
        (
            lambda: [SpeculativeRollout(VLLMEngine()), AdaptiveScheduler()],
            "AdaptiveScheduler needs something to schedule",
        ),
        (
            lambda: [SpeculativeRollout(TransformersEngine(), NGramDrafter())],
            r"TransformersEngine cannot speculate; use",
        ),
        (
            lambda: [SpeculativeRollout(VLLMEngine(), HistoryDrafter(siblings=False))],
            r"add PrefixCache\(\), PrefixCache\(acceptance='off'\)",
        ),
    ],
    ids=["nothing", "no drafter", "transformers", "history without cache"],
)
def test_what_cannot_work_is_refused_at_once(model, tmp_path, callbacks, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(grpo(model), questions(tmp_path), *callbacks())


def test_a_draft_model_that_does_not_fit_is_refused_before_the_engine_starts(model, make_llama, tmp_path):
    rollout = SpeculativeRollout(VLLMEngine(), DraftModel(make_llama(vocab_size=130)))
    with pytest.raises(ValueError, match="has a vocabulary of 130 tokens, the policy one of 128"):
        fit(grpo(model), questions(tmp_path), rollout)
    with pytest.raises(ValueError, match="neither a folder"):
        fit(grpo(model), questions(tmp_path), SpeculativeRollout(VLLMEngine(), DraftModel(str(tmp_path / "nowhere"))))


def test_values_out_of_range():
    with pytest.raises(ValueError, match=r"hysteresis must lie in \[0, 1\), got 2"):
        AdaptiveScheduler(hysteresis=2)


def test_metrics_of_ragged_steps():
    """Two rows that draft two and one tokens; then one row that drafts nothing."""
    steps = [
        DecodeStep(num_active=2, length=2, seconds=0.3, num_tokens=4, drafted=[2, 1], accepted=[1, 1]),
        DecodeStep(num_active=1, length=0, seconds=0.1, num_tokens=1),
    ]
    assert speculation_metrics(steps) == {
        "speculation/length": 1.0,
        "speculation/acceptance_length": pytest.approx(5 / 3),
        "speculation/active_requests": 1.5,
        "speculation/step_s": pytest.approx(0.2),
        "speculation/acceptance_rate": pytest.approx(2 / 3),
        "speculation/accepted_by_position/1": 0.5,
        "speculation/accepted_by_position/2": 1.0,
    }


def test_drafts_that_are_never_accepted_are_warned_about_once(recwarn):
    rollout = SpeculativeRollout(TransformersEngine())
    module = SimpleNamespace(step_metrics={})
    for accepted in [1] * 9 + [40] + [1] * 15:  # of 100; the good step starts the count anew
        rollout._steps = [
            DecodeStep(
                num_active=100, length=1, seconds=0.1, num_tokens=100 + accepted, drafted=[100], accepted=[accepted]
            )
        ]
        rollout.on_experience_end(None, module, None, None)
    (warning,) = [warning for warning in recwarn if "less than 5 % of the drafted tokens" in str(warning.message)]
    assert "Add AdaptiveScheduler" in str(warning.message)


@pytest.mark.parametrize("drafter", ["HistoryDrafter", "NGramDrafter"])
def test_another_drafter_is_one_line_of_yaml(drafter, tmp_path, capsys):
    preset = Path("configs/callbacks/speculation.yaml").read_text()
    (tmp_path / "preset.yaml").write_text(preset.replace("{class_path: HistoryDrafter}", f"{{class_path: {drafter}}}"))
    configs = ["recipes/quickstart.yaml", "configs/callbacks/prefix_cache.yaml", f"{tmp_path}/preset.yaml"]
    with pytest.raises(SystemExit):
        command_line(["fit", *(f"--config={config}" for config in configs), "--print_config"])
    printed = capsys.readouterr().out
    assert f"lit_specrl.{drafter}" in printed and "lit_specrl.AdaptiveScheduler" in printed


@pytest.mark.parametrize("twice", [PrefixCache, lambda: SpeculativeRollout(TransformersEngine())])
def test_two_of_a_kind_are_refused(model, tmp_path, twice):
    with pytest.raises(
        MisconfigurationException, match=r"the trainer has 2 callbacks (PrefixCache|SpeculativeRollout); leave one"
    ):
        fit(grpo(model), questions(tmp_path), twice(), twice())


def test_trainers_of_other_modules_are_told(model):
    with pytest.raises(MisconfigurationException, match="AdaptiveScheduler works with an RLVRModule"):
        AdaptiveScheduler().setup(L.Trainer(accelerator="cpu", logger=False), L.LightningModule(), "fit")
