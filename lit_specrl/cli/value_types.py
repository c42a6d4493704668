"""The types of a configuration's values: which classes a type takes, whether a value fits, and how a user would say
it."""

from __future__ import annotations

import abc
import collections.abc
import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

_TYPO = 0.85  # similarity of a name that is taken for a misspelt one where there may be others
MAX_LISTED = 12  # names that are listed where none is similar
LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
MAPPINGS = (dict, collections.abc.Mapping)
_TENSOR = "<class 'torch.Tensor'>"  # by its name: mistakes are told before torch is imported
_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
    Any: "any value",
}


class Unimported(abc.ABC):
    """A class that stands for one that is not imported."""

    entry: Mapping[str, Any]

    @classmethod
    def arguments(cls, num_given: int) -> Any:
        """What its constructor takes.

        Args:
            num_given: positional arguments that the library gives.
        """
        raise NotImplementedError

    @classmethod
    def resolve(cls, class_path: str) -> type[Unimported] | None:
        """Another class of the same record."""
        raise NotImplementedError


class Unknown(Unimported):
    """Stands for a class of which nothing is known."""


def members_of(hint: Any) -> Iterator[Any]:
    """The types that a type is a union of."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from members_of(part)
    else:
        yield hint


def union(hints: list[Any]) -> Any:
    return typing.Union[tuple(hints)] if hints else None  # noqa: UP007


def classes_of(hint: Any) -> Iterator[tuple[Any, int]]:
    """The class whose objects a type takes, with the number of arguments that the library gives to its constructor."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is collections.abc.Callable and len(parts) == 2 and isinstance(parts[0], list):
        for member in members_of(parts[1]):
            yield from ((kind, len(parts[0])) for kind, _ in classes_of(member))
    elif isinstance(hint, type) and origin is None and hint not in _PLAIN and str(hint) != _TENSOR:
        yield from [] if hint.__module__ in ("builtins", "pathlib", "datetime", "collections.abc") else [(hint, 0)]


def resolve_class(class_path: str, kinds: list[tuple[Any, int]]) -> tuple[Any, int] | str:
    """The class of this name, or why there is none."""
    found: Any = None
    if any(issubclass(kind, Unknown) for kind, _ in kinds):
        return Unknown, 0
    if unimported := next((kind for kind, _ in kinds if issubclass(kind, Unimported)), None):
        found = unimported.resolve(class_path)
        if "." in class_path and (found is None or not any(issubclass(found, kind) for kind, _ in kinds)):
            return Unknown, 0
        found = found if "." in class_path else None
    elif "." in class_path:
        module_name, _, name = class_path.rpartition(".")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            return f"there is no class {class_path}: {error}; install its package, or write its file into the working folder"
        found = getattr(module, name, None)
        if found is None:
            similar = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], 1, 0.5)
            hint = f"; did you mean {module_name}.{similar[0]}?" if similar else ""
            return f"there is no class {class_path}: module {module_name} has no {name}{hint}"
    for kind, given in kinds:
        if found is None:
            named = {sub.__name__: sub for sub in subclasses(kind)}
            if class_path in named:
                return named[class_path], given
        elif (inspect.isclass(found) and issubclass(found, kind)) or (not inspect.isclass(found) and callable(found)):
            return found, given
    if found is not None:
        return f"{class_path} is not one of {class_names(kinds)}"
    names = sorted({sub.__name__ for kind, _ in kinds for sub in subclasses(kind)})
    similar = difflib.get_close_matches(class_path, names, 1, 0.6)
    is_foreign = unimported and any(not kind.__module__.startswith("lit_specrl.") for kind, _ in kinds)
    if is_foreign and not difflib.get_close_matches(class_path, names, 1, _TYPO):
        return Unknown, 0  # packages may have imported further ones
    return f"there is no class {class_path}; " + (
        f"did you mean {similar[0]}?" if similar else f"there are {class_names(kinds)}"
    )


def subclasses(kind: Any) -> list[Any]:
    """A class and all below it that objects can be made of, as far as they are imported."""
    below = (
        [sub for direct in kind.__subclasses__() for sub in subclasses(direct)]
        if hasattr(kind, "__subclasses__")
        else []
    )
    return [*([] if inspect.isabstract(kind) else [kind]), *below]


def class_names(kinds: list[tuple[Any, int]], most: int = MAX_LISTED) -> str:
    names = list(
        dict.fromkeys(sub.__name__ for kind, _ in kinds for sub in subclasses(kind) if not sub.__name__.startswith("_"))
    )
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _is_unimported(hint: Any) -> bool:
    """Whether a type is about classes that are not imported."""
    parts = [part for given in typing.get_args(hint) for part in (given if isinstance(given, list) else [given])]
    is_class = isinstance(hint, type) and typing.get_origin(hint) is None
    return (is_class and issubclass(hint, Unimported)) or any(map(_is_unimported, parts))


def fits(hint: Any, value: Any) -> bool:
    """Whether the parser takes a value of this type."""
    if _is_unimported(hint):
        hint = union([part for part in members_of(hint) if not _is_unimported(part)])
        if hint is None:
            return False
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
        parser.parse_object({"value": value})
    except (ArgumentError, TypeError, KeyError):
        return False
    except ValueError:  # a type that the parser does not know alone
        return True
    return True


def in_words(hint: Any) -> str:
    """A type as a user would say it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        words = list(dict.fromkeys(in_words(part) for part in parts if str(part) != _TENSOR))
        return " or ".join(words)
    if origin in LISTS:
        return f"a list (of {in_words(parts[0])})" if parts else "a list"
    if origin in MAPPINGS or hint is dict:
        return "a mapping"
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        kinds = list(classes_of(hint))
        return f"a class_path such as {class_names(kinds[:1], 5)}" if kinds else "the import path of a function"
    if isinstance(hint, type):
        return f"a class_path such as {class_names([(hint, 0)], 5)}" if subclasses(hint) else f"a {hint.__name__}"
    return str(hint).replace("typing.", "")
