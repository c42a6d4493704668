"""Commands, YAML, JSON and Python of the pages are understood as they stand there."""

import itertools
import json
import os
import re
import shlex
import sys

import lightning as L
import pytest
import yaml
from pages import BLOCKS, PAGES, ROOT, blocks, command_lines, inline_commands

from lit_specrl.bench.command import BENCHMARKS
from lit_specrl.bench.rollout.runs import Run, RunFailedError
from lit_specrl.cli import fit as fit_module
from lit_specrl.cli.commands import _separated
from lit_specrl.cli.configuration_files import sources
from lit_specrl.cli.fit_help import answer
from lit_specrl.cli.main import COMMANDS
from lit_specrl.cli.quick_check import check_quickly

TRAINING = ("fit", "validate", "test", "predict")
LINES = [(block, line) for block in blocks("bash") for line in command_lines(block)]
INLINE = [(page, code) for page in PAGES for code in inline_commands(page.read_text("utf-8"))]


def arguments_of(line: str) -> list[str] | None:
    """What `lit-specrl` is given, also behind `srun` and `torchrun`; `None` for other programs."""
    for program in ("lit-specrl ", "srun lit-specrl "):
        if line.startswith(program):
            return shlex.split(line.removeprefix(program))
    if line.startswith("torchrun "):
        return shlex.split(line.split("-m lit_specrl.cli ")[1])
    return None


OURS = [(block.where, arguments) for block, line in LINES if (arguments := arguments_of(line)) is not None]
OURS += [
    (f"{page.relative_to(ROOT)}, {code}", arguments)
    for page, code in INLINE
    if not {"COMMAND", "NAME"} & set(arguments := shlex.split(code)[1:])
]


def header_commands(file):
    """Commands in the remarks that a file of settings begins with."""
    remarks = itertools.takewhile(lambda line: line.startswith("#"), file.read_text("utf-8").splitlines())
    lines = "\n".join(line.removeprefix("#").strip() for line in remarks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("lit-specrl fit ")]
    return [[word.replace("recipes/...", "recipes/quickstart.yaml") for word in words[1:]] for words in commands]


HEADERS = [
    (str(file.relative_to(ROOT)), arguments)
    for folder in ("recipes", "configs")
    for file in sorted((ROOT / folder).rglob("*.yaml"))
    for arguments in header_commands(file)
]


class Parsers(Exception):
    """Carries the parsers of the command line out of it, by subcommand."""

    def __init__(self, parsers):
        self.parsers = parsers


@pytest.fixture(scope="module")
def parsers():
    class Captured(fit_module.LitSpecRLCLI):
        def parse_arguments(self, parser, args):
            raise Parsers(self._subcommand_parsers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "LitSpecRLCLI", Captured)
        with pytest.raises(Parsers) as caught:
            fit_module.train(["fit"])
    return caught.value.parsers


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A newcomer's folder: recipes, configs, and the files of a page."""

    def at(page):
        for folder in ("recipes", "configs"):
            (tmp_path / folder).symlink_to(ROOT / folder)
        for block in BLOCKS:
            if block.page == page and block.file:
                (tmp_path / block.file).write_text(block.text, "utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in [name for name in sys.modules if name.startswith("my_")]:
            monkeypatch.delitem(sys.modules, name)
        return tmp_path

    return at


def understood(parser, arguments):
    """The settings, or `None` where the arguments ask for help."""
    if not any(argument.endswith("help") for argument in arguments):
        return parser.parse_args([argument for argument in arguments if argument != "--print_config"])
    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments)
    assert end.value.code in (0, None)
    return None


def page_of(where: str):
    return ROOT / re.split(r"[:,]", where)[0]


TUTORIAL = ROOT / "docs" / "tutorial.md"


@pytest.mark.parametrize(
    ("where", "arguments"), OURS, ids=[f"{where} {index}" for index, (where, _) in enumerate(OURS)]
)
def test_a_command_is_understood(where, arguments, parsers, desk, monkeypatch):
    page = page_of(where)
    folder = desk(TUTORIAL if page.parent == ROOT / "recipes" else page)
    name, *rest = [argument for argument in arguments if argument != "..."]
    if name in TRAINING and (told := answer(name, "", rest)) is not None:  # --help, --KEY.help CLASS
        assert len(told.splitlines()) > 5
    elif name in TRAINING:
        if set(rest) <= {"--print_config"}:  # the name of a command in a sentence
            return
        check_quickly(name, sources(rest))
        settings = understood(parsers[name], rest)
        if settings is not None:
            assert settings.model.class_path in ("lit_specrl.GRPO", "lit_specrl.DAPO", "lit_specrl.PPO")
    elif name == "bench" and (not rest or rest[0].startswith("--") or rest[0] == "rollout") and "--help" not in rest:
        rest = [argument for argument in rest if argument != "rollout"]
        if "--config" in rest and "--without" in rest and all((folder / file).exists() for file in configs(rest)):
            check_benchmark(rest, folder, monkeypatch)
    elif name == "bench":
        if rest and rest[0] in BENCHMARKS:
            understood(BENCHMARKS[rest[0]].parser(), rest[1:])
        else:
            assert rest == ["--help"]
    elif name in COMMANDS:
        command = COMMANDS[name]
        if command.takes_fit_options:
            own = {option for action in command.parser()._actions for option in action.option_strings}
            assert {"--output"} <= {argument for argument in rest if argument in own} or len(rest) < 2
            if rest:  # more than the name of a command in a sentence
                check_quickly("fit", sources(_separated(command.parser(), rest)[1]))
        elif rest:
            understood(command.parser(), rest)
    else:
        assert name == "--help", f"{where}: there is no command {name}"


