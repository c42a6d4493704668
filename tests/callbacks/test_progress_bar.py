import io
import itertools
import re
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from lit_specrl.callbacks import RolloutCallback, RolloutProgressBar
from lit_specrl.types import RolloutProgress


class Halfway(RolloutCallback):
    """Reports the middle of a rollout, as an engine does that takes longer than half a second."""

    def on_rollout_start(self, trainer, pl_module, request):
        middle = RolloutProgress(rows_done=1, num_rows=request.num_rows, num_tokens=600, elapsed_s=2.0)
        for callback in trainer.callbacks:
            if isinstance(callback, RolloutProgressBar):
                callback.on_rollout_progress(trainer, pl_module, middle)


@pytest.fixture
def lines(module, data, make_trainer, capfd):
    """What a run shows, one line per update of a bar."""

    def run(stage, **options):
        trainer = make_trainer(RolloutProgressBar(), Halfway(), enable_progress_bar=True, **options)
        getattr(trainer, stage)(module, datamodule=data)
        out, err = capfd.readouterr()
        return re.split(r"[\r\n]+", out + err)

    return run


def test_training_shows_rows_tokens_per_second_and_the_latest_reward_inside_a_rollout(lines):
    shown = [line for line in lines("fit") if "rollout=1/4" in line]
    assert len(shown) == 2
    assert all("Epoch 0" in line and "tokens/s=300" in line for line in shown)
    assert "reward=" not in shown[0]  # nothing is scored yet
    assert re.search(r"\b1/2 .*reward=1\.000", shown[1])


def test_the_end_of_a_rollout_and_of_a_step_are_shown_too(lines):
    shown = lines("fit")
    assert sum("rollout=4/4" in line for line in shown) >= 2
    after_last_step = [line for line in shown if " 2/2 " in line][-1]
    assert "reward=2.000" in after_last_step
    assert "tokens/s=" in after_last_step
    assert "rollout=" not in after_last_step
    assert not any("v_num" in line for line in shown)


@pytest.mark.parametrize(
    ("stage", "options", "bar", "row"),
    [
        ("fit", {"num_sanity_val_steps": 1, "limit_val_batches": 1.0, "max_steps": 1}, "Sanity Checking", "1/4"),
        ("validate", {"limit_val_batches": 1.0}, "Validation", "1/4"),
        ("predict", {}, "Predicting", "1/4"),
    ],
    ids=["sanity check", "validation", "prediction"],
)
def test_rollouts_outside_of_training_move_the_bar_of_their_stage(lines, stage, options, bar, row):
    assert any(line.startswith(bar) and f"rollout={row}" in line for line in lines(stage, **options))


def test_slow_steps_are_told_in_seconds_and_fast_ones_in_steps_a_second():
    bar = {"n": 2, "total": 8, "elapsed": 70.0, "bar_format": RolloutProgressBar.BAR_FORMAT}
    assert "35.00s/it" in tqdm.format_meter(**bar)
    assert "4.00it/s" in tqdm.format_meter(**bar | {"elapsed": 0.5})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_an_update_tells_its_micro_batches(module, data, make_trainer, monkeypatch):
    screen, clock = Terminal(), itertools.count()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("lit_specrl.callbacks.progress_bar.time", SimpleNamespace(monotonic=lambda: next(clock)))
    make_trainer(RolloutProgressBar(), enable_progress_bar=True, max_steps=1).fit(module, datamodule=data)
    assert re.search(r"stage=update_actor 1/\d+", screen.getvalue())


def test_a_disabled_bar_shows_nothing(module, data, make_trainer, capfd):
    bar = RolloutProgressBar(refresh_rate=0)
    make_trainer(bar, Halfway(), enable_progress_bar=True, max_steps=1).fit(module, datamodule=data)
    out, err = capfd.readouterr()
    assert "rollout=" not in out + err
