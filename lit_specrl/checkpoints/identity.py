"""What made the numbers of a reward, or an order of prompts: code and settings, as a text to compare.

Two texts are equal when the code and the settings are, in whatever process they were read. Code is compared as
bytecode: comments, line numbers and formatting do not count, another minor version of Python does. What is said of a
value:

- numbers, strings, paths, patterns, members of an `Enum`, and containers of them: their value;
- functions and classes: name and code, with defaults, closure, and the globals that the code names, and so on from
  there;
- other objects of the user's classes: their class and public attributes;
- functions, classes and objects of installed packages: name and version of the package. A model or a client counts by
  its class.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import cached_property, partial
from numbers import Number
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

MAX_DEPTH = 10
"""Of containers and objects inside each other; what lies deeper does not count."""


def identity_of(made_by: type | FunctionType, settings: dict[str, Any]) -> str:
    """Return the name of a class or function with its settings and a digest of all that stands behind them.

    Example::

        identity_of(ExactReward, {"ignore_case": True})
        # "lit_specrl.rewards.exact.ExactReward(ignore_case=True)#5b1f0c2e9d3a7784"
    """
    description = _Description()
    shown = ", ".join(f"{name}={description.text(value)}" for name, value in sorted(settings.items()))
    description.enqueue(made_by)
    return f"{_path(made_by)}({shown})#{_digest([shown, *sorted(description.parts())])}"


def settings_of(value: object) -> dict[str, Any]:
    """Attributes that are public or hold an argument of the constructor."""
    try:
        arguments = set(inspect.signature(type(value)).parameters)
    except (TypeError, ValueError):  # no signature
        arguments = set()
    attributes = getattr(value, "__dict__", {})
    return {
        name: setting
        for name, setting in attributes.items()
        if not name.startswith("_") or name.removeprefix("_") in arguments
    }


class _Description:
    """Texts of values, and of the functions and classes that they lead to."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # holds the values, so that no id is given twice
        self._waiting: deque[Any] = deque()

    def parts(self) -> Iterator[str]:
        """Describe what waits, and what that leads to."""
        while self._waiting:
            waiting = self._waiting.popleft()
            yield self._class(waiting) if isinstance(waiting, type) else self._function(waiting)

    def enqueue(self, value: Any) -> None:
        if id(value) not in self._seen:
            self._seen[id(value)] = value
            self._waiting.append(value)

    def text(self, value: Any, depth: int = 0) -> str:
        if depth > MAX_DEPTH:
            return "..."
        if isinstance(value, Enum):
            return f"{_path(type(value))}.{value.name}={self.text(value.value, depth + 1)}"
        if isinstance(value, int) and abs(value) >= 2**63:
            return hex(value)  # Python refuses to write very long ones in decimals
        if value is None or value is ... or isinstance(value, Number | str | bytes | range | PurePath):
            return repr(value)
        if type(value).__name__ == "Pattern" and type(value).__module__ == "re":
            return f"re.compile({value.pattern!r}, {value.flags})"
        if isinstance(value, dict):
            return f"{{{', '.join(sorted(self._pairs(value, depth)))}}}"
        if isinstance(value, set | frozenset):
            return f"{{{', '.join(sorted(self.text(item, depth + 1) for item in value))}}}"
        if isinstance(value, list | tuple | deque):
            return f"{type(value).__name__}({', '.join(self.text(item, depth + 1) for item in value)})"
        return self._reference(value, depth)

    def _pairs(self, values: dict[Any, Any], depth: int) -> Iterator[str]:
        return (f"{self.text(key, depth + 1)}: {self.text(value, depth + 1)}" for key, value in values.items())

    def _reference(self, value: Any, depth: int) -> str:
        """Name a function, class, module or object; what is the user's waits to be described."""
        if isinstance(value, MethodType):
            return f"{self.text(value.__func__, depth)} of {self.text(value.__self__, depth + 1)}"
        if isinstance(value, partial):
            arguments = self.text([value.func, value.args, value.keywords], depth + 1)
            return f"partial{arguments}"
        if isinstance(value, staticmethod | classmethod):
            return self.text(value.__func__, depth)
        if isinstance(value, property):
            return self.text([value.fget, value.fset], depth)
        if isinstance(value, cached_property):
            return self.text(value.func, depth)
        if isinstance(value, ModuleType):
            return _with_version(value.__name__)
        wrapped = inspect.getattr_static(value, "__wrapped__", None)
        if wrapped is not None and not isinstance(value, FunctionType | type):  # as by lru_cache
            return f"{_path(type(value))} of {self.text(wrapped, depth + 1)}"
        of_a_package = _is_installed(value if isinstance(value, type | FunctionType) else type(value))
        if isinstance(value, FunctionType):
            if of_a_package:
                return _with_version(_path(value))
            self.enqueue(value)
            return f"{_path(value)}@{_digest(_code(value.__code__))}"
        if isinstance(value, type):
            if of_a_package:
                return _with_version(_path(value))
            self.enqueue(value)
            return _path(value)
        if of_a_package:
            return _with_version(_path(value if inspect.isroutine(value) else type(value)))
        self.enqueue(type(value))
        if id(value) in self._seen:
            return f"another mention of a {_path(type(value))}"
        self._seen[id(value)] = value
        return f"{_path(type(value))}{self.text(settings_of(value), depth + 1)}"

    def _function(self, function: FunctionType) -> str:
        code = function.__code__
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        context = {
            "attributes": vars(function),
            "defaults": [function.__defaults__, function.__kwdefaults__],
            "closure": {name: _content(cell) for name, cell in cells},
            "globals": dict(_named_globals(function)),
        }
        return f"{_path(function)} {_digest(_code(code))} {self.text(context)}"

    def _class(self, described: type) -> str:
        members: dict[str, Any] = {}
        for base in reversed(described.__mro__):
            if base is described or not _is_installed(base):
                members |= {
                    name: member
                    for name, member in vars(base).items()
                    if not name.startswith("__") or isinstance(member, FunctionType | staticmethod | classmethod)
                }
        members.pop("_abc_impl", None)
        bases = [_with_version(_path(base)) for base in described.__mro__]
        return f"{_path(described)} {bases} {self.text(members)}"


