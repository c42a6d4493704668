import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import yaml

from lit_specrl import GRPO, PromptDataModule, RolloutCallback, SpeculativeRollout, TransformersEngine, timing
from lit_specrl.bench.command import bench_command
from lit_specrl.bench.rollout import figure, recorder
from lit_specrl.bench.rollout.arms import further_arms
from lit_specrl.bench.rollout.comparison import (
    Pair,
    notes,
    ratio_table,
    rollout_table,
    time_table,
    validation_table,
    weaknesses,
)
from lit_specrl.bench.rollout.progress import ProgressTeller
from lit_specrl.bench.rollout.records import EvaluationRecord, RunRecord, StepRecord
from lit_specrl.bench.rollout.runs import RunFailedError, planned_runs
from lit_specrl.cli.fit_config import fit_configuration, with_seed
from lit_specrl.cli.messages import ConfigurationError
from lit_specrl.data import ArithmeticSource

# ---------------------------------------------------------------------------------------------------------- arithmetic


def step(epoch, wall_s, gen_s, verify_s=None, generated=8, reward=0.0):
    """A step with 8 response tokens."""
    metrics = {"timing_s/gen": gen_s, "reward": reward}
    if verify_s is not None:
        metrics["timing_s/verify"] = verify_s
    return StepRecord(epoch, wall_s, generated, 8, metrics)


def record(steps, accuracies=(), hardware="a CPU"):
    """Validated before the first step and after each second one; `accuracies` in that order."""
    evaluations = [
        EvaluationRecord(2 * index, sum(step.wall_s for step in steps[: 2 * index]), {"val_accuracy": accuracy})
        for index, accuracy in enumerate(accuracies)
    ]
    return RunRecord("hash", hardware, "2.13.0", steps, evaluations)


@pytest.fixture
def pairs():
    """Two epochs of two steps. With the callback, the second epoch generates a quarter of the tokens."""
    without = record([step(0, 10.0, 6.0), step(0, 10.0, 6.0, reward=0.5), step(1, 10.0, 6.0), step(1, 10.0, 6.0)])
    return [
        Pair(0, without, record([step(0, 10.0, 6.0, 0.0)] * 2 + [step(1, 5.0, 1.0, 1.0, generated=2, reward=1.0)] * 2)),
        Pair(1, without, record([step(0, 10.0, 6.0, 0.0)] * 2 + [step(1, 10.0, 3.0, 3.0, generated=2)] * 2)),
        Pair(2, without, record([step(0, 10.0, 6.0, 0.0)] * 2 + [step(1, 20.0, 2.0, 10.0, generated=2)] * 2)),
    ]


def test_ratios_are_of_sums_over_steps_and_spread_over_seeds(pairs):
    rows = [tuple(row.values()) for row in ratio_table(pairs)]
    assert rows == [
        ("generation", "all", 24 / 18, 24 / 16, 24 / 14),
        ("generation", "after the first epoch", 12 / 6, 12 / 4, 12 / 2),
        ("generation + verification", "all", 24 / 36, 24 / 24, 24 / 16),
        ("generation + verification", "after the first epoch", 12 / 24, 12 / 12, 12 / 4),
        ("end to end", "all", 40 / 60, 40 / 40, 40 / 30),
        ("end to end", "after the first epoch", 20 / 40, 20 / 20, 20 / 10),
    ]
    assert list(ratio_table(pairs)[0]) == ["without_over_with", "steps", "min", "median", "max"]


def test_time_of_each_run(pairs):
    columns = ["seed", "run", "steps", "gen_s", "verify_s", "end_to_end_s", "rollout_fraction"]
    assert time_table(pairs[:1]) == [
        dict(zip(columns, row, strict=True))
        for row in [(0, "without", 4, 24.0, 0.0, 40.0, 0.6), (0, "with", 4, 14.0, 2.0, 30.0, 16 / 30)]
    ]


