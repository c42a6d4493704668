"""Settings from configuration files and options, as they are written."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_specrl.cli.messages import ConfigurationError

COMMAND_LINE = "the command line"


@dataclass
class Source:
    """Settings from one place."""

    origin: str
    settings: dict[str, Any]
    as_text: dict[str, Any] | None = None
    """Of an option: the same with the value as it was typed, `123` for a text that reads like a number; `None` where
    the value describes an object."""


def sources(arguments: Sequence[str], takes_positional: bool = False) -> list[Source]:
    """Configuration files and options, in the order in which they count.

    Args:
        arguments: of a command.
        takes_positional: leave out what is no option.

    Raises:
        ConfigurationError: a file that cannot be read, or an argument that is no option.
    """
    found: list[Source] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            if takes_positional:
                continue
            is_file = token.endswith((".yaml", ".yml", ".json"))
            hint = f"did you mean --config {token}?" if is_file else "options look like --trainer.max_epochs=3"
            raise ConfigurationError(f"unexpected argument {token!r}; {hint}", COMMAND_LINE)
        name, equals, value = token.partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals:
            value = ""
        if name in ("--config", "-c"):
            if not value:
                raise ConfigurationError("--config needs a file, as in --config recipes/quickstart.yaml", COMMAND_LINE)
            found.append(Source(value, read_configuration(value)))
            continue
        settings: Any = _loaded(value)
        as_text: Any = value
        is_object = isinstance(settings, dict) and "class_path" in settings
        for part in reversed(name.lstrip("-").split(".")):
            settings, as_text = {part: settings}, {part: as_text}
        found.append(Source(COMMAND_LINE, settings, None if is_object else as_text))
    return found


def read_configuration(file: str) -> dict[str, Any]:
    """The settings of a configuration file.

    Raises:
        ConfigurationError: the file is missing, or holds something else.
    """
    path = Path(file)
    if not path.exists():
        similar = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1, 0.75)
        hint = f"did you mean {path.parent / similar[0]}?" if similar else f"looked in {path.absolute().parent}"
        raise ConfigurationError(f"there is no configuration file {file}; {hint}", "--config")
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(filter(None, [error.context, error.problem]))
        raise ConfigurationError(
            f"{file} is not YAML: {problem}; check indentation, colons and quotes", f"{file}{place}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} is not a text file with YAML: {error}".splitlines()[0], file) from error
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {(error.strerror or '').lower()}", file) from error
    if settings is None:
        raise ConfigurationError(
            f"{file} is empty; a configuration has the keys model, data and trainer, see recipes/quickstart.yaml", file
        )
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"{file} must be a mapping with the keys model, data and trainer, got {in_short(settings)}; see "
            "recipes/quickstart.yaml",
            file,
        )
    return settings


def overwritten(given: Sequence[Source]) -> list[str]:
    """A line for each single value that a later file has taken the place of.

    Callbacks add up, and an option of the command line is the user's own wish: neither is told. A class that is named
    anew begins with its own arguments.

    Example:
        >>> given = [Source("mine.yaml", {"data": {"batch_size": 32}}), Source("cpu.yaml", {"data": {"batch_size": 8}})]
        >>> overwritten(given)
        ['data.batch_size: 8 of cpu.yaml takes the place of 32 of mine.yaml']
    """
    values: dict[str, tuple[Any, str]] = {}
    lines: dict[str, str] = {}
    for source in given:
        for key, value in _single_values(source.settings, ""):
            plain = key.removesuffix(".class_path")  # what was null or false may now be an object
            old, origin = values.get(key) or values.pop(plain, (value, ""))
            values[key] = (value, source.origin)
            if source.origin == COMMAND_LINE:
                lines.pop(key, None)
            elif old != value:
                lines[key] = f"{key}: {_shown(value)} of {source.origin} takes the place of {_shown(old)} of {origin}"
    return list(lines.values())


def _single_values(settings: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Numbers, texts and the like by their dotted keys, without the levels `init_args`."""
    if key == "trainer.callbacks":
        return
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _single_values(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif not isinstance(settings, list) and not key.endswith("+"):
        yield key, settings


def _shown(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"} if value is None or isinstance(value, bool) else {}
    return words.get(value, str(value))


def in_short(value: Any) -> str:
    kinds = {
        dict: "a mapping",
        list: "a list",
        str: "the text",
        bool: "",
        int: "the number",
        float: "the number",
        type(None): "",
    }
    text = (
        {None: "null", True: "true", False: "false"}.get(value)
        if isinstance(value, (bool, type(None)))
        else repr(value)
    )
    text = text if text is not None else repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{kinds.get(type(value), type(value).__name__)} {text}".strip()


def _loaded(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
