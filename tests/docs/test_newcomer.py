"""Somebody who has only the tutorial goes through it, in order, in an empty folder. The model is a tiny one."""

import json
import re
import runpy
import sys

import pytest
from pages import BLOCKS, ROOT, command_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_specrl.cli.fit import train
from lit_specrl.cli.main import COMMANDS

TUTORIAL = ROOT / "docs" / "tutorial.md"
STEPS = [
    line for block in BLOCKS if block.page == TUTORIAL and block.language == "bash" for line in command_lines(block)
]
WITHOUT_VLLM = ["--config", "configs/engine/transformers.yaml"]
QUIETLY = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The newcomer's folder, with the files that the page shows."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("recipes", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for block in BLOCKS:
        if block.page == TUTORIAL and block.file:
            (folder / block.file).write_text(block.text, "utf-8")
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)


def step(command, tiny_model):
    """Arguments of the tutorial's command that begins so, for the tiny model."""
    (line,) = {line for line in STEPS if line.startswith(command)}
    return [tiny_model if word == "FOLDER" else word for word in line.split()[1:]]


def fit(arguments, *more):
    return train([*arguments, *more, *QUIETLY])


def test_the_page_has_the_steps_of_this_file():
    """Of the other two, `make quickstart` and `bench rollout` have tests of their own."""
    programs = [" ".join(line.split()[:2]) for line in STEPS]
    assert programs == [
        "make quickstart",
        *["lit-specrl fit"] * 3,
        "lit-specrl export",
        "lit-specrl fit",
        "lit-specrl bench",
    ]


def test_own_data(tiny_model, capsys):
    run = fit(step("lit-specrl fit --config task.yaml --model", tiny_model), *WITHOUT_VLLM)
    assert run.model.step == 20 and run.datamodule.num_train_prompts == 4
    assert run.model.step_metrics["frac_reward_zero_std"] == 1  # random text spells nothing, as the page says
    assert "20 steps" in capsys.readouterr().out


def test_own_reward(tiny_model):
    run = fit(
        step("lit-specrl fit --config task.yaml --config reward.yaml --model", tiny_model),
        *WITHOUT_VLLM,
        "--trainer.max_epochs",
        "3",
    )
    assert [reward.name for reward in run.model.rewards.rewards] == ["closeness", "format"]
    assert {"rewards/closeness/mean", "rewards/format/mean"} <= set(run.model.step_metrics)


def test_the_same_in_python(tiny_model, monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["train.py", tiny_model])
    found = runpy.run_path(str(folder / "train.py"), run_name="__main__")
    trainer, module = found["trainer"], found["module"]
    assert module.step == 20 and module.policy_version == 20
    assert trainer.checkpoint_callback.best_model_path.endswith(".ckpt")
    (log,) = (folder / "logs" / "lightning_logs").glob("*/metrics.csv")
    assert "rewards/closeness/mean" in log.read_text().splitlines()[0]


def test_interrupted_resumed_and_exported(tiny_model, folder):
    arguments = step("lit-specrl fit --config task.yaml --config reward.yaml --config configs/trainer/", tiny_model)
    first = fit(arguments, *WITHOUT_VLLM, "--trainer.max_steps", "13")
    assert first.model.policy_version == 13
    second = fit(arguments, *WITHOUT_VLLM)  # from the checkpoint of the last update
    assert second.model.policy_version == 20 and second.trainer.current_epoch == 10

    export = step("lit-specrl export", tiny_model)
    COMMANDS[export[0]].call(export[1:])
    model, tokenizer = AutoModelForCausalLM.from_pretrained("my_model"), AutoTokenizer.from_pretrained("my_model")
    inputs = tokenizer("Spell", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_reuse_and_drafts(tiny_model):
    arguments = step("lit-specrl fit --config task.yaml --config reward.yaml --config configs/callbacks/", tiny_model)
    run = fit(arguments, "--trainer.max_epochs", "3", "--trainer.limit_val_batches", "0")
    metrics = run.model.step_metrics
    assert metrics["prefix_cache/saved_tokens"] > 0 and metrics["prefix_cache/hit_fraction"] == 1
    assert metrics["speculation/acceptance_length"] >= 1
    table = (ROOT / "docs" / "reference" / "metrics.md").read_text("utf-8")
    speculation = [re.sub(r"(?<=_by_position/).*", "{k}", name) for name in metrics if name.startswith("speculation/")]
    speculation = [re.sub(r"(?<=_by_source/).*", "{s}", name) for name in speculation]
    assert len(set(speculation)) > 8
    assert [name for name in speculation if f"`{name}`" not in table] == []


def test_the_data_of_the_page_is_what_the_reward_was_given(folder):
    rows = [json.loads(line) for line in (folder / "spelling.jsonl").read_text().splitlines()]
    assert all(len(row["answer"]) == row["letters"] and row["answer"][::-1] in row["question"] for row in rows)