def test_rollouts_of_each_run(pairs):
    columns = ["seed", "run", "generated_tokens", "reuse_fraction", "reward_first_epoch", "reward_last_epoch"]
    assert rollout_table(pairs[:1]) == [
        dict(zip(columns, row, strict=True))
        for row in [(0, "without", 32, 0.0, 0.25, 0.0), (0, "with", 20, 12 / 32, 0.0, 1.0)]
    ]


def test_validation_tells_when_the_score_was_first_reached():
    steps = [step(0, 1.0, 0.5)] * 2 + [step(1, 3.0, 0.5)] * 2
    pair = Pair(0, record(steps, [0.1, 0.8, 0.7]), record(steps, [0.2, 0.3, 0.79]))
    columns = ["seed", "run", "validation_first", "validation_last", "steps_to_score", "seconds_to_score"]
    assert validation_table([pair], score=0.8) == [
        dict(zip(columns, row, strict=True))
        for row in [(0, "without", 0.1, 0.7, 2, 2.0), (0, "with", 0.2, 0.79, "not reached", "not reached")]
    ]
    assert [list(row) for row in validation_table([pair], score=None)] == [columns[:4]] * 2


def test_runs_without_validation_have_no_table_of_it(pairs):
    assert validation_table(pairs, score=0.8) == []
    assert any("nothing is said about --score 0.8" in note for note in notes(pairs, "PrefixCache", 0.8))


def test_only_steps_that_both_runs_have_are_compared():
    """Dynamic sampling, or a limit on time, ends runs at different steps."""
    without = record([step(0, 10.0, 6.0)] * 2 + [step(1, 10.0, 6.0)] * 3)
    with_callbacks = record([step(0, 10.0, 6.0)] * 3 + [step(1, 5.0, 3.0)])
    pair = Pair(0, without, with_callbacks)
    assert pair.windows == {"all": slice(0, 4), "after the first epoch": slice(3, 4)}
    end_to_end = [tuple(row.values())[1:] for row in ratio_table([pair])][-2:]
    assert end_to_end == [("all", *[40 / 35] * 3), ("after the first epoch", *[2.0] * 3)]
    assert any("differ in their number of steps" in warning for warning in weaknesses([pair]))


def test_one_epoch_has_no_rows_after_it_and_a_note():
    pair = Pair(0, record([step(0, 2.0, 1.0)] * 2), record([step(0, 1.0, 0.5)] * 2))
    assert [tuple(row.values()) for row in ratio_table([pair])] == [
        (part, "all", 2.0, 2.0, 2.0) for part in ("generation", "generation + verification", "end to end")
    ]
    assert any("raise trainer.max_epochs" in warning for warning in weaknesses([pair]))


def test_notes_tell_the_bound_and_what_makes_the_numbers_weak(pairs):
    [bound] = notes(pairs, "PrefixCache", None)
    assert "rollouts take 60% of the training time" in bound
    assert bound.endswith("above 2.50x.")
    elsewhere = Pair(0, pairs[0].without, record(pairs[0].with_callbacks.steps, hardware="another CPU"))
    assert [note.split(";")[0].split(":")[0] for note in weaknesses([elsewhere])] == [
        "One seed says nothing about the spread",
        "The runs were made on different machines or versions of torch",
    ]