@pytest.mark.parametrize(
    ("where", "arguments"), HEADERS, ids=[f"{where} {index}" for index, (where, _) in enumerate(HEADERS)]
)
def test_a_command_at_the_head_of_a_file_is_understood(where, arguments, parsers, desk):
    desk(TUTORIAL)
    check_quickly(arguments[0], sources(arguments[1:]))
    assert understood(parsers[arguments[0]], arguments[1:]) is not None


def configs(arguments):
    return [value for option, value in itertools.pairwise(arguments) if option == "--config"]


def check_benchmark(arguments, folder, monkeypatch):
    """It finds its callbacks, and would start its first run."""

    def stop(run):
        raise RunFailedError(f"{run.arm} would start")

    monkeypatch.setattr(Run, "execute", stop)
    options = [argument for argument in arguments if not argument.startswith("--json")]
    if "--output" not in options:
        options.append(f"--output={folder / 'comparison'}")
    with pytest.raises(RunFailedError, match="would start"):
        BENCHMARKS["rollout"].call(options)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_understood_beside_a_recipe(block, parsers, desk):
    folder = desk(block.page)
    (folder / "block.yaml").write_text(block.text, "utf-8")
    whole = "data" in (keys := yaml.safe_load(block.text)) and "model" in keys and "trainer" in keys
    whole = whole and "class_path" in keys["model"]
    recipe = [] if whole else ["--config", "recipes/quickstart.yaml"]
    arguments = [*recipe, "--config", "block.yaml", "--model.init_args.model", "FOLDER"]
    check_quickly("fit", sources(arguments))
    settings = parsers["fit"].parse_args(arguments)
    assert settings.model.init_args.model == "FOLDER"


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_has_an_object_a_line(block):
    rows = [json.loads(line) for line in block.text.splitlines()]
    assert all("question" in row for row in rows)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_program_runs_up_to_the_training(block, desk, monkeypatch):
    """Or it says in a remark above it why not."""
    if block.comment.startswith("not run: "):
        return
    desk(block.page)
    started = []
    monkeypatch.setattr(L.Trainer, "fit", lambda self, module, datamodule: started.append((module, datamodule)))
    monkeypatch.setattr(sys, "argv", ["train.py", "FOLDER"])
    program = block.text.replace("L.Trainer(", 'L.Trainer(accelerator="cpu", ')
    exec(compile(program, block.where, "exec"), {"__name__": "__main__"})
    assert len(started) == block.text.count("trainer.fit(")


def test_blocks_are_in_languages_that_are_checked():
    known = {"bash", "yaml", "json", "python", "text"}
    assert {block.language for block in BLOCKS} <= known, [b.where for b in BLOCKS if b.language not in known]


def test_lines_of_the_shell_are_programs_that_are_known():
    programs = {re.sub(r"^[A-Z_]+=\S+ ", "", line).split()[0] for _, line in LINES}
    assert programs <= {
        "make",
        "pip",
        "lit-specrl",
        "srun",
        "torchrun",
        "tensorboard",
        "vllm",
        ".venv/bin/python",
        "python",
        "pytest",
        "python3",
    }


@pytest.mark.parametrize("command", sorted({line for _, line in LINES if line.startswith("make ")}))
def test_make_knows_the_target(command):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    words = [word for word in shlex.split(command)[1:] if "=" not in word]
    assert set(words) <= targets


def test_extras_of_pip_exist():
    extras = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    for page in PAGES:
        for named in re.findall(r"lit_specrl\[([\w,-]+)\]", page.read_text("utf-8")):
            for extra in named.split(","):
                assert re.search(rf"^{extra} = ", extras, re.MULTILINE), f"{page}: no extra {extra}"


# ------------------------------------------------------------------------------------------ the tests see what is wrong


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "recipes/quickstart.yaml", "--model.init_args.gamma_ray", "1"],
        ["--config", "recipes/none.yaml"],
        ["--config", "recipes/quickstart.yaml", "--trainer.callbacks.help", "NoSuchCallback"],
    ],
    ids=["argument", "file", "class"],
)
def test_a_wrong_command_is_seen(arguments, parsers, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match=r"gamma_ray|none\.yaml|NoSuchCallback"):
        understood(parsers["fit"], arguments)


def test_commands_are_found_behind_launchers():
    assert arguments_of("srun lit-specrl fit --config a.yaml") == ["fit", "--config", "a.yaml"]
    assert arguments_of("torchrun --nnodes 2 -m lit_specrl.cli fit --config a.yaml") == ["fit", "--config", "a.yaml"]
    assert arguments_of("make test") is None
    assert os.path.basename(__file__) == "test_commands.py" and len(OURS) > 60 and len(HEADERS) > 25
