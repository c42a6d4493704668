"""`lit-specrl`: the commands by name. Nothing heavy is imported before the command line makes sense."""

from __future__ import annotations

import os
import sys

from lit_specrl.cli.commands import Command, overview, unknown
from lit_specrl.cli.ending import run_and_end
from lit_specrl.cli.messages import ConfigurationError, told, wants_debug

_TRAINING = {
    "fit": "train a policy",
    "validate": "score a policy on the validation data",
    "test": "score a policy on the test data",
    "predict": "write responses to the prompts",
}
COMMANDS = {
    "export": Command(
        "lit-specrl export",
        "turn a checkpoint into a HuggingFace folder",
        "lit_specrl.cli.export.export_checkpoint",
        is_positional=True,
    ),
    "drafter": Command(
        "lit-specrl drafter",
        "make a drafter for speculative rollouts",
        "lit_specrl.cli.drafter.make_drafter",
        takes_fit_options=True,
    ),
}
_SUMMARIES = (
    _TRAINING
    | {name: command.summary for name, command in COMMANDS.items()}
    | {"bench": "measure the library on this machine"}
)
_FIRST = "lit-specrl fit --config recipes/quickstart.yaml"
_DESCRIPTION = f"""Reinforcement learning with verifiable rewards. Begin with

  {_FIRST}"""
_FURTHER_HELP = """
`lit-specrl COMMAND --help` lists the options of a command. `lit-specrl fit --model.help DAPO` lists the arguments of
an algorithm. Every command takes --debug, which prints the traceback of an error.
"""


def run() -> None:
    """Entry point of `lit-specrl`: the process ends with the command."""
    run_and_end(main)


def main() -> None:
    """Do what the process's command line says."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if sys.path[:1] not in ([""], [os.getcwd()]):
        sys.path.insert(0, os.getcwd())  # a reward beside the configuration is found, as by `python train.py`
    command = f"lit-specrl {arguments[0]}" if arguments and arguments[0] in _SUMMARIES else "lit-specrl"
    with told(command, wants_debug(sys.argv[1:])):
        _call(arguments)


def _call(arguments: list[str]) -> None:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(overview("lit-specrl COMMAND [options]", _DESCRIPTION, _SUMMARIES))
        print(_FURTHER_HELP)
    elif name in COMMANDS:
        result = COMMANDS[name].call(arguments[1:])
        if result is not None:
            print(result)
    elif name == "bench":
        from lit_specrl.bench.command import bench_command

        bench_command(arguments[1:])
    elif name in _TRAINING or name.startswith("-"):
        if page := _help(arguments):
            print(page)
            return
        _check(arguments)
        from lit_specrl.cli.fit import train

        train(arguments)
    else:
        said = unknown(name, "command", list(_SUMMARIES))
        raise ConfigurationError(f"{said}{'' if said.endswith('?') else '.'} Begin with: {_FIRST}")


def _help(arguments: list[str]) -> str | None:
    from lit_specrl.cli.fit_help import answer

    command = arguments[0]
    return answer(command, _TRAINING[command], arguments[1:]) if command in _TRAINING else None


def _check(arguments: list[str]) -> None:
    """What can be said before torch is imported: that there is a configuration, and that its settings fit."""
    from lit_specrl.cli.configuration_files import sources
    from lit_specrl.cli.quick_check import check_quickly

    if len(arguments) == 1 and arguments[0] in _TRAINING:
        raise ConfigurationError(f"{arguments[0]} needs a configuration; begin with: {_FIRST}")
    if arguments[0] in _TRAINING:
        check_quickly(arguments[0], sources(arguments[1:]))