def test_a_record_is_read_as_it_was_written(tmp_path):
    written = record([step(0, 1.0, 0.5, 0.1), step(1, 1.0, 0.5)], [0.5, 0.75])
    written.save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path / "run.json") == written
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_the_figure_draws_each_run(pairs, tmp_path):
    pytest.importorskip("matplotlib")
    figure.draw(pairs, "PrefixCache", tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_names_the_extra(pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'lit_specrl\[bench\]'"):
        figure.draw(pairs, "PrefixCache", tmp_path / "report.png")


# ------------------------------------------------------------------------------------------------------------ recording


class PassTime(RolloutCallback):
    """Moves a clock that stands still otherwise: every place has a number of seconds of its own."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_start(self, trainer, pl_module):
        self.clock.now += 10_000

    def on_rollout_start(self, trainer, pl_module, request):
        self.clock.now += 10 if trainer.training else 1000

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.clock.now += 1

    def on_validation_end(self, trainer, pl_module):
        self.clock.now += 0.5  # a checkpoint, say

    def on_train_epoch_end(self, trainer, pl_module):
        self.clock.now += 0.25


class SlowlyStartingEngine(TransformersEngine):
    def start(self, *arguments):
        self.clock.now += 100
        super().start(*arguments)


@pytest.mark.parametrize(("num_sanity_val_steps", "validated"), [(-1, [0, 2, 4]), (1, [2, 4]), (0, [2, 4])])
def test_a_step_lasts_until_the_next_without_validation_and_engine_start(
    num_sanity_val_steps, validated, tiny_model, tmp_path, monkeypatch
):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now + time.perf_counter()))
    engine = SlowlyStartingEngine()
    engine.clock = clock
    model = GRPO(tiny_model, [lambda completions, **_: [1.0] * len(completions)], 2, max_completion_length=4)
    questions, held_out = ArithmeticSource(4), ArithmeticSource(3, split="validation")
    data = PromptDataModule(questions, validation=held_out, batch_size=2, max_prompt_length=64)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=num_sanity_val_steps,
        callbacks=[
            recorder.RunRecorder(str(tmp_path / "run.json"), "hash"),
            PassTime(clock),
            SpeculativeRollout(engine=engine),
        ],
    )
    trainer.fit(model, datamodule=data)
    run = RunRecord.load(tmp_path / "run.json")
    assert [step.epoch for step in run.steps] == [0, 0, 1, 1]
    real_time = pytest.approx([11.0, 11.75, 11.0, 11.75], abs=0.1)  # what the tiny engine takes to start
    assert [step.wall_s for step in run.steps] == real_time
    assert ("timing_s/start_engine" in run.steps[0].metrics) == (num_sanity_val_steps == 0)
    assert [evaluation.step for evaluation in run.evaluations] == validated
    assert [evaluation.training_s for evaluation in run.evaluations][-2:] == pytest.approx([22.0, 44.75], abs=0.1)
    assert all("val_accuracy" in evaluation.metrics for evaluation in run.evaluations)
    assert run.settings_hash == "hash"


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.fixture
def config(tiny_model, tmp_path, monkeypatch):
    """A config of two epochs of two steps, in the working directory."""
    monkeypatch.chdir(tmp_path)
    source = {"class_path": "ArithmeticSource", "init_args": {"num_prompts": 4}}
    held_out = {"class_path": "ArithmeticSource", "init_args": {"num_prompts": 3, "split": "validation"}}
    settings = {
        "model": {
            "class_path": "GRPO",
            "init_args": {
                "model": tiny_model,
                "rewards": [{"class_path": "FormatReward", "init_args": {"pattern": r".*\d.*"}}],
                "num_generations": 4,
                "max_completion_length": 12,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {"train": source, "validation": held_out, "batch_size": 2, "max_prompt_length": 64},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "num_sanity_val_steps": -1,
            "callbacks": [
                {
                    "class_path": "SpeculativeRollout",
                    "init_args": {"engine": {"class_path": "TransformersEngine"}},
                },
                {"class_path": "PrefixCache", "init_args": {"lenience": 2.0}},
            ],
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    return "config.yaml"


@pytest.fixture
def no_process(monkeypatch):
    """Fails the test that starts a run."""
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("a run was started"))


def test_runs_differ_in_the_callbacks_alone_and_take_turns(config, tmp_path):
    settings = fit_configuration([f"--config={config}", "--model.init_args.beta=0.5", "--seed_everything=7"])
    before = copy.deepcopy(settings)
    runs = planned_runs(settings, ["PrefixCache"], [3, 5], tmp_path)
    assert [(run.seed, run.arm, run.folder.name) for run in runs] == [
        (3, "without", "seed-3-without"),
        (3, "with", "seed-3-with"),
        (5, "with", "seed-5-with"),
        (5, "without", "seed-5-without"),
    ]
    assert settings == before
    without, with_callbacks, *_ = (run.configuration for run in runs)
    assert [callback["class_path"] for callback in without["trainer"]["callbacks"]] == ["lit_specrl.SpeculativeRollout"]
    assert [without["seed_everything"], *(without[name]["init_args"]["seed"] for name in ("model", "data"))] == [3] * 3
    assert with_callbacks["model"]["init_args"]["beta"] == 0.5
    without["trainer"]["callbacks"] = with_callbacks["trainer"]["callbacks"]
    assert without == with_callbacks
    assert len({run.settings_hash for run in runs[1:]}) == 3


def test_arms_are_the_callback_with_other_arguments_and_each_seed_begins_with_another(config, tmp_path):
    settings = fit_configuration([f"--config={config}"])
    Path("arms.yaml").write_text("at most once: {log_lenience: 0.5, max_reuses: 1}\nrandom: {acceptance: random}\n")
    more = further_arms(settings, ["PrefixCache"], Path("arms.yaml"))
    once, random = (arm["trainer"]["callbacks"][-1]["init_args"] for arm in more.values())
    assert (once["lenience"], once["log_lenience"], once["max_reuses"]) == (None, 0.5, 1)  # nothing of the block's 2.0
    assert (random["lenience"], random["acceptance"], random["max_reuses"]) == (None, "random", None)
    for arm in more.values():
        assert arm | {"trainer": None} == settings | {"trainer": None}
        assert arm["trainer"]["callbacks"][:-1] == settings["trainer"]["callbacks"][:-1]
    runs = planned_runs(settings, ["PrefixCache"], [0, 1], tmp_path, more)
    assert [run.folder.name for run in runs] == [
        *("seed-0-without", "seed-0-with", "seed-0-at-most-once", "seed-0-random"),
        *("seed-1-with", "seed-1-at-most-once", "seed-1-random", "seed-1-without"),
    ]


def test_arms_of_several_callbacks_change_some_and_leave_out_others(config):
    block = {"trainer": {"callbacks+": [{"class_path": "SpeculativeRollout"}, {"class_path": "AdaptiveScheduler"}]}}
    block["trainer"]["callbacks+"][0]["init_args"] = {"drafter": {"class_path": "NGramDrafter"}}
    Path("block.yaml").write_text(yaml.safe_dump(block))
    settings = fit_configuration([f"--config={config}", "--config=block.yaml"])
    names = ["PrefixCache", "SpeculativeRollout", "AdaptiveScheduler"]
    Path("arms.yaml").write_text(
        "drafts alone: {PrefixCache: {acceptance: 'off'}}\n"
        "once, no drafts: {PrefixCache: {max_reuses: 1}, SpeculativeRollout: null, AdaptiveScheduler: null}\n"
    )
    drafts, once = further_arms(settings, names, Path("arms.yaml")).values()

    def arguments(arm, name):
        return [
            callback["init_args"] for callback in arm["trainer"]["callbacks"] if callback["class_path"].endswith(name)
        ]

    assert arguments(drafts, "PrefixCache")[0]["acceptance"] == "off"
    assert arguments(drafts, "SpeculativeRollout") == arguments(settings, "SpeculativeRollout")
    assert arguments(drafts, "AdaptiveScheduler") == arguments(settings, "AdaptiveScheduler")
    assert arguments(once, "PrefixCache")[0]["max_reuses"] == 1
    assert {engine["drafter"] for engine in arguments(once, "SpeculativeRollout")} == {None}
    assert not arguments(once, "AdaptiveScheduler")


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        (
            "once: {max_reuses: 1}",
            ["PrefixCache", "RunSummary"],
            "once has max_reuses: 1, but must hold arguments of PrefixCache, RunSummary for each arm, by the names",
        ),
        ("once: {PrefixCache: 1}", ["PrefixCache", "RunSummary"], "once has PrefixCache: 1, but must hold"),
        ("- max_reuses: 1", ["PrefixCache"], "must hold the arguments of PrefixCache for each arm, by the arm's name"),
        ("with: {max_reuses: 1}", ["PrefixCache"], "with is the name of an arm that is always there"),
        ("once: {max_reuse: 1}", ["PrefixCache"], "max_reuse"),
    ],
)
def test_wrong_arms_are_refused_before_anything_runs(config, no_process, capsys, text, names, message):
    Path("arms.yaml").write_text(text)
    with pytest.raises((ValueError, SystemExit)) as refused:
        further_arms(fit_configuration([f"--config={config}"]), names, Path("arms.yaml"))
    assert message in f"{refused.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("file", "recipe", "blocks", "names", "some"),
    [
        ("reuse", "toy_sums", ["prefix_cache"], ["PrefixCache"], {"e^0.5", "random", "groups without spread"}),
        (
            "reuse_and_drafts",
            "long_sums",
            ["prefix_cache", "speculation"],
            ["PrefixCache", "SpeculativeRollout", "AdaptiveScheduler"],
            {"drafts alone", "reuse alone"},
        ),
    ],
)
def test_the_arms_beside_the_recipes_are_understood(monkeypatch, file, recipe, blocks, names, some):
    monkeypatch.chdir(Path(__file__).parents[2])
    configs = [f"recipes/{recipe}.yaml", *(f"configs/callbacks/{block}.yaml" for block in blocks)]
    settings = fit_configuration([*(f"--config={config}" for config in configs), "--model.init_args.model=toy"])
    arms = further_arms(settings, names, Path(f"recipes/arms/{file}.yaml"))
    assert some <= set(arms)
    assert settings not in arms.values()


def test_without_speculation_means_the_same_engine_without_a_drafter(config, tmp_path):
    speculating = {"class_path": "SpeculativeRollout", "init_args": {"drafter": {"class_path": "NGramDrafter"}}}
    block = {"trainer": {"callbacks+": [speculating, {"class_path": "AdaptiveScheduler"}]}}
    Path("block.yaml").write_text(yaml.safe_dump(block))
    settings = fit_configuration([f"--config={config}", "--config=block.yaml"])
    without, _ = planned_runs(settings, ["SpeculativeRollout", "AdaptiveScheduler"], [0], tmp_path)
    *_, cache, last = without.configuration["trainer"]["callbacks"]
    assert cache["class_path"] == "lit_specrl.PrefixCache"
    assert last == {"class_path": "lit_specrl.SpeculativeRollout", "init_args": {"engine": None, "drafter": None}}


def test_a_run_takes_no_rows_of_an_interrupted_one(config, monkeypatch, tmp_path):
    """A journal in the folder of a run that is started again gave it rows that nobody had generated."""
    settings = fit_configuration([f"--config={config}", "--trainer.callbacks+=RolloutJournal"])
    settings["trainer"]["callbacks"].append({"class_path": "lit_specrl.callbacks.rollout_journal.RolloutJournal"})
    before = copy.deepcopy(settings)
    [run, _] = planned_runs(settings, ["PrefixCache"], [0], tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: SimpleNamespace(returncode=1))
    settings_hash = run.settings_hash
    with pytest.raises(RunFailedError):
        run.execute()
    *_, first, second = yaml.safe_load((run.folder / "config.yaml").read_text())["trainer"]["callbacks"]
    assert first["init_args"] == {"sync_interval_s": 10.0, "max_bytes": 2**30, "load_rows": False}
    assert second["init_args"] == {"load_rows": False}
    assert settings == before and run.settings_hash == settings_hash


def test_classes_without_a_seed_are_left_alone():
    settings = {"seed_everything": False, "model": {"class_path": "A", "init_args": {"depth": 2}}, "data": None}
    assert with_seed(settings, 3) == settings


def test_unknown_callback_is_refused_with_the_ones_that_are_there(config, no_process):
    message = r"^--without PrefixCach: .*trainer\.callbacks has SpeculativeRollout, PrefixCache$"
    with pytest.raises(ValueError, match=message):
        bench_command(["rollout", f"--config={config}", "--without=PrefixCache,PrefixCach"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds=0,0"], r"--seeds must be different whole numbers such as 0,1,2, got '0,0'"),
        (["--seeds=few"], r"--seeds must be .* got 'few'"),
        (["--without=PrefixCache,"], r"--without must be class names"),
        (["--margin=-0.1"], r"--margin must not be negative, got -0.1"),
        (["--ckpt_path=last"], r"--ckpt_path last: the runs would begin where others have stopped"),
    ],
)
def test_wrong_values_are_told_before_anything_runs(config, no_process, options, message):
    with pytest.raises(ValueError, match=message):
        bench_command(["rollout", f"--config={config}", "--without=PrefixCache", *options])


def test_options_that_fit_does_not_know_are_named(config, no_process):
    with pytest.raises(ConfigurationError, match=r"has no betta; did you mean beta\?"):
        bench_command(["rollout", f"--config={config}", "--without=PrefixCache", "--model.init_args.betta=1"])


def test_help_tells_what_counts(capsys):
    with pytest.raises(SystemExit) as end:
        bench_command(["rollout", "--help"])
    assert end.value.code == 0
    assert "Validation, the start of the" in capsys.readouterr().out
    bench_command(["--help"])
    assert "Train with and without callbacks" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------------------------------ real runs


@pytest.fixture
def processes(monkeypatch):
    """Commands of the processes that were started."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    started, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: (started.append(command), run(command, **options))[1]
    )
    return started


def test_a_tiny_model_with_and_without_the_prefix_cache(config, processes, capsys):
    arguments = ["rollout", f"--config={config}", "--without=PrefixCache", "--seeds=0", "--score=2", "--output=out"]
    bench_command(arguments)
    printed = capsys.readouterr().out
    assert [command[-1] for command in processes] == ["out/seed-0-without/config.yaml", "out/seed-0-with/config.yaml"]
    for words in ("benchmark=rollout", "generation + verification", "after the first epoch", "not reached", "One seed"):
        assert words in printed
    assert printed.index("! One seed") < printed.index("paired") < printed.index("x │")  # above the first ratio

    report = json.loads(Path("out/report.json").read_text())
    assert report["configuration"]["trainer"]["max_epochs"] == 2
    assert set(report["tables"]) == {"paired", "compared", "time", "rollouts", "validation"}
    assert report["notes"][0].startswith("PrefixCache: cannot tell yet: ")  # one seed tells nothing
    assert len(report["tables"]["compared"]) == 6
    without, with_callbacks = report["runs"]
    assert (without["arm"], with_callbacks["arm"]) == ("without", "with")
    for run in (without, with_callbacks):
        assert [step["epoch"] for step in run["steps"]] == [0, 0, 1, 1]
        assert [evaluation["step"] for evaluation in run["evaluations"]] == [0, 2, 4]
        assert all({"timing_s/gen", "timing_s/step", "reward"} <= set(step["metrics"]) for step in run["steps"])
        for step in run["steps"]:
            step_s = step["metrics"]["timing_s/step"] - step["metrics"].get("timing_s/start_engine", 0.0)
            assert step_s < step["wall_s"] < step_s + 5
        assert run["evaluations"][-1]["training_s"] <= sum(step["wall_s"] for step in run["steps"])

    for fresh, reusing in zip(without["steps"], with_callbacks["steps"], strict=True):
        assert fresh["generated_tokens"] == fresh["response_tokens"]
        assert reusing["generated_tokens"] == reusing["metrics"]["prefix_cache/generated_tokens"]
        assert 0 < fresh["decode_steps"] <= 12
        assert reusing["generated_tokens"] / 8 <= reusing["decode_steps"] <= 12
        assert "prefix_cache/generated_tokens" not in fresh["metrics"]
    same = [step["generated_tokens"] for step in without["steps"][:2]]
    assert same == [step["generated_tokens"] for step in with_callbacks["steps"][:2]]  # nothing to reuse yet
    generated = [sum(step["generated_tokens"] for step in run["steps"][2:]) for run in (without, with_callbacks)]
    assert generated[1] < generated[0]
    assert not [*Path("out").rglob("*.ckpt"), *Path("out").rglob("*.safetensors")]
    lines = Path("out/seed-0-with/steps.txt").read_text().splitlines()
    assert [line.split(" s")[0] for line in lines] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]

    bench_command(arguments)  # finds both runs
    assert len(processes) == 2
    assert capsys.readouterr().out == printed
    with pytest.raises(
        ValueError, match="seed-0-without holds a run with other settings or versions; take another --output"
    ):
        bench_command([*arguments, "--model.init_args.beta=0.1"])
    assert len(processes) == 2

    Path("arms.yaml").write_text("afresh: {acceptance: 'off'}")
    bench_command([*arguments, "--arms=arms.yaml"])  # one run more
    assert [command[-1] for command in processes[2:]] == ["out/seed-0-afresh/config.yaml"]
    report = json.loads(Path("out/report.json").read_text())
    assert [(row["arm"], row["tokens_ratio"] == "1.00x") for row in report["tables"]["arms"]] == [
        ("with", False),
        ("afresh", True),
    ]
    assert [run["arm"] for run in report["runs"]] == ["without", "with", "afresh"]
    assert Path("out/frontier.png").exists()


