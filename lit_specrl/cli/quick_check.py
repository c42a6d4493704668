"""Mistakes of a command line that are told before torch is imported, which takes ten seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lit_specrl.cli.configuration_files import COMMAND_LINE, Source
from lit_specrl.cli.diagnosis import first_problem
from lit_specrl.cli.signatures import Signatures, is_foreign

_ASKS = ("print_config", "help", "h")  # options that are questions


def check_quickly(command: str, settings: Sequence[Source], signatures: Signatures | None = None) -> None:
    """Refuse settings that the parser would refuse, as far as the record of its classes tells; the parser itself
    decides about all others.

    Args:
        command: `fit` or one of its siblings.
        settings: files and options, in the order in which they count.
        signatures: record of what the classes take, by default that of this version.

    Raises:
        ConfigurationError: the first setting that does not fit.
    """
    if any(source.origin == COMMAND_LINE and _is_question(source.settings) for source in settings):
        return
    signatures = signatures or Signatures()
    problem = first_problem(signatures.command(command), settings, "lit-specrl")
    if problem is None or not signatures.are_current:
        return
    is_of_a_class = "there is no class" in str(problem)
    if is_of_a_class and any(is_foreign(path) for source in settings for path in _class_paths(source.settings)):
        return  # a module of the user's may define the class
    raise problem


def _is_question(settings: dict[str, Any]) -> bool:
    while isinstance(settings, dict) and len(settings) == 1:
        [(name, settings)] = settings.items()
        if name in _ASKS:
            return True
    return False


def _class_paths(settings: Any) -> Iterator[str]:
    """Every text that may name a class."""
    if isinstance(settings, dict):
        for value in settings.values():
            yield from _class_paths(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _class_paths(value)
    elif isinstance(settings, str) and "." in settings and all(part.isidentifier() for part in settings.split(".")):
        yield settings
