"""The command line: every config parses, and the commands of a run work one after the other."""

import functools
import json
import re
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_specrl.callbacks
from lit_specrl.cli import fit
from lit_specrl.cli import main as cli
from lit_specrl.cli.fit import train as run
from lit_specrl.cli.messages import ConfigurationError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BLOCKS = sorted((ROOT / "configs").rglob("*.yaml"))  # parts, which complete a recipe
ONE_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.logger=false"]


def relative(path):
    return str(path.relative_to(ROOT))


def refused(arguments):
    """What the command line says to arguments that it does not take."""
    with pytest.raises(ConfigurationError) as end:
        run(arguments)
    return str(end.value)


# ------------------------------------------------------------------------------------------------------------ configs


@pytest.fixture
def fitted(monkeypatch):
    """Replaces `Trainer.fit`: the classes of the config are built, nothing is run."""
    calls = []

    @functools.wraps(L.Trainer.fit)
    def fit(self, model, **arguments):
        calls.append((self, model, arguments["datamodule"]))

    monkeypatch.setattr(L.Trainer, "fit", fit)
    return calls


def config_arguments(*configs):
    return ["fit", *(f"--config={config}" for config in configs)]


@pytest.mark.parametrize("options", [["--trainer.callbacks+=RichProgressBar"], ["--trainer.callbacks=TQDMProgressBar"]])
def test_another_progress_bar_takes_the_place_of_ours(options, fitted, tmp_path, monkeypatch):
    """Both were given to the trainer, and Lightning takes one."""
    monkeypatch.chdir(tmp_path)
    run([*config_arguments(ROOT / "recipes/quickstart.yaml"), *ONE_CPU, *options])
    bars = [type(one).__name__ for one in fitted[0][0].callbacks if isinstance(one, ProgressBar)]
    assert bars == [options[0].rpartition("=")[2]]