def test_a_run_tells_its_steps_while_it_is_waited_for(tmp_path, capsys):
    file = tmp_path / "steps.txt"
    file.write_text("of an earlier run\n")
    with ProgressTeller(file, every_s=0.01):
        for line in ("1 of 2 steps", "2 of 2 steps"):
            with file.open("a") as steps:
                steps.write(f"{line}\n")
            while line not in (told := capsys.readouterr().err):
                time.sleep(0.01)
            assert told == f"  {line}\n"


@pytest.mark.parametrize(
    ("asked", "enabled"),
    [
        ([], False),
        (["--trainer.enable_checkpointing=true"], True),
        (["--trainer.callbacks+=ModelCheckpoint"], None),
    ],
)
def test_runs_save_checkpoints_only_if_they_were_asked_for(config, tmp_path, monkeypatch, asked, enabled):
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: subprocess.CompletedProcess([], 1))
    run, _ = planned_runs(fit_configuration([f"--config={config}", *asked]), ["PrefixCache"], [0], tmp_path)
    with pytest.raises(RunFailedError):
        run.execute()
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["trainer"]["enable_checkpointing"] is enabled


def test_numbers_of_a_run_that_fails_at_its_end_are_not_kept(config, tmp_path, monkeypatch):
    [run, _] = planned_runs(fit_configuration([f"--config={config}"]), ["PrefixCache"], [0], tmp_path)

    def fail_late(*arguments, **options):
        record([step(0, 1.0, 0.5)]).save(run.record_file)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(subprocess, "run", fail_late)
    with pytest.raises(RunFailedError, match="the run with seed 0, without, ended with code 3"):
        run.execute()
    assert run.finished() is None


