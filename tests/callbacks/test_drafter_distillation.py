"""Drafters that learn within real runs with vLLM."""

import json
import re
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reuse_runs import STEPS, fit, grpo, questions
from training import assert_identical, weights_of, with_many_stops

from lit_specrl.callbacks import (
    AdaptiveScheduler,
    DrafterDistillation,
    PrefixCache,
    RolloutCallback,
    SpeculativeRollout,
)
from lit_specrl.callbacks.logger_report import layout_for
from lit_specrl.drafting import DraftModel, Eagle3Drafter, NGramDrafter
from lit_specrl.drafting.distillation.buffer import DistillationSample
from lit_specrl.drafting.distillation.samples import cut, is_held_out
from lit_specrl.drafting.networks import Eagle3Network
from lit_specrl.engines import VLLMEngine

FAST = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0)


class KeptEngine(VLLMEngine):
    """Outlives the runs that use it, for a start takes seconds; its drafter begins as it was."""

    def __init__(self, drafter):
        super().__init__(dtype="float32", max_num_seqs=16, cpu_kv_cache_gib=0.25, max_model_len=128)
        self.drafter = drafter

    def start(self, *arguments):
        if self.llm is None:
            super().start(*arguments)

    def shutdown(self):
        self.policy_version, self.drafter_version = None, -1


@pytest.fixture(scope="module")
def model(make_llama, tmp_path_factory):
    """Three layers, which a head reads."""
    return with_many_stops(make_llama(num_hidden_layers=3), tmp_path_factory.mktemp("distillation") / "model")


@pytest.fixture(scope="module", params=["head", "model"])
def kept(request, model, make_llama):
    small = make_llama(num_hidden_layers=1, initializer_range=0.15)
    drafter = Eagle3Drafter(num_speculative_tokens=2) if request.param == "head" else DraftModel(small, 2)
    engine = KeptEngine(drafter)
    yield engine, drafter
    VLLMEngine.shutdown(engine)


def distillation(**options):
    defaults = {"max_step_fraction": None, "optimizer": FAST, "update_tokens": 24, "holdout_fraction": 0.3}
    return DrafterDistillation(**defaults | options)


class Watch(RolloutCallback):
    """Drafter's weights after every step, and the version that each rollout was drafted by."""

    def __init__(self, engine, learner):
        self.engine, self.learner, self.weights, self.versions = engine, learner, [], []

    def on_rollout_end(self, trainer, pl_module, rollouts):
        self.versions.append(self.engine.drafter_version)

    def on_train_batch_end(self, *arguments):
        self.weights.append({name: weight.clone() for name, weight in self.learner.network.weights()})


def run(kept, model, folder, learner, *callbacks, **options):
    engine, drafter = kept
    module, watch = grpo(model), Watch(engine, learner)
    trace = fit(module, questions(folder), SpeculativeRollout(engine, drafter), learner, watch, *callbacks, **options)
    return module, trace, watch


def test_the_drafter_learns_and_the_running_engine_is_told(kept, model, tmp_path):
    learner = distillation()
    _, trace, watch = run(kept, model, tmp_path, learner, max_epochs=6)
    versions = [step["drafter/version"] for step in trace.metrics[1:]]
    assert versions[-1] > STEPS and watch.versions == [0.0, *versions]
    kept_engine, _ = kept
    assert kept_engine.drafter_is_intact()
    trained = [step for step in trace.metrics if "drafter/loss" in step]
    assert trained[-1]["drafter/kl"] < trained[0]["drafter/kl"]
    for step in trained:
        assert step["drafter/weight_mean"] == pytest.approx(1, abs=0.5)
        assert step["drafter/updates"] > 1 and step["drafter/train_s"] > 0
        assert 1 <= step["drafter/acceptance_length"] <= 3
        assert 0 < step["drafter/policy_entropy"] < 10
    assert all(step["drafter/buffer_bytes"] > 0 and step["drafter/staleness"] >= 0 for step in trace.metrics[1:])
    assert all(step["timing_s/train_drafter"] >= step["drafter/train_s"] for step in trained)
    assert max(sample.policy_version for sample in learner.samples) == len(trace.metrics) - 1
    assert 0 < sum(is_held_out(sample, 0.3) for sample in learner.samples) < len(learner.samples)


