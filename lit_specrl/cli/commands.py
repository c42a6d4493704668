"""Commands beside those of LightningCLI: a function each, whose typed and documented arguments are its options."""

from __future__ import annotations

import difflib
import pkgutil
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse import DefaultHelpFormatter as HelpFormatter

from lit_specrl.cli.messages import ConfigurationError

FIT_ARGUMENTS = "fit_arguments"
"""Name of the argument of a command's function that takes the options of `lit-specrl fit`."""


class _AsWritten(HelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of a description."""


@dataclass(frozen=True)
class Command:
    """A function that the command line calls.

    Args:
        program: what the user types, as in `lit-specrl export`.
        summary: one line for the list of commands.
        function: the function, or its import path: it is imported when it is called, or asked for its options.
        is_positional: arguments without a default are given without their names.
        takes_fit_options: options that are not its own are those of `lit-specrl fit`; the function's `fit_arguments`
            takes them.
    """

    program: str
    summary: str
    function: str | Callable[..., Any]
    is_positional: bool = False
    takes_fit_options: bool = False

    def call(self, arguments: Sequence[str]) -> Any:
        """Call the function with the options of a command line.

        Raises:
            ConfigurationError: an option or a value that the function does not take.
        """
        parser = self.parser()
        own, others = _separated(parser, arguments) if self.takes_fit_options else (list(arguments), [])
        options = parsed(parser, own)
        return self._resolved()(**options, **{FIT_ARGUMENTS: others} if self.takes_fit_options else {})

    def parser(self) -> ArgumentParser:
        """Its own options."""
        function = self._resolved()
        description, _, _ = (function.__doc__ or "").partition("\n\n    Args:")
        of_fit = "Every other option is one of `lit-specrl fit`, and `lit-specrl fit --help` lists them."
        parser = ArgumentParser(
            prog=self.program,
            description=description.replace("\n    ", "\n"),
            epilog=of_fit if self.takes_fit_options else None,
            formatter_class=_AsWritten,
            exit_on_error=False,
            allow_abbrev=False,  # a typo must not be taken for a shorter name
        )
        parser.add_function_arguments(function, as_group=False, as_positional=self.is_positional, skip={FIT_ARGUMENTS})
        return parser

    def _resolved(self) -> Callable[..., Any]:
        if not isinstance(self.function, str):
            return self.function
        function: Callable[..., Any] = pkgutil.resolve_name(self.function)
        return function


def parsed(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of a command without configuration files.

    Args:
        parser: of the command, with `exit_on_error=False`.
        arguments: of the command, without its name.

    Raises:
        ConfigurationError: what the user reads.
    """
    try:
        options: dict[str, Any] = parser.parse_args(list(arguments)).as_dict()
    except ArgumentError as error:
        if missing := _missing(parser, error):
            said = f"{parser.prog} needs {' and '.join(missing)}; `{parser.prog} --help` tells what they are"
            raise ConfigurationError(said) from None
        from lit_specrl.cli.diagnosis import explain

        rest = list(arguments)
        while rest and not rest[0].startswith("-"):
            rest.pop(0)
        raise explain(parser, rest, error) from None
    return options


def _missing(parser: ArgumentParser, error: ArgumentError) -> list[str]:
    """What the parser lacks, as the user would type it."""
    _, _, names = str(error).partition("arguments are required: ")
    options = {action.dest: next(iter(action.option_strings), action.dest) for action in parser._actions}
    return [options.get(name.strip(), name.strip()) for name in names.split(",") if name.strip()]


def overview(usage: str, description: str, commands: Mapping[str, str]) -> str:
    """The help of a program with commands.

    Args:
        usage: how it is called.
        description: what it is for.
        commands: one line for each name.
    """
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {summary}" for name, summary in commands.items()]
    return "\n".join([f"usage: {usage}", "", description, "", "commands:", *lines])


def unknown(name: str, kind: str, names: Sequence[str]) -> str:
    """What is said of a name that is missing, or that is none of the known names.

    Example:
        >>> unknown("fti", "command", ["fit", "export"])
        "there is no command 'fti'; did you mean fit?"
    """
    similar = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {similar[0]}?" if similar else f"expected one of {', '.join(names)}"
    return f"there is no {kind} {name!r}; {hint}" if name else f"a {kind} is missing; {hint}"


def _separated(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The parser's own options, and all others, each with its value."""
    takes_value = {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}
    own: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        name, equals, _ = token.partition("=")
        part = own if name in takes_value else others
        part.append(token)
        if takes_value.get(name) and not equals and rest and not rest[0].startswith("--"):
            part.append(rest.pop(0))
    return own, others