def printed_config(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run([*arguments, "--print_config"])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    return yaml.safe_load(output.out)


def merged(block, config, path=""):
    """Leaves of `block` that `config` has otherwise; lists and classes are compared as they stand."""
    differences = []
    for key, value in block.items():
        if key.endswith("+"):
            continue
        if isinstance(value, dict) and isinstance(config.get(key), dict) and "class_path" not in value:
            differences += merged(value, config[key], f"{path}{key}.")
        elif not isinstance(value, (dict, list)) and config.get(key) != value:
            differences.append(f"{path}{key}")
    return differences


@pytest.mark.parametrize("recipe", RECIPES, ids=relative)
def test_recipe_builds_its_classes(recipe, fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run([*config_arguments(recipe), *ONE_CPU])
    [(trainer, module, data)] = fitted
    assert trainer.max_epochs == yaml.safe_load(recipe.read_text())["trainer"]["max_epochs"]
    assert data.batch_size % module.num_minibatches == 0


@pytest.mark.parametrize(
    ("bounds", "max_epochs"),
    [
        ([], 1),
        (["--trainer.max_steps=4"], -1),
        (["--trainer.max_time=00:00:05:00"], -1),
        (["--trainer.max_steps=4", "--trainer.max_epochs=2"], 2),
    ],
)
def test_epochs_are_bounded_where_nothing_else_bounds_the_run(bounds, max_epochs, tmp_path, monkeypatch):
    """`max_steps: 4` stopped after one epoch, the default of the command line."""
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
    del settings["trainer"]["max_epochs"]
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    assert parsed_config(["fit", "--config=config.yaml", *ONE_CPU, *bounds]).trainer.max_epochs == max_epochs


@pytest.mark.parametrize("block", BLOCKS, ids=relative)
def test_building_block_completes_a_recipe(block, fitted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = config_arguments(ROOT / "recipes/math500_grpo.yaml", block)
    assert merged(yaml.safe_load(block.read_text()), printed_config(arguments, capsys)) == []
    run([*arguments, *ONE_CPU])
    assert len(fitted) == 1


@pytest.mark.parametrize("recipe", RECIPES, ids=relative)
@pytest.mark.parametrize("block", BLOCKS, ids=relative)
def test_a_block_keeps_what_it_does_not_name(recipe, block, tmp_path, monkeypatch):
    """Two blocks of engines said `callbacks:` and took away the recipe's other callbacks without a word."""
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load(recipe.read_text()), yaml.safe_load(block.read_text())
    first, second = (callbacks_of(settings) for settings in written)
    assert "callbacks" not in written[1].get("trainer", {})
    named_again = set(second) & set(lit_specrl.callbacks.__all__)  # of Lightning's own there may be several
    merged = [*(callback for callback in first if callback not in named_again), *second]
    config = parsed_config([*config_arguments(recipe, block), *ONE_CPU])
    assert [callback.class_path.rpartition(".")[2] for callback in config.trainer.callbacks] == merged


def callbacks_of(settings):
    """Class names of a file's callbacks."""
    trainer = settings.get("trainer", {})
    callbacks = trainer.get("callbacks", []) + trainer.get("callbacks+", [])
    return [callback["class_path"].rpartition(".")[2] for callback in callbacks]


def parsed_config(arguments):
    """What the command line makes of files and options; nothing is built."""

    class Parsed(Exception):
        pass

    class ParseOnly(fit.LitSpecRLCLI):
        def before_instantiate_classes(self):
            raise Parsed(self.config.fit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "LitSpecRLCLI", ParseOnly)
        with pytest.raises(Parsed) as found:
            run(arguments)
    return found.value.args[0]


@pytest.mark.parametrize("config", RECIPES + BLOCKS, ids=relative)
def test_config_opens_with_a_command(config):
    """`make` targets and `lit-specrl` commands whose files exist."""
    first_line, text = config.read_text().split("\n", 1)
    assert re.match(r"# (lit-specrl fit|make) ", first_line)
    for name in re.findall(r"--config (\S+\.yaml)", first_line + text):
        assert (ROOT / name).is_file()


def test_a_callback_that_is_named_again_takes_the_place_of_the_first(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [ROOT / f"configs/callbacks/{name}.yaml" for name in ("prefix_cache", "speculation")]
    extra = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=LearningRateMonitor"]
    run([*config_arguments(ROOT / "recipes/math500_grpo.yaml", *blocks), *extra, *ONE_CPU])
    [(trainer, _, _)] = fitted
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert [names.count(name) for name in ("PrefixCache", "SpeculativeRollout", "AdaptiveScheduler")] == [1, 1, 1]
    assert names.count("LearningRateMonitor") == 2  # not ours to judge
    caches = {type(callback).__name__: callback for callback in trainer.callbacks}
    assert caches["PrefixCache"].verifier == "engine"  # of the block; the recipe leaves it to the policy
    assert caches["PrefixCache"].max_reuses == 2
    assert caches["PrefixCache"].reuse_policy.failures.max_reuse_fraction == 0.5
    assert type(caches["SpeculativeRollout"].drafter).__name__ == "HistoryDrafter"


def test_two_checkpoints_of_one_folder_write_one_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    Path("own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [own]}}))
    files = [ROOT / "recipes/quickstart.yaml", "own.yaml", ROOT / "configs/trainer/resumable.yaml"]
    callbacks = parsed_config([*config_arguments(*files), "--trainer.accelerator=cpu"]).trainer.callbacks
    saved = [one.init_args.save_last for one in callbacks if one.class_path.endswith("ModelCheckpoint")]
    assert saved == [None, True]


def test_short_names_of_classes_are_enough(fitted, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {
            "class_path": "GRPO",
            "init_args": {"model": tiny_model, "rewards": [{"class_path": "MathReward"}]},
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"train": {"class_path": "ArithmeticSource"}}},
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [
                {"class_path": "SpeculativeRollout", "init_args": {"engine": {"class_path": "TransformersEngine"}}},
                {"class_path": "RolloutRecorder"},
            ],
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    run(config_arguments("config.yaml"))
    [(trainer, module, _)] = fitted
    names = {type(callback).__name__ for callback in trainer.callbacks}
    assert {
        "SpeculativeRollout",
        "RolloutRecorder",
        "RolloutProgressBar",
        "LoggerReport",
        "CompletionWriter",
    } <= names
    assert type(module).__name__ == "GRPO"
    assert type(module.rewards.rewards[0]).__name__ == "MathReward"


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("section", "key"),
    [("model", "num_generatoins"), ("data", "batchsize"), ("trainer", "max_epoch"), (None, "trainner")],
)
def test_unknown_key_in_a_config_is_named(section, key, tmp_path):
    settings = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
    part = settings if section is None else settings[section]
    part.get("init_args", part)[key] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert key in refused(config_arguments(tmp_path / "config.yaml"))


def test_unknown_key_on_the_command_line_is_named():
    arguments = config_arguments(ROOT / "recipes/quickstart.yaml")
    assert "num_generatoins" in refused([*arguments, "--model.init_args.num_generatoins=3"])


def test_value_of_the_wrong_type_is_named():
    arguments = config_arguments(ROOT / "recipes/quickstart.yaml")
    assert "num_generations" in refused([*arguments, "--model.init_args.num_generations=many"])


def test_missing_config_is_named():
    assert "/nowhere.yaml" in refused(["fit", "--config=/nowhere.yaml"])


def test_unknown_class_is_named():
    assert "GRPOO" in refused(["fit", "--model=GRPOO"])


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        ("GRPO", ["num_generations", "temperature", "lora"]),
        ("DAPO", ["num_generations", "dynamic_sampling", "overlong_buffer"]),
        ("PPO", ["num_generations", "critic", "lam"]),
    ],
)
def test_help_of_an_algorithm_lists_its_arguments(algorithm, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run(["fit", "--model.help", algorithm])
    assert end.value.code == 0
    output = capsys.readouterr().out
    for argument in arguments:
        assert re.search(rf"--model\.{argument}\b", output)


def test_help_lists_all_commands(capsys, monkeypatch):
    main(monkeypatch, "--help")
    output = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "export", "drafter", "bench"):
        assert re.search(rf"\b{command}\b", output)


# -------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch):
    """A folder with a config for the tiny model, as working directory."""
    monkeypatch.chdir(tmp_path)
    questions = {"class_path": "ArithmeticSource", "init_args": {"num_prompts": 4}}
    held_out = {"class_path": "ArithmeticSource", "init_args": {"num_prompts": 3, "split": "validation"}}
    settings = {
        "model": {
            "class_path": "GRPO",
            "init_args": {
                "model": tiny_model,
                "rewards": ["training.variety"],
                "num_generations": 2,
                "max_completion_length": 6,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            },
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {
                "train": questions,
                "validation": held_out,
                "test": held_out,
                "predict": held_out,
                "test_sampling": {"num_generations": 2, "max_completion_length": 4},
                "batch_size": 2,
                "max_prompt_length": 64,
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "default_root_dir": str(tmp_path)},
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lit-specrl", *map(str, arguments)])
    cli.main()


def test_commands_of_a_run_one_after_the_other(folder, tiny_model, monkeypatch, capsys):
    trained = run(["fit", "--config=config.yaml"])
    [checkpoint] = folder.rglob("*.ckpt")
    config = checkpoint.parent.parent / "config.yaml"  # complete, as saved by the run
    assert trained.model.step == trained.model.policy_version == 2

    for command in ("validate", "test"):
        evaluated = run([command, f"--config={config}", f"--ckpt_path={checkpoint}"])
        assert evaluated.model.step == 2
        size = 1 if command == "validate" else 2
        assert f"val-core/arithmetic/acc/mean@{size}" in evaluated.model.evaluation

    run(["predict", "--config=config.yaml", f"--ckpt_path={checkpoint}", "--completions.path=answers/run.jsonl"])
    records = [json.loads(line) for line in (folder / "answers/run.jsonl").read_text().splitlines()]
    assert len(records) == 3 * 2
    assert set(records[0]) == {"uid", "source", "prompt", "answer", "completion", "completion_length", "finish_reason"}
    assert all(record["completion_length"] <= 4 for record in records)
    assert [path.name for path in (folder / "answers").iterdir()] == ["run.jsonl"]

    main(monkeypatch, "export", checkpoint, folder / "exported")
    exported = AutoModelForCausalLM.from_pretrained(folder / "exported")
    torch.testing.assert_close(exported.state_dict(), trained.model.policy.model.state_dict(), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder / "exported").get_vocab() == trained.model.tokenizer.get_vocab()
    capsys.readouterr()
    for arguments, message in {
        (checkpoint, folder / "exported"): "exported exists already; export into a new folder",
        ("missing.ckpt", folder / "other"): "missing.ckpt cannot be used: there is no such file",
    }.items():
        with pytest.raises(SystemExit) as end:
            main(monkeypatch, "export", *arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_a_run_is_resumed_into_its_own_folder(folder):
    logger = [
        "--trainer.logger=TensorBoardLogger",
        f"--trainer.logger.save_dir={folder}",
        "--trainer.logger.name=logs",
        "--trainer.logger.version=run",
    ]
    run(["fit", "--config=config.yaml", *logger])
    [checkpoint] = folder.rglob("*.ckpt")
    resumed = run(["fit", "--config=config.yaml", *logger, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2"])
    assert resumed.model.step == 4
    assert (folder / "logs/run/config.yaml").is_file()
    assert "max_epochs: 2" in (folder / "logs/run/config.yaml").read_text()


def test_a_value_that_the_class_refuses_is_told_in_the_words_of_the_class(folder):
    with pytest.raises(ValueError, match="num_minibatches must be at least 1, got 0"):
        run(["fit", "--config=config.yaml", "--model.init_args.num_minibatches=0"])


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_that_is_none_is_named_by_every_command(folder, command):
    """Lightning's command line reads it first, and ended in an EOFError without the file's name."""
    (folder / "empty.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.ckpt cannot be used: "):
        run([command, "--config=config.yaml", f"--ckpt_path={folder / 'empty.ckpt'}"])