def _named_globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Globals that the code of a function reads, also as attributes of the user's modules; what it assigns is no
    setting."""
    codes = list(_nested(function.__code__))
    assigned = {step.argval for code in codes for step in dis.get_instructions(code) if step.opname == "STORE_GLOBAL"}
    names = sorted({name for code in codes for name in code.co_names} - assigned)
    for name in names:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name, value
        if isinstance(value, ModuleType) and not _is_installed(value):
            yield from ((f"{name}.{member}", vars(value)[member]) for member in names if member in vars(value))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _code(code: CodeType) -> Iterator[str]:
    """What a code object does, without where it stands."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags))
    yield repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_exceptiontable))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield _Description().text(constant)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return "nothing yet"


def _path(named: Any) -> str:
    return f"{getattr(named, '__module__', None)}.{getattr(named, '__qualname__', type(named).__qualname__)}"


def _with_version(path: str) -> str:
    version = getattr(sys.modules.get(path.partition(".")[0]), "__version__", None)
    return f"{path} {version}" if isinstance(version, str) else path


_PACKAGE_FOLDERS = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}


def _is_installed(value: Any) -> bool:
    """Whether a function, class or module belongs to Python or a package; this library counts as the user's code."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
    if name.partition(".")[0] == __name__.partition(".")[0]:
        return False
    module = sys.modules.get(name)
    if getattr(getattr(module, "__spec__", None), "origin", None) in ("built-in", "frozen"):
        return True
    file = Path(getattr(module, "__file__", None) or "").resolve()
    return "dist-packages" in file.parts or any(file.is_relative_to(folder) for folder in _PACKAGE_FOLDERS)


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode(errors="backslashreplace") + b"\0")
    return digest.hexdigest()[:16]
