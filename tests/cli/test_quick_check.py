"""Help and mistakes of `fit` without imports: the record of the classes is that of the real parser, and accepts what it
accepts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lit_specrl.cli.configuration_files import COMMAND_LINE, Source, sources
from lit_specrl.cli.diagnosis import first_problem
from lit_specrl.cli.fit_help import answer
from lit_specrl.cli.messages import ConfigurationError
from lit_specrl.cli.quick_check import check_quickly
from lit_specrl.cli.signatures import RECORD, Signatures

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BLOCKS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def signatures():
    return Signatures()


def test_the_record_is_what_the_parser_takes(tmp_path):
    """In a process of its own: classes of other tests are taken, too, where they are imported."""
    command = [sys.executable, "-m", "lit_specrl.cli.record_signatures", str(tmp_path / "now.json")]
    subprocess.run(command, check=True, cwd=ROOT)
    now = (tmp_path / "now.json").read_text("utf-8")
    assert now == RECORD.read_text("utf-8"), "run: python -m lit_specrl.cli.record_signatures"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_what_the_parser_takes_is_not_refused(recipe, signatures):
    check_quickly("fit", sources([f"--config={recipe}"]), signatures)
    for block in BLOCKS[RECIPES.index(recipe) :: len(RECIPES)]:
        check_quickly("fit", sources([f"--config={recipe}", f"--config={block}"]), signatures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.num_generatons=4"], "GRPO has no num_generatons; did you mean num_generations?"),
        (["--trainer.max_epoch=4"], "trainer has no max_epoch; did you mean max_epochs?"),
        (["--model.num_generations=many"], "num_generations must be a whole number, got the text 'many'"),
        (["--trainer.callbacks+=PrefixCach"], "there is no class PrefixCach; did you mean PrefixCache?"),
        (["--trainer.callbacks+=PrefixCache", "--trainer.callbacks.lenienc=2"], "did you mean lenience?"),
        (["--model=DAPOO"], "there is no class DAPOO; did you mean DAPO?"),
    ],
)
def test_a_mistake_is_refused(options, message, signatures):
    with pytest.raises(ConfigurationError, match=message.replace("?", r"\?").replace("(", r"\(")):
        check_quickly("fit", sources([f"--config={ROOT / 'recipes/quickstart.yaml'}", *options]), signatures)


@pytest.mark.parametrize(
    "options",
    [
        ["--model.optimizer=my_package.MyOptimizer", "--model.optimizer.strength=3"],
        ["--model=my_package.MyModule", "--model.anything=3"],
        ["--trainer.callbacks+=my_package.Callback", "--trainer.callbacks+=OtherCallback"],  # imported with the first
        ["--data.train=FileSource", "--data.train.path=123"],  # a text that reads like a number
        ["--model.num_generatons=4", "--print_config"],
        ["--trainer.strategy=DDPStrategy", "--trainer.strategy.find_unused_parameters=true"],
        ["--trainer.strategy=FSDP2Strategy"],
        ["--trainer.callbacks+=SaveConfigCallback"],  # of Lightning, and not among its callbacks
        ["--model.optimizer=AdamW8bit", "--model.optimizer.lr=1"],  # of a package that something may have imported
        ["--model.lr_scheduler=CosineAnnealingLR", "--model.lr_scheduler.T_max=3"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=one"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=loss", "--trainer.callbacks.mode=max"],
    ],
)
def test_what_the_record_cannot_know_is_left_to_the_parser(options, signatures):
    check_quickly("fit", sources([f"--config={ROOT / 'recipes/quickstart.yaml'}", *options]), signatures)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"lora": {"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}}},
        {"model": {"rewards": [{"class_path": "JudgeReward", "init_args": {"options": {"extra": {"a": 1}}}}]}},
        {"trainer": {"strategy": {"class_path": "DDPStrategy", "init_args": {"find_unused_parameters": True}}}},
    ],
)
def test_nothing_is_looked_at_that_can_be_anything(settings, signatures):
    """A mapping in a mapping of any values was taken for an object: `Any` is a class since Python 3.11."""
    recipe = sources([f"--config={ROOT / 'recipes/quickstart.yaml'}"])
    problem = first_problem(signatures.command("fit"), [*recipe, Source("more.yaml", settings)], "lit-specrl")
    assert problem is None or "needs" in str(problem)


def test_settings_of_one_of_several_sources_are_looked_up_in_its_class(signatures):
    """They were looked up in another, and the command at the head of the MATH-500 recipes was refused."""
    files = [f"--config={ROOT / 'recipes/math500_grpo.yaml'}", f"--config={ROOT / 'configs/data/local_math.yaml'}"]
    given = "--data.init_args.validation.math500.init_args"
    check_quickly("fit", sources([*files, f"{given}.path=rows.jsonl"]), signatures)
    with pytest.raises(ConfigurationError, match="FileSource has no paths; did you mean path"):
        check_quickly("fit", sources([*files, f"{given}.paths=rows.jsonl"]), signatures)


def test_what_no_later_option_gives_is_missing(signatures):
    options = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.mode=max"]
    given = sources([f"--config={ROOT / 'recipes/quickstart.yaml'}", *options])
    with pytest.raises(ConfigurationError, match="EarlyStopping needs monitor"):
        check_quickly("fit", given, signatures)


@pytest.mark.parametrize("changed", ["versions", "files"])
def test_nothing_is_refused_where_the_record_is_of_another_version(changed):
    content = json.loads(RECORD.read_text())
    content[changed][next(iter(content[changed]))] = "another"
    misspelt = Source(COMMAND_LINE, {"trainer": {"max_epoch": 3}})
    recipe = sources([f"--config={ROOT / 'recipes/quickstart.yaml'}"])
    check_quickly("fit", [*recipe, misspelt], Signatures(content))
    with pytest.raises(ConfigurationError):
        check_quickly("fit", [*recipe, misspelt])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], ["--config FILE", "GRPO", "num_generations", "PrefixCache", "`--trainer.help`"]),
        (["--trainer.help"], ["--trainer.max_epochs", "Stop training once this number of epochs is reached"]),
        (["--model.help"], ["GRPO", "PPO", "Group relative policy optimisation"]),
        (["--model.help", "GRPO"], ["--model.num_generations", "rollouts per prompt, G"]),
        (["--model.rewards.help"], ["MathReward", "1 where the answer equals the reference as mathematics"]),
        (["--model.rewards.help=FormatReward"], ["--model.rewards.pattern", "required"]),
        (["--data.train.help", "FileSource"], ["--data.train.path", "the file; the extension decides"]),
        (["--trainer.callbacks.help", "PrefixCache"], ["--trainer.callbacks.max_reuses"]),
        (["--trainer.callbacks.engine.help"], ["VLLMEngine", "TransformersEngine"]),
    ],
)
def test_help_tells_what_there_is(arguments, told):
    page = answer("fit", "train a policy", arguments)
    assert [text for text in told if text not in page] == []
    assert arguments != ["--help"] or len(page.splitlines()) <= 60


def test_help_for_what_there_is_not_is_refused():
    with pytest.raises(ConfigurationError, match="did you mean MathReward"):
        answer("fit", "", ["--model.rewards.help", "MathRewar"])
    with pytest.raises(ConfigurationError, match=r"there is no setting model\.rewardz"):
        answer("fit", "", ["--model.rewardz.help"])
    assert answer("fit", "", ["--model.rewards.help", "my_package.Mine"]) is None  # the parser imports it
    assert answer("fit", "", ["--config", "recipe.yaml"]) is None


def test_help_and_mistakes_need_no_torch():
    program = """
import sys
from lit_specrl.cli import main
for arguments in (["fit", "--help"], ["fit", "--model.help", "GRPO"], ["fit", "--config", FILE, "--model.lr=3"],
                  ["export", "--help"], ["export"]):
    sys.argv = ["lit-specrl", *arguments]
    try: main.main()
    except SystemExit as end: print("ended with", end.code)
    assert "torch" not in sys.modules, arguments
"""
    file = str(ROOT / "recipes/quickstart.yaml")
    command = [sys.executable, "-c", program.replace("FILE", repr(file))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("ended with 2") == 2, done.stdout
    assert "GRPO has no lr" in done.stderr
