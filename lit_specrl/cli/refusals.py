"""What is wrong when a class of the configuration refuses its arguments: its own words, and the key that they are
about."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace

from lit_specrl.cli.messages import ConfigurationError, sentence


@dataclass
class Failure:
    """An object of the configuration that could not be made."""

    kind: Any
    arguments: dict[str, Any]
    error: Exception


def explain_failure(failures: Sequence[Failure], settings: Namespace, error: Exception) -> ConfigurationError:
    """What the user reads when a class refuses its arguments.

    Args:
        failures: objects that could not be made, in order.
        settings: the parsed configuration.
        error: what came out of the parser or the trainer.
    """
    failure = next((one for one in reversed(failures) if one.error is error or _module(error) == "jsonargparse"), None)
    cause: BaseException = failure.error if failure else error
    while failure is None and cause.__cause__ is not None and _module(cause) == "jsonargparse":
        cause = cause.__cause__
    text, specs = sentence(cause), dict(_specs(settings.as_dict(), ""))
    places: dict[str, Any] = {key: specs[key] for key in ("model", "data") if key in specs}
    places["trainer"] = settings.as_dict().get("trainer") or {}
    if failure:
        places = {key: spec for key, spec in specs.items() if pkgutil.resolve_name(spec["class_path"]) is failure.kind}
    if isinstance(cause, TypeError) and "NoneType" in text:
        for key, spec in specs.items():
            for name in _nulls(pkgutil.resolve_name(spec["class_path"]), spec.get("init_args", {})):
                return ConfigurationError(
                    f"{name} must not be null; leave it out to take the default", f"{key}.init_args.{name}"
                )
    for key, spec in places.items():
        arguments = spec.get("init_args", {}) if "class_path" in spec else spec
        named = [
            name for name, value in arguments.items() if re.search(rf"\b{name}\b", text) or _is_quoted(value, text)
        ]
        if named:
            return ConfigurationError(text, ".".join([key, *(["init_args"] if "class_path" in spec else []), named[0]]))
    return ConfigurationError(text, next(iter(places)) if failure and places else "")


def _nulls(kind: Any, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Arguments that are null and have another default."""
    parameters: dict[str, Any] = {}
    for base in reversed(getattr(kind, "__mro__", ())):
        parameters |= inspect.signature(base.__init__).parameters if "__init__" in vars(base) else {}
    for name, value in arguments.items():
        if value is None and name in parameters and parameters[name].default is not None:
            yield name


def _is_quoted(value: Any, text: str) -> bool:
    """Whether a message names a value that is a path, or a list with one."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and len(item) > 3 and repr(item) in text for item in values)


def _module(error: BaseException) -> str:
    """The package that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] if trace else ""


def _specs(value: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object that a configuration describes, with its dotted path."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _specs(item, f"{key}[{index}]")
    elif isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield key, value
        for name, item in value.items():
            yield from _specs(item, f"{key}.{name}" if key else name)
