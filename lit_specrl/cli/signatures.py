"""What the command line takes, as `signatures.json` records it: help and mistakes need not wait for torch.

`python -m lit_specrl.cli.record_signatures` writes the file. Where the installed packages, or the constructors of this
library, are not those that were recorded, nothing is said from it.
"""

from __future__ import annotations

import abc
import ast
import collections.abc
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

from lit_specrl.cli.diagnosis import Level
from lit_specrl.cli.value_types import Unimported, Unknown, union

PACKAGE = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("signatures.json")
RECORDED_PACKAGES = ("jsonargparse", "lightning", "torch")
_PLAIN = {"int": int, "float": float, "bool": bool, "str": str, "null": type(None), "path": Path, "any": Any}


class _Function(Unimported):
    """Stands for any function."""

    @classmethod
    def resolve(cls, class_path: str) -> type[Unimported] | None:
        return None


class Signatures:
    """Levels and classes of a record; a class is represented by an `Unimported` with its name, bases and arguments.

    Args:
        record: content of `signatures.json`, by default that of this version.
    """

    def __init__(self, record: Mapping[str, Any] | None = None) -> None:
        self._record: Mapping[str, Any] = record or json.loads(RECORD.read_text("utf-8"))
        self._classes: dict[str, type[Unimported]] = {}
        for path in self._record["classes"]:
            self._represent(path)

    @cached_property
    def are_current(self) -> bool:
        """Whether what is installed is what was recorded."""
        if installed_versions() != self._record["versions"]:
            return False
        files = self._record["files"]
        return {name: digest(PACKAGE / name) for name in files if (PACKAGE / name).is_file()} == files

    def command(self, name: str) -> Level:
        """What `fit`, or one of its siblings, takes."""
        return self._level(self._record["commands"][name])

    def named(self, class_path: str) -> type[Unimported] | None:
        """The class of this name, or of this path in whichever module of its package."""
        for path, kind in self._classes.items():
            if path.rpartition(".")[2] == class_path.rpartition(".")[2] and (
                "." not in class_path or path.partition(".")[0] == class_path.partition(".")[0]
            ):
                return kind
        return None

    def _represent(self, path: str) -> type[Unimported]:
        if path not in self._classes:
            entry = self._record["classes"][path]
            bases = tuple(self._represent(base) for base in entry["bases"]) or (Unimported,)
            module, _, name = path.rpartition(".")
            content = {
                "__module__": module,
                "__doc__": None,
                "entry": entry,
                "arguments": classmethod(lambda cls, num_given: self._arguments(cls.entry["level"], num_given)),
                "resolve": classmethod(lambda cls, class_path: self.named(class_path)),
                "make": abc.abstractmethod(lambda self: None) if entry["abstract"] else None,
            }
            self._classes[path] = cast(type[Unimported], abc.ABCMeta(name, bases, content))
        return self._classes[path]

    def _arguments(self, entry: Mapping[str, Any] | None, num_given: int) -> Level:
        return Level.of_class(Unknown) if entry is None else self._level(entry, num_given)

    def _level(self, entry: Mapping[str, Any], num_given: int = 0) -> Level:
        names = {
            name: self._level(hint["level"]) if isinstance(hint, dict) and "level" in hint else self._hint(hint)
            for name, hint in list(entry["names"].items())[num_given:]
        }
        required = [name for name in entry["required"] if name.partition(".")[0] in names]
        return Level(names, required, defaults=entry["defaults"])

    def _hint(self, entry: Any) -> Any:
        """A type; `None` where nothing is known of it."""
        if entry is None or isinstance(entry, str):
            return entry and _PLAIN[entry]
        [(kind, parts)] = entry.items()
        if kind == "class":
            return self._classes[parts]
        if kind == "literal":
            return Literal[tuple(parts)]
        if kind == "callable":
            returned = self._hint(parts[1])
            if returned:
                return collections.abc.Callable[[Any] * parts[0], returned]
            return Unknown if parts[0] else _Function
        hints = [self._hint(part) for part in parts]
        if kind == "union":
            return union(hints)
        if kind == "list":
            return list[hints[0]] if hints else list  # type: ignore[valid-type]
        return dict[hints[0], hints[1]] if hints else dict  # type: ignore[valid-type]


def installed_versions() -> dict[str, str]:
    """Of the packages whose arguments are recorded, without the device that a build is for."""
    return {name: metadata.version(name).partition("+")[0] for name in RECORDED_PACKAGES}


def digest(file: Path) -> str:
    """Of all that decides what the classes of a file take: bases, fields, signatures of constructors and constants."""
    seen = hashlib.sha256()
    for part in _deciding(ast.parse(file.read_text("utf-8")).body):
        seen.update(part.encode())
    return seen.hexdigest()[:16]


def _deciding(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield f"class {node.name} {[ast.unparse(base) for base in node.bases]}"
            yield from _deciding(node.body)
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            yield ast.unparse(node.args)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield ast.unparse(node)


def is_foreign(class_path: str) -> bool:
    """Whether a class comes from outside of what is recorded."""
    return class_path.partition(".")[0] not in ("lit_specrl", "lightning", "torch")
