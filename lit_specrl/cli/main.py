"""`lit-specrl`: the commands by name. Nothing heavy is imported before the command line makes sense."""

from __future__ import annotations

import difflib
import os
import sys

from lit_specrl.cli.messages import ConfigurationError, told, wants_debug

_TRAINING = {
    "fit": "train a policy",
    "validate": "score a policy on the validation data",
    "test": "score a policy on the test data",
    "predict": "write responses to the prompts",
}
_OTHERS = {
    "export": "turn a checkpoint into a HuggingFace folder",
    "bench": "measure the library on this machine",
    "drafter": "make a drafter for speculative rollouts",
}
_FIRST = "lit-specrl fit --config recipes/quickstart.yaml"
_HELP = """usage: lit-specrl COMMAND [options]

Reinforcement learning with verifiable rewards. Begin with

  {first}

commands:
{commands}

`lit-specrl COMMAND --help` lists the options of a command. Every command takes --debug, which prints the traceback of an error.
"""


def main() -> None:
    """Entry point of `lit-specrl`."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if sys.path[:1] not in ([""], [os.getcwd()]):
        sys.path.insert(0, os.getcwd())  # a reward beside the configuration is found, as by `python train.py`
    command = f"lit-specrl {arguments[0]}" if arguments and arguments[0] in _TRAINING | _OTHERS else "lit-specrl"
    with told(command, wants_debug(sys.argv[1:])):
        _call(arguments)


def _call(arguments: list[str]) -> None:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        width = max(map(len, _TRAINING | _OTHERS))
        commands = [f"  {command:{width}}  {text}" for command, text in (_TRAINING | _OTHERS).items()]
        print(_HELP.format(first=_FIRST, commands="\n".join(commands)))
    elif name == "export":
        from lit_specrl.cli.export import export_command

        export_command(arguments[1:])
    elif name == "bench":
        from lit_specrl.bench.command import bench_command

        bench_command(arguments[1:])
    elif name == "drafter":
        from lit_specrl.cli.drafter import drafter_command

        drafter_command(arguments[1:])
    elif name in _TRAINING or name.startswith("-"):
        _check_files(arguments)
        from lit_specrl.cli.fit import train

        train(arguments)
    else:
        similar = difflib.get_close_matches(name, _TRAINING | _OTHERS, 1)
        hint = f"did you mean {similar[0]}?" if similar else f"expected one of {', '.join(_TRAINING | _OTHERS)}"
        said = f"there is no command {name!r}; {hint}" if name else f"a command is missing; {hint}"
        raise ConfigurationError(f"{said} Begin with: {_FIRST}" if similar else f"{said}. Begin with: {_FIRST}")


def _check_files(arguments: list[str]) -> None:
    """What can be said before anything is imported: that there is a configuration, and that its files can be read."""
    from lit_specrl.cli.configuration_files import sources

    if len(arguments) == 1 and arguments[0] in _TRAINING:
        raise ConfigurationError(f"{arguments[0]} needs a configuration; begin with: {_FIRST}")
    if arguments[0] in _TRAINING:
        sources(arguments[1:])