def test_the_policy_learns_as_it_does_without(kept, model, tmp_path):
    """What is listened to is the pass that trains it: with the same rollouts, the same weights."""
    engine, drafter = kept
    weights = []
    for callbacks in ([distillation(optimizer=partial(torch.optim.SGD, lr=0.0))], []):
        module = grpo(model)
        fit(module, questions(tmp_path), SpeculativeRollout(engine, drafter), *callbacks, max_epochs=2)
        weights.append(weights_of(module))
        engine.shutdown()
    assert_identical(weights[1], weights[0])


@pytest.mark.parametrize("options", [{}, {"loss": "acceptance", "draw_by": "rejection", "share": 0.5}])
def test_a_resumed_run_is_the_same_to_the_bit(kept, model, tmp_path, options):
    whole_learner = distillation(**options)
    whole, expected, expected_watch = run(kept, model, tmp_path, whole_learner, max_epochs=4)

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    run(kept, model, tmp_path, distillation(**options), saver, max_epochs=2)
    checkpoint = tmp_path / f"step={2 * STEPS}.ckpt"
    learner = distillation(**options)
    resumed, trace, watch = run(kept, model, tmp_path, learner, saver, max_epochs=4, ckpt_path=checkpoint)
    assert trace.tokens == expected.tokens[2 * STEPS :]
    assert_identical(weights_of(resumed), weights_of(whole))
    assert_identical(watch.weights, expected_watch.weights[2 * STEPS :])
    assert watch.versions == expected_watch.versions[2 * STEPS :]
    clock = ("drafter/train_s",)
    for step, other in zip(trace.learned, expected.learned[2 * STEPS :], strict=True):
        assert {k: v for k, v in step.items() if k not in clock and not k.endswith("step_s")} == {
            k: v for k, v in other.items() if k not in clock and not k.endswith("step_s")
        }
    assert [sample.token_ids.tolist() for sample in learner.samples] == [
        sample.token_ids.tolist() for sample in whole_learner.samples
    ]


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_lessons_that_are_lost_are_missed_and_no_more(kept, model, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    run(kept, model, tmp_path, distillation(), saver, max_epochs=1)
    (file,) = (tmp_path / "drafter_lessons").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    learner = distillation()
    with pytest.warns(UserWarning, match="it waits for new ones.*damaged"):
        run(kept, model, tmp_path, learner, saver, max_epochs=2, ckpt_path=tmp_path / f"step={STEPS}.ckpt")
    assert learner.version > STEPS / 2 and len(learner.samples) > 0


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_a_training_that_makes_the_drafter_worse_is_undone(kept, model, tmp_path):
    halving = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    learner = distillation(optimizer=partial(torch.optim.SGD, lr=1e3), max_grad_norm=1e3, lr_scheduler=halving)
    _, trace, watch = run(kept, model, tmp_path, learner, max_epochs=3)
    num_trainings = sum("drafter/loss" in step for step in trace.metrics)
    assert learner.training.optimizer.param_groups[0]["lr"] == 1e3 * 0.5**num_trainings  # also behind those undone
    undone = [step.get("drafter/rolled_back") == 1 for step in trace.metrics]
    assert any(undone)
    for index in [index for index, back in enumerate(undone) if back]:
        assert_identical(watch.weights[index], watch.weights[index - 1])
        assert watch.versions[index] == watch.versions[index - 1]


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_weights_that_the_engine_has_lost_are_noticed_and_loaded_again(kept, model, tmp_path):
    engine, _ = kept

    class Thief(RolloutCallback):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            if pl_module.step == 2:
                engine._speculation.load_weights((n, torch.zeros_like(w)) for n, w in learner.network.weights())

    learner = distillation(every_n_steps=100)
    with pytest.warns(UserWarning, match="the engine has lost the drafter's weights, they are loaded again"):
        run(kept, model, tmp_path, learner, Thief(), max_epochs=2)
    assert engine.drafter_is_intact()


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_a_second_fit_goes_on_with_the_drafter_of_the_first(kept, model, tmp_path):
    learner, data, module = distillation(), questions(tmp_path), grpo(model)
    watch = Watch(kept[0], learner)
    callbacks = SpeculativeRollout(*kept), learner, watch
    fit(module, data, *callbacks, max_epochs=3)
    learned, version, num_steps = watch.weights[-1], learner.version, len(watch.weights)
    assert version > 0
    learner.make_optimizer = partial(torch.optim.SGD, lr=0.0)  # stands still
    fit(module, data, *callbacks, max_epochs=1)
    assert watch.versions[num_steps] == version + 1, "trained on what the first fit had kept"
    assert_identical(watch.weights[-1], learned)


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_a_fit_of_another_module_begins_anew(kept, model, tmp_path):
    learner, data = distillation(), questions(tmp_path)
    first, second = Watch(kept[0], learner), Watch(kept[0], learner)
    for watch in (first, second):
        fit(grpo(model), data, SpeculativeRollout(*kept), learner, watch, max_epochs=2)
        assert max(sample.policy_version for sample in learner.samples) == 2 * STEPS - 1
    assert second.versions == first.versions
    assert_identical(second.weights, first.weights)


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_a_resumed_run_tells_that_it_keeps_the_drafters_learning_rate(kept, model, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last", save_top_k=1)
    run(kept, model, tmp_path, distillation(), saver, max_epochs=1)
    slow = distillation(optimizer=partial(FAST, lr=1e-5))
    with pytest.warns(UserWarning, match="drafter's optimizer goes on .*: lr 0.003 in the checkpoint and 1e-05 here"):
        run(kept, model, tmp_path, slow, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    other = distillation(optimizer=partial(torch.optim.SGD, lr=1e-5))
    with pytest.raises(
        MisconfigurationException, match=r"drafter's optimizer .* AdamW, and does not fit this run's SGD"
    ):
        run(kept, model, tmp_path, other, ckpt_path=tmp_path / "last.ckpt", max_epochs=2)
    _, _, watch = run(kept, model, tmp_path, other, max_epochs=1)  # of its own: nothing is left of the checkpoint
    assert watch.versions[0] == 0


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_the_drafter_is_written_at_the_end(kept, model, tmp_path):
    learner = distillation(output=str(tmp_path / "drafter"))
    _, _, watch = run(kept, model, tmp_path, learner, max_epochs=2)
    assert_identical(dict(Eagle3Network.load(str(tmp_path / "drafter")).weights()), watch.weights[-1])


def test_a_folder_that_holds_something_else_is_not_written_to(model, tmp_path):
    """The drafter took its place at the end of the run, with all that was in it."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").touch()
    with pytest.raises(MisconfigurationException, match=r"logs holds something else\. Name another folder"):
        fit(grpo(model), questions(tmp_path), distillation(output=str(tmp_path / "logs")))


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_the_drafter_of_another_run_is_not_taken_over(kept, model, make_llama, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last", save_top_k=1)
    run(kept, model, tmp_path, distillation(), saver, max_epochs=1)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    weights = content["drafter_distillation"]["weights"]
    weights.pop(next(iter(weights)))
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.warns(
        UserWarning, match="drafter is not used, that of the configuration starts as it is: .*names or shapes"
    ):
        run(kept, model, tmp_path, distillation(), ckpt_path=tmp_path / "last.ckpt", max_epochs=2)


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_every_chart_of_speculation_has_curves(kept, model, tmp_path):
    _, trace, _ = run(kept, model, tmp_path, distillation(), PrefixCache(0.5), AdaptiveScheduler(), max_epochs=3)
    reported = {name for step in trace.metrics for name in step}
    _, trace, _ = run(kept, model, tmp_path, distillation())  # the scheduler may find that drafts do not pay
    reported |= {name for step in trace.metrics for name in step}
    callbacks = [PrefixCache(), SpeculativeRollout(*kept), DrafterDistillation(), SpeculativeRollout()]
    tabs = layout_for(grpo(model), callbacks)
    assert {"prefix cache", "speculation", "drafter"} < tabs.keys()
    assert layout_for(grpo(model), callbacks[-1:]).keys() == layout_for(grpo(model)).keys()
    for name in [
        name for tab in ("prefix cache", "speculation", "drafter") for _, names in tabs[tab].values() for name in names
    ]:
        assert any(re.fullmatch(name, each) for each in reported), name


@pytest.mark.parametrize("kept", ["head"], indirect=True)
def test_a_training_keeps_to_its_time(kept, model, tmp_path):
    _, trace, _ = run(kept, model, tmp_path, distillation(max_step_fraction=1e-6), max_epochs=2)
    assert {step["drafter/updates"] for step in trace.metrics if "drafter/updates" in step} == {1.0}


@pytest.mark.parametrize(
    ("callbacks", "found"),
    [(lambda: [], "none"), (lambda: [SpeculativeRollout(VLLMEngine(), NGramDrafter())], "NGramDrafter")],
)
def test_a_drafter_that_cannot_learn_is_refused(model, tmp_path, callbacks, found):
    with pytest.raises(MisconfigurationException, match=f"needs a drafter that can learn.*got {found}"):
        fit(grpo(model), questions(tmp_path), *callbacks(), DrafterDistillation())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, r"share must lie in \(0, 1\], got 0"),
        ({"holdout_fraction": 0}, r"holdout_fraction must lie in \(0, 1\), got 0"),
        ({"max_step_fraction": 0}, "max_step_fraction must be positive, got 0; use None for no limit"),
        ({"draw_by": "length"}, "draw_by must be 'random', 'entropy' or 'rejection', got 'length'"),
        ({"loss": "l1"}, "loss must be 'kl', 'tv', 'acceptance' or a DraftLoss by class_path, got 'l1'"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"weight_floor": 2}, "floor"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DrafterDistillation(**options)


def test_policies_that_no_head_fits_are_refused_before_anything_is_generated(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="reads three layers of the policy, this one has 2"):
        fit(grpo(tiny_model), questions(tmp_path), SpeculativeRollout(VLLMEngine(), Eagle3Drafter()))
    with pytest.raises(ValueError, match="no EAGLE-3 head in the format of speculators"):
        fit(grpo(tiny_model), questions(tmp_path), SpeculativeRollout(VLLMEngine(), Eagle3Drafter(tiny_model)))
    with pytest.raises(ValueError, match="vocabulary_size=9 is of a new head; 'folder' has its own"):
        Eagle3Drafter("folder", vocabulary_size=9)


def sample(length):
    return DistillationSample(
        "a", torch.zeros(length, dtype=torch.int32), 1, torch.zeros(length - 1, 0), *_targets(length - 1)
    )


def _targets(length):
    empty = torch.zeros(length, 1, dtype=torch.int32), torch.zeros(length, 1), torch.zeros(length)
    return *empty, 1.0, 1.0, 0


def test_updates_have_about_equally_many_tokens():
    parts = cut([sample(length) for length in (4, 4, 9, 3, 2)], 8)
    assert [[len(one) for one in part] for part in parts] == [[4, 4], [9], [3, 2]]


def test_lessons_are_held_out_by_their_tokens():
    samples = [sample(length) for length in range(2, 500)]
    assert 0.2 < sum(is_held_out(one, 0.3) for one in samples) / len(samples) < 0.4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [is_held_out(one, 0.3) for one in samples] == [is_held_out(one, 0.3) for one in samples]


def test_a_process_that_is_killed_goes_on_with_a_whole_drafter(model, tmp_path):
    """Within a training of the drafter, and with a part of its weights in the engine."""
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    calm.mkdir()
    disturbed.mkdir()
    processes = f"{calm}:never", f"{disturbed}:train", f"{disturbed}:publish", f"{disturbed}:never"
    program = [sys.executable, str(Path(__file__).with_name("killed_while_distilling.py")), model, *processes]
    found = subprocess.run(program, capture_output=True, text=True, check=False)
    statuses = [int(line) for line in found.stdout.split()[-4:]]
    assert statuses == [0, -signal.SIGKILL, -signal.SIGKILL, 0], found.stderr[-2000:]
    assert_identical(torch.load(disturbed / "final.pt"), torch.load(calm / "final.pt"))
    assert not list(disturbed.rglob("*.partial"))


def test_what_kills_leave_behind_does_not_pile_up(model, tmp_path):
    """Each kill orphaned files of the prefix cache, and folders and files in the folder for temporary files, for
    ever."""
    program = [sys.executable, str(Path(__file__).with_name("killed_at_random.py")), model, str(tmp_path / "all")]
    found = subprocess.run([*program, "3", "0"], capture_output=True, text=True, check=True)
    kills = [json.loads(line) for line in found.stdout.splitlines()]
    assert {kill["status"] for kill in kills} == {-signal.SIGKILL}, (tmp_path / "all" / "errors-0.txt").read_text()[
        -2000:
    ]
    reached = 0  # last step that is known to be over
    for kill in kills:
        if kill["began_at"] is not None:
            # resumed; the word of a step comes before its checkpoint
            assert kill["began_at"] in (reached - 1, reached)
            reached = max(kill["began_at"], kill["ended_at"] or 0)
        assert kill["checkpoints"] in ([], ["last.ckpt"])
        # the checkpoint, a cache and samples; of the next one, those two or a half of it
        assert kill["run"]["files"] <= 6
        assert len(kill["temporary"]) <= 3  # of the engine, the drafter and, at most, the adapters of one process
