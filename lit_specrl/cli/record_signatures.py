"""Write `signatures.json`, which the command line answers from without imports.

    python -m lit_specrl.cli.record_signatures

A test compares the file with what this module would write.
"""

from __future__ import annotations

import collections.abc
import inspect
import json
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lit_specrl.cli import fit
from lit_specrl.cli.diagnosis import Level
from lit_specrl.cli.signatures import PACKAGE, RECORD, digest, installed_versions
from lit_specrl.cli.value_types import LISTS, MAPPINGS, subclasses

_PLAIN = {int: "int", float: "float", bool: "bool", str: "str", type(None): "null", pathlib.Path: "path", Any: "any"}
_RECORDED = ("lit_specrl.", "torch.optim.", "lightning.pytorch.callbacks.", "lightning.pytorch.loggers.")
_NAMED = ("lit_specrl", "torch", "lightning")
"""Packages whose other classes are known by their names alone."""
_COMMANDS = ("fit", "validate", "test", "predict")


def record() -> dict[str, Any]:
    """What the command line takes as the packages are installed."""
    recorder = _Recorder()
    commands = {name: recorder.level(Level.of_parser(parser)) for name, parser in _parsers().items()}
    recorder.link()
    classes = {path: recorder.classes[path] for path in sorted(recorder.classes)}
    files = {name: digest(PACKAGE / name) for name in sorted(recorder.files)}
    return {"versions": installed_versions(), "files": files, "commands": commands, "classes": classes}


class _Recorder:
    """Notes every class that it meets in a type, with all classes below it."""

    def __init__(self) -> None:
        self.classes: dict[str, dict[str, Any]] = {}
        self._kinds: dict[str, type] = {}
        self.files: set[str] = set()

    def link(self) -> None:
        """Note the bases that every class has among the others."""
        for path, kind in self._kinds.items():
            self.classes[path]["bases"] = list(dict.fromkeys(self._bases(kind)))

    def _bases(self, kind: type) -> Iterator[str]:
        for base in kind.__bases__:
            if _path(base) in self.classes:
                yield _path(base)
            else:
                yield from self._bases(base)

    def level(self, level: Level) -> dict[str, Any]:
        names = {
            name: {"level": self.level(hint)} if isinstance(hint, Level) else self.hint(hint)
            for name, hint in level.names.items()
        }
        defaults = {name: default for name, default in level.defaults.items() if _is_plain(default)}
        return {"names": names, "required": level.required, "defaults": defaults}

    def hint(self, hint: Any) -> Any:
        """JSON for a type; `None` for one that is not looked into."""
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if isinstance(hint, collections.abc.Hashable) and hint in _PLAIN:
            return _PLAIN[hint]
        if origin is typing.Literal:
            return {"literal": list(parts)}
        if origin in (typing.Union, types.UnionType):
            return self._of("union", parts)
        if origin in (list, *LISTS[2:]):
            return self._of("list", parts)
        if origin in MAPPINGS or hint is dict:
            return self._of("mapping", parts)
        if origin is collections.abc.Callable:
            returns_object = len(parts) == 2 and isinstance(parts[0], list)
            return {"callable": [len(parts[0]), self.hint(parts[1])] if returns_object else [0, None]}
        return self._class(hint) if isinstance(hint, type) and origin is None else None

    def _of(self, kind: str, parts: tuple[Any, ...]) -> Any:
        hints = [self.hint(part) for part in parts]
        return None if None in hints else {kind: hints}

    def _class(self, kind: type) -> Any:
        """A base class of another package counts where something below it is recorded."""
        if not isinstance(kind, type) or kind.__module__ == "builtins":
            return None
        if not _is_recorded(kind) and not (_is_named(kind) and any(map(_is_recorded, subclasses(kind)))):
            return None
        for one in [kind, *_all_below(kind)]:
            self._note(one)
        return {"class": _path(kind)}

    def _note(self, kind: type) -> None:
        path = _path(kind)
        if path in self.classes or not _is_named(kind):
            return
        self._kinds[path] = kind
        self.classes[path] = entry = {"bases": [], "abstract": inspect.isabstract(kind)}
        entry["level"] = None if not _is_recorded(kind) or _is_open(kind) else self.level(Level.of_class(kind))
        for base in filter(_is_recorded, kind.__bases__):
            self._note(base)
        for one in kind.__mro__:
            if one.__module__.startswith("lit_specrl."):
                self.files.add(str(pathlib.Path(inspect.getfile(one)).relative_to(PACKAGE)))


def _all_below(kind: type) -> Iterator[type]:
    """Abstract ones, too."""
    below: list[type] = type.__subclasses__(kind)
    for one in below:
        yield one
        yield from _all_below(one)


def _is_named(kind: type) -> bool:
    """Whether the parser finds the class by its short name."""
    return kind.__module__.partition(".")[0] in _NAMED and "._" not in _path(kind) and "<locals>" not in _path(kind)


def _is_recorded(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(_RECORDED) and not kind.__name__.startswith("_")


def _is_open(kind: type) -> bool:
    """Whether a class of another package hands further arguments on, to what may not be installed."""
    if kind.__module__.startswith("lit_specrl."):
        return False
    kinds = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in kinds)


def _is_plain(value: Any) -> bool:
    """Whether JSON has the same value."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _ParsersMade(Exception):
    """Ends the command line when its parsers are there."""


def _parsers() -> dict[str, LightningArgumentParser]:
    made: dict[str, LightningArgumentParser] = {}

    class CLI(fit.LitSpecRLCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            made.update(self._subcommand_parsers)
            raise _ParsersMade

    train: Callable[..., Any] = fit.train
    original, fit.LitSpecRLCLI = fit.LitSpecRLCLI, CLI  # type: ignore[misc]
    try:
        train(["fit"])
    except _ParsersMade:
        pass
    finally:
        fit.LitSpecRLCLI = original  # type: ignore[misc]
    return {name: made[name] for name in _COMMANDS}


def _in_lines(content: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each class, so that a change is seen."""
    parts = []
    for title, entries in content.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        parts.append(f" {json.dumps(title)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else RECORD
    target.write_text(_in_lines(record()), "utf-8")
    print(f"{target} written")
