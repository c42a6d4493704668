import re
from types import SimpleNamespace

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_specrl.callbacks import RolloutProgressBar, RunSummary


class Steps(L.Callback):
    """Keeps what each step reported."""

    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append(dict(pl_module.step_metrics))


def numbers(text, label):
    """The numbers in the row of a table."""
    (row,) = [line for line in text.splitlines() if label in line]
    return [float(number) for number in re.findall(r"-?\d+\.\d+", row.split(label)[1])]


def test_the_table_holds_accuracy_before_and_after_and_rewards_of_first_and_last_epoch(
    module, data, make_trainer, capsys
):
    """The reward of call k is k in the even rows and k + 2 in the odd ones, and validation samples one row a prompt.

    Calls in order: 0 before training, 1 and 2 train, 3 validates, 4 and 5 train, 6 validates. With rows k, k + 2, k, k
    + 2 accuracies are 1, 4 and 7; rewards of a step are k + 1.
    """
    summary = RunSummary()
    trainer = make_trainer(summary, max_epochs=2, num_sanity_val_steps=-1, limit_val_batches=1.0)
    trainer.fit(module, datamodule=data)
    assert summary.accuracies == [1.0, 4.0, 7.0]
    assert dict(summary.rewards) == {0: [2.0, 3.0], 1: [5.0, 6.0]}
    out = capsys.readouterr().out
    assert "4 steps" in out
    assert "1.000 -> 7.000 (+6.000)" in out
    assert "2.500 / 5.500" in out
    assert "tensorboard" not in out


def test_seconds_by_stage_add_up_to_the_time_of_the_steps(module, data, make_trainer, capsys):
    steps, summary = Steps(), RunSummary()
    make_trainer(summary, steps).fit(module, datamodule=data)
    stages = {"gen", "reward", "experience", "update_actor", "start_engine", "update_weights", "other"}
    assert set(summary.seconds) == stages
    for stage in stages - {"other"}:
        assert summary.seconds[stage] == pytest.approx(sum(step.get(f"timing_s/{stage}", 0) for step in steps.metrics))
    total_s = sum(summary.seconds.values())
    assert total_s >= sum(step["timing_s/step"] for step in steps.metrics)

    out = capsys.readouterr().out
    assert numbers(out, "training, seconds") == pytest.approx([total_s, total_s / 2], abs=0.05)
    shares = [numbers(out, f" {stage} ")[1] for stage in stages]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    rows = [line for line in out.splitlines() if "%" in line]
    assert [float(re.search(r"([\d.]+)%", row)[1]) for row in rows] == sorted(shares, reverse=True)
    assert "held-out accuracy" not in out  # nothing was validated


def test_time_between_the_hooks_counts_as_other(monkeypatch):
    """Ten seconds from the start of the batch to its end, of which six are known."""
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("lit_specrl.callbacks.run_summary.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    module, trainer, summary = L.LightningModule(), L.Trainer(logger=False, accelerator="cpu"), RunSummary()
    module.step_metrics = {
        "timing_s/gen": 4.0,
        "timing_s/update_actor": 2.0,
        "timing_s/other": 1.0,
        "timing_s/step": 7.0,
        "reward": 0.5,
    }
    summary.on_train_batch_start(trainer, module, None, 0)
    summary.on_train_batch_end(trainer, module, None, None, 0)
    assert dict(summary.seconds) == {"gen": 4.0, "update_actor": 2.0, "other": 4.0}


def test_the_summary_says_where_tensorboard_looks(module, data, make_trainer, tmp_path, capsys):
    make_trainer(RunSummary(), logger=TensorBoardLogger(tmp_path / "logs"), max_steps=1).fit(module, datamodule=data)
    assert f"tensorboard --logdir {tmp_path / 'logs'}" in capsys.readouterr().out


def test_each_validation_is_told_when_it_is_done(module, data, make_trainer, caplog):
    caplog.set_level("INFO")
    make_trainer(RunSummary(), max_epochs=2, num_sanity_val_steps=-1, limit_val_batches=1.0).fit(
        module, datamodule=data
    )
    assert [message for message in caplog.messages if message.startswith("held-out")] == [
        "held-out accuracy before training: 1.000",
        "held-out accuracy after 2 steps: 4.000",
        "held-out accuracy after 4 steps: 7.000",
    ]


def test_beside_a_bar_it_is_told_on_a_line_of_its_own(module, data, make_trainer, capfd):
    make_trainer(
        RolloutProgressBar(), RunSummary(), enable_progress_bar=True, num_sanity_val_steps=-1, limit_val_batches=1.0
    ).fit(module, datamodule=data)
    out, err = capfd.readouterr()
    lines = re.split(r"[\r\n]+", out + err)
    assert "held-out accuracy before training: 1.000" in lines
    assert "held-out accuracy after 2 steps: 4.000" in lines


class Interrupt(L.Callback):
    """Ends the run before its second step, as Ctrl-C or a scheduler's SIGTERM does."""

    def __init__(self, exception):
        self.exception = exception

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            raise self.exception


class InterruptThird(L.Callback):
    """Ends the run inside its fourth step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SIGTERMException])
@pytest.mark.parametrize("is_saved", [True, False])
def test_a_run_that_is_stopped_says_what_it_did_and_how_to_go_on(
    module, data, make_trainer, tmp_path, capsys, exception, is_saved
):
    saving = [ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)] if is_saved else []
    with pytest.raises((SystemExit, SIGTERMException)):
        make_trainer(RunSummary(), Interrupt(exception()), *saving).fit(module, datamodule=data)
    out = capsys.readouterr().out
    assert "1 steps" in out
    saved = f"Go on with --ckpt_path {tmp_path / 'last.ckpt'}"
    assert (saved if is_saved else "No checkpoint was saved; configs/trainer/resumable.yaml saves some") in out


def test_the_checkpoint_that_is_saved_for_the_stop_is_named(module, data, make_trainer, tmp_path, capsys):
    """It was written after the summary, which named the one before."""
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_on_exception=True, filename="{step}")
    with pytest.raises(SystemExit):
        make_trainer(RunSummary(), InterruptThird(), saving, max_steps=4, max_epochs=2).fit(module, datamodule=data)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=3.ckpt"]
    assert f"Go on with --ckpt_path {tmp_path / 'step=3.ckpt'}" in capsys.readouterr().out


def test_an_error_has_no_summary(module, data, make_trainer, capsys):
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(RunSummary(), Interrupt(RuntimeError("out of luck"))).fit(module, datamodule=data)
    assert capsys.readouterr().out == ""


def test_a_run_without_steps_prints_no_table(capsys):
    RunSummary().on_train_end(L.Trainer(logger=False, accelerator="cpu"), L.LightningModule())
    assert capsys.readouterr().out == ""
