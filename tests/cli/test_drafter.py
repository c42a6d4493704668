"""`lit-specrl drafter`: a drafter before the run, and what is wrong with its arguments."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from training import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_specrl.callbacks import DrafterPretraining
from lit_specrl.callbacks.drafter_pretraining import _read, _response
from lit_specrl.cli.drafter import pretraining_configuration
from lit_specrl.cli.fit import train
from lit_specrl.cli.main import COMMANDS
from lit_specrl.drafting import Eagle3Drafter, NGramDrafter
from lit_specrl.drafting.distillation.trainer import DrafterTrainer
from lit_specrl.drafting.eagle3 import check_head
from lit_specrl.drafting.networks import Eagle3Network
from lit_specrl.types import SamplingConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama(num_hidden_layers=3)


@pytest.fixture
def config(model, tmp_path):
    """A run with everything that the command has to take away."""
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"{a} + {b}", "answer": str(a + b)} for a in range(3) for b in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {
            "class_path": "GRPO",
            "init_args": {
                "model": model,
                "rewards": [{"class_path": "ExactReward"}],
                "num_generations": 4,
                "max_completion_length": 12,
            },
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {"train": str(path), "validation": str(path), "batch_size": 2, "max_prompt_length": 64},
        },
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path / "root"),
            "callbacks": [
                {
                    "class_path": "SpeculativeRollout",
                    "init_args": {
                        "engine": {"class_path": "TransformersEngine"},
                        "drafter": {"class_path": "Eagle3Drafter", "init_args": {"model": "not there yet"}},
                    },
                },
                {"class_path": "DrafterDistillation"},
                {"class_path": "RunSummary"},
            ],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "run.yaml")


SMALL = ["--num_rollouts=16", "--num_passes=2", "--num_speculative_tokens=2"]


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ({}, True),
        ({"finish_reason": "stop"}, True),
        ({"finish_reason": "length"}, False),
        ({"finish_reason": "turns"}, False),
        ({"completion": "4</s>"}, False),
    ],
)
def test_a_response_ends_with_end_of_text_where_it_ended_by_itself(model_folder, more, ends):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    record = {"prompt": "2 + 2", "completion": "44"} | more
    token_ids = _response(record, tokenizer, ["</s>", "\n"])
    assert (token_ids[-1] == tokenizer.eos_token_id) == ends
    assert token_ids[: len(token_ids) - ends] == tokenizer(record["completion"], add_special_tokens=False).input_ids


def test_a_new_head_learns_from_what_the_policy_says(config, model, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path(model).iterdir()}
    COMMANDS["drafter"].call(["--config", config, "--output", str(tmp_path / "head"), "--vocabulary_size=40", *SMALL])
    network = Eagle3Network.load(str(tmp_path / "head"))
    check_head(str(tmp_path / "head"), AutoModelForCausalLM.from_pretrained(model).config)
    assert len(network.vocabulary) == 40 and network.module.config.speculators_config.verifier.name_or_path == model
    printed = capsys.readouterr().out
    assert "the drafter learns" in printed and "are accepted" in printed
    assert {path: path.stat().st_mtime_ns for path in Path(model).iterdir()} == before
    assert not (tmp_path / "root").exists() or not list((tmp_path / "root").rglob("*.ckpt"))

    weights = {name: weight.clone() for name, weight in network.weights()}
    COMMANDS["drafter"].call(
        ["--config", config, "--output", str(tmp_path / "better"), f"--head={tmp_path / 'head'}", *SMALL]
    )
    better = dict(Eagle3Network.load(str(tmp_path / "better")).weights())
    assert any(not torch.equal(better[name], weights[name]) for name in weights)


def test_a_small_model_learns_from_a_file(config, model, make_llama, tmp_path):
    records = [{"prompt": "1 + 1", "completion": "2" * length, "finish_reason": "stop"} for length in range(2, 12)]
    records += [{"prompt": "1 + 2", "completion": "?", "completion_ids": [20, 21, 22], "finish_reason": "length"}]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    small = make_llama(num_hidden_layers=1)
    options = [f"--draft_model={small}", f"--rollouts={tmp_path / 'rollouts.jsonl'}", *SMALL]
    COMMANDS["drafter"].call(["--config", config, "--output", str(tmp_path / "small"), *options])
    trained, old = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "small", small))
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), old.parameters(), strict=True))


def test_the_divergence_is_made_small_before_another_loss(config, model, make_llama, tmp_path, monkeypatch):
    """For half of the optimizer steps, rounded up: here two of three."""
    records = [{"prompt": "1 + 1", "completion": "2" * length, "finish_reason": "stop"} for length in range(2, 12)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    losses, update = [], DrafterTrainer.update

    def watched(training, samples):
        losses.append(type(training.loss).__name__)
        return update(training, samples)

    monkeypatch.setattr(DrafterTrainer, "update", watched)
    options = [f"--draft_model={make_llama(num_hidden_layers=1)}", f"--rollouts={tmp_path / 'rollouts.jsonl'}"]
    common = ["--config", config, "--output", str(tmp_path / "small"), *options, "--num_passes=3"]
    COMMANDS["drafter"].call([*common, "--loss=acceptance"])
    COMMANDS["drafter"].call(common)
    assert losses == ["ForwardKL", "ForwardKL", "AcceptedLength", "ForwardKL", "ForwardKL", "ForwardKL"]


def test_a_folder_that_holds_something_else_is_left_alone(config, tmp_path, monkeypatch):
    """The drafter took its place, with all that was in it."""
    (tmp_path / "models" / "one").mkdir(parents=True)
    (tmp_path / "models" / "one" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for output, message in [("models", "holds something else"), (".", "holds the working folder")]:
        with pytest.raises(MisconfigurationException, match=message):
            COMMANDS["drafter"].call(["--config", config, "--output", output, *SMALL])
    assert (tmp_path / "models" / "one" / "config.json").exists()


def test_a_drafter_is_trained_where_a_finished_run_goes_on(config, make_llama, tmp_path):
    """The bounds of the recipe had been reached: nothing was written, and nothing said."""
    settings = yaml.safe_load(Path(config).read_text())
    settings["trainer"] |= {"callbacks": [], "logger": False, "max_steps": 1, "enable_checkpointing": False}
    (tmp_path / "finished.yaml").write_text(yaml.safe_dump(settings))
    train(["fit", f"--config={tmp_path / 'finished.yaml'}"]).trainer.save_checkpoint(tmp_path / "last.ckpt")
    records = [{"prompt": "1 + 1", "completion": "2" * length, "finish_reason": "stop"} for length in range(2, 12)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = [f"--draft_model={make_llama(num_hidden_layers=1)}", f"--rollouts={tmp_path / 'rollouts.jsonl'}", *SMALL]
    options += [f"--ckpt_path={tmp_path / 'last.ckpt'}", "--trainer.max_steps=1", f"--output={tmp_path / 'small'}"]
    COMMANDS["drafter"].call(["--config", config, *options])
    assert (tmp_path / "small" / "config.json").exists()
    options = [*options[:-1], f"--output={tmp_path / 'other'}", "--trainer.limit_train_batches=0"]
    with pytest.raises(ValueError, match=r"no drafter was written to .*other: the run ended before"):
        COMMANDS["drafter"].call(["--config", config, *options])


def test_only_engine_and_training_of_the_drafter_are_left(config):
    settings = yaml.safe_load(Path(config).read_text())
    for callback in settings["trainer"]["callbacks"]:
        callback["class_path"] = f"lit_specrl.callbacks.{callback['class_path']}"
    options = {"output": "x", "head": None, "draft_model": "small", "learning_rate": 0.1, "rollouts": None}
    callbacks = pretraining_configuration(settings, options)["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[-1] for callback in callbacks] == [
        "SpeculativeRollout",
        "DrafterPretraining",
    ]
    assert callbacks[0]["init_args"]["drafter"] is None
    assert callbacks[1]["init_args"]["drafter"]["init_args"] == {"model": "small"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollouts=nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["--loss=l1"], "loss must be 'kl', 'tv', 'acceptance' or a DraftLoss by class_path, got 'l1'"),
        (["--num_rollouts=0"], "num_rollouts must be at least 1, got 0"),
        (["--head=nowhere"], "'nowhere' is no EAGLE-3 head"),
        (["--head=nowhere", "--vocabulary_size=9"], "vocabulary_size=9 is of a new head"),
    ],
)
def test_wrong_arguments_are_told(config, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        COMMANDS["drafter"].call(["--config", config, "--output", str(tmp_path / "head"), *options])
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "3"}, "line 3: no completion and no prompt; found question"),
        ([1, 2], r"line 3 must be a JSON object, got \[1, 2\]"),
        ({"prompt": "1", "completion": "23", "turns": ["2", "3"]}, "line 3: a response of several turns needs compl"),
        (
            {"prompt": "1", "completion": "23", "completion_ids": [7], "observation_mask": [0, 1]},
            "line 3: observation_mask needs completion_ids and one entry for each, got 2 for 1",
        ),
    ],
)
def test_files_that_are_no_rollouts_are_told(config, tmp_path, line, message):
    """Blank lines are none of theirs."""
    (tmp_path / "rollouts.jsonl").write_text('{"prompt": "1", "completion": "2"}\n\n' + json.dumps(line) + "\n")
    with pytest.raises(MisconfigurationException, match=message):
        COMMANDS["drafter"].call(
            ["--config", config, "--output", str(tmp_path / "head"), f"--rollouts={tmp_path / 'rollouts.jsonl'}"]
        )


def test_what_an_environment_wrote_is_read_and_not_learned(model_folder, tmp_path):
    """A record as `RolloutRecorder` writes it."""

    class Module:
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        sampling = SamplingConfig()

    record = {"prompt": "1", "completion": "?", "completion_ids": [20, 21, 22, 23], "turns": ["a", "b"]}
    lines = [record | {"observation_mask": [0, 1, 1, 0]}, {"prompt": "2", "completion": "4", "completion_ids": [20]}]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    (part,) = _read(str(tmp_path / "rollouts.jsonl"), Module(), 9, make_trainer())
    assert part.policy_mask.tolist() == [[True, False, False, True], [True, False, False, False]]
    assert part.response_ids.tolist() == [[20, 21, 22, 23], [20, 0, 0, 0]]


def test_a_new_head_by_class_is_grown_from_the_responses():
    pretraining = DrafterPretraining("x", drafter=Eagle3Drafter(vocabulary_size=32))
    assert (pretraining.drafter, pretraining.vocabulary_size) == (None, 32)
    with pytest.raises(ValueError, match="NGramDrafter has no weights to train; take an Eagle3Drafter or a DraftModel"):
        DrafterPretraining("x", drafter=NGramDrafter())