def test_interruption_says_how_to_go_on(config, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    with pytest.raises(SystemExit, match=r"interrupted\. Finished runs are kept: the same command goes on after them"):
        bench_command([f"--config={config}", "--without=PrefixCache"])  # the name may be left out


def test_a_failed_run_ends_the_bench_with_its_last_lines_and_keeps_the_others(config, processes):
    arguments = ["rollout", f"--config={config}", "--without=PrefixCache", "--seeds=0", "--output=out"]
    with pytest.raises(RunFailedError) as end:
        bench_command([*arguments, "--model.init_args.top_p=0.9", "--model.init_args.importance_sampling=null"])
    message = str(end.value)
    assert message.startswith("the run with seed 0, with, ended with code 2.")
    assert "PrefixCache compares log-probs of the whole softmax" in message
    assert Path("out/seed-0-without/run.json").exists()
    assert not Path("out/seed-0-with/run.json").exists()
    assert len(processes) == 2


def test_termination_takes_the_present_run_along(config, processes):
    """The run went on by itself, on all cores, while its bench was started again."""
    command = [
        sys.executable,
        "-m",
        "lit_specrl.cli",
        "bench",
        "rollout",
        f"--config={config}",
        "--without=PrefixCache",
    ]
    with subprocess.Popen([*command, "--trainer.max_epochs=100000"]) as bench:
        children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
        while not (run := children.read_text().split()):
            assert bench.poll() is None
            time.sleep(0.1)
        bench.terminate()
        assert bench.wait(30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{run[0]}").exists()
