import json

import pyarrow.parquet as pq
import pytest
from lightning.pytorch.loggers import CSVLogger
from reuse_runs import GROUP, fit, grpo, questions

from lit_specrl.callbacks import RolloutCallback, RolloutRecorder


class Spy(RolloutCallback):
    """Keeps the rollouts of every step, and the names of the files that lie there then."""

    def __init__(self, folder=None):
        self.folder, self.steps, self.listings = folder, [], []

    def on_experience_end(self, trainer, pl_module, rollouts, experience):
        self.steps.append(rollouts)
        if self.folder:
            self.listings.append(sorted(path.name for path in self.folder.iterdir()))


def expected_records(spy):
    """What the files must hold, from the questions up."""
    answers = {"Hi": None, "Why?": "one", "2 | 3": "two", "<b>": "three"}
    questions = [["Hi", "Why?"], ["2 | 3", "<b>"]]
    records = []
    for step, rollouts in enumerate(spy.steps):
        for row in range(4):
            question = questions[step][row // 2]
            records.append(
                {
                    "step": step,
                    "policy_version": step,
                    "uid": rollouts.prompts.uids[row // 2],
                    "source": "questions",
                    "prompt": f"<|user|>{question}<|end|><|assistant|>",
                    "answer": answers[question],
                    "completion": rollouts.texts[row],
                    "completion_ids": rollouts.response_ids[row],
                    "finish_reason": rollouts.finish_reasons[row],
                    "reward": float(step + 2 * (row % 2)),
                    "advantage": pytest.approx([-1, 1][row % 2] / (2**0.5 + 1e-4)),
                    "reward/counting": float(step + 2 * (row % 2)),
                    "reward/long": 0.0 if len(rollouts.response_ids[row]) > 1 else None,
                }
            )
    return records


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_each_step_has_a_file_of_its_own_with_every_rollout(module, data, make_trainer, tmp_path, file_format):
    spy, folder = Spy(tmp_path / "kept"), tmp_path / "kept"
    trainer = make_trainer(RolloutRecorder(str(folder), file_format), spy)
    trainer.fit(module, datamodule=data)

    names = [f"step-00000000.{file_format}", f"step-00000001.{file_format}"]
    assert spy.listings == [names[:1], names]  # whole as soon as the step has them, nothing partial beside
    records = []
    for name in names:
        path = folder / name
        records += (
            [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            if file_format == "jsonl"
            else pq.read_table(path).to_pylist()
        )
    assert records == expected_records(spy)


def test_rows_without_reward_and_tokens_that_are_left_out(tiny_model, tmp_path):
    def some(prompts, completion_ids, **columns):
        return [None if "Hi" in prompt else float(ids[0]) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    module = grpo(tiny_model, [some], top_entropy_quantile=0.3, scale_rewards="none")
    fit(module, questions(tmp_path), RolloutRecorder(str(tmp_path / "kept")), max_epochs=1)

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    records = []
    for path in sorted((tmp_path / "kept").iterdir()):
        records += [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()]
    assert {record["reward"] is None for record in records} == {True, False}
    for start in range(0, len(records), GROUP):
        group = records[start : start + GROUP]
        if group[0]["reward"] is not None:
            mean = sum(record["reward"] for record in group) / GROUP
            for record in group:
                assert record["advantage"] == pytest.approx(record["reward"] - mean, rel=1e-4, abs=1e-4) or (
                    record["advantage"] == 0  # none of its tokens is among the undecided
                )
    assert any(record["advantage"] for record in records)


@pytest.mark.parametrize("logger", [False, True], ids=["no logger", "logger"])
def test_files_go_beside_the_logs(module, data, make_trainer, tmp_path, logger):
    trainer = make_trainer(
        RolloutRecorder(), logger=CSVLogger(tmp_path, name="run", version=3) if logger else False, max_steps=1
    )
    trainer.fit(module, datamodule=data)
    assert (tmp_path / ("run/version_3" if logger else "") / "rollouts" / "step-00000000.jsonl").is_file()


def test_an_interrupted_write_leaves_no_file_under_the_final_name(module, data, make_trainer, tmp_path, monkeypatch):
    def crash(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_specrl.checkpoints.atomic_files.os.replace", crash)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(RolloutRecorder(str(tmp_path / "kept"))).fit(module, datamodule=data)
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize(
    ("max_bytes", "expected"), [(1_300_000, [0, 1, 2, 3]), (1_000_000, [1, 2, 3]), (500_000, [2, 3]), (1, [3])]
)
def test_the_oldest_files_beyond_the_limit_are_deleted(module, data, make_trainer, tmp_path, max_bytes, expected):
    """A resumed run at its step 3, with 400 kB from each step before; what the recorder did not write stays."""
    (tmp_path / "notes.txt").write_text("x" * 2_000_000)
    for step in range(3):
        (tmp_path / f"step-{step:08d}.jsonl").write_text("x" * 400_000)
    module.step = 3
    make_trainer(RolloutRecorder(str(tmp_path), max_bytes=max_bytes), max_steps=1).fit(module, datamodule=data)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}.jsonl" for step in expected]
    assert (tmp_path / "notes.txt").exists()


def test_a_run_never_holds_more_than_the_limit_beside_its_newest_step(module, data, make_trainer, tmp_path):
    folder = tmp_path / "kept"
    spy = Spy(folder)
    make_trainer(RolloutRecorder(str(folder), max_bytes=1), spy, max_epochs=2).fit(module, datamodule=data)
    assert spy.listings == [[f"step-{step:08d}.jsonl"] for step in range(4)]


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="file_format must be 'jsonl' or 'parquet', got 'csv'"):
        RolloutRecorder(file_format="csv")
    with pytest.raises(ValueError, match="max_bytes must be positive, got 0"):
        RolloutRecorder(max_bytes=0)
