"""What is wrong with a configuration that the parser refuses: the first key that does not fit, in the user's words.

The parser tells of every type that a value could have had; here each value is looked at alone, along the signatures of its classes.
"""

from __future__ import annotations

import collections.abc
import difflib
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lit_specrl.cli.configuration_files import COMMAND_LINE, in_short, sources
from lit_specrl.cli.messages import ConfigurationError, sentence

_OTHERS = 12  # names that are listed where none is similar
_SPEC = ("class_path", "init_args", "dict_kwargs")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


@dataclass
class Level:
    """What can be set at one level: names, with the type or the further level behind each."""

    names: dict[str, Any] = field(default_factory=dict)
    required: list[str] = field(default_factory=list)
    inner: dict[str, Level] = field(default_factory=dict)
    """Arguments of the classes that are named so far."""

    @classmethod
    def of_parser(cls, parser: ArgumentParser) -> Level:
        level = cls()
        for action in parser._actions:
            if action.dest.rpartition(".")[2] in ("help", "print_config", "subcommand"):
                continue
            inner, (*path, name) = level, action.dest.split(".")
            for part in path:
                if not isinstance(inner.names.get(part), Level):
                    inner.names[part] = Level()
                inner = inner.names[part]
            if isinstance(inner.names.get(name), Level):
                continue
            inner.names[name] = getattr(action, "_typehint", None)
        required = {action.dest for action in parser._actions if action.required} | set(parser._extra_required_keys)
        level.required = sorted(required - {"config", "subcommand"})
        return level

    @classmethod
    def of_class(cls, kind: Any, num_given: int = 0) -> Level:
        """Arguments of a class, or of a function that returns one.

        Args:
            kind: the class.
            num_given: positional arguments that the library gives.
        """
        parser = ArgumentParser(exit_on_error=False)
        options: dict[str, Any] = {
            "fail_untyped": False,
            "sub_configs": True,
            "skip": {num_given} if num_given else set(),
        }
        (parser.add_class_arguments if inspect.isclass(kind) else parser.add_function_arguments)(kind, **options)
        return cls.of_parser(parser)


def explain(parser: ArgumentParser, arguments: Sequence[str], error: ArgumentError) -> ConfigurationError:
    """What the user reads.

    Args:
        parser: of the command.
        arguments: of the command, without its name.
        error: what the parser raised.
    """
    level = Level.of_parser(parser)
    title = "the configuration" if "config" in level.names else parser.prog
    merged: dict[str, Any] = {}
    try:
        for source in sources(arguments):
            for problem in _in_level(level, source.settings, merged, "", title):
                where = f"{problem.key}, {source.origin}" if problem.key else source.origin
                return ConfigurationError(problem.sentence, where)
            _merge(merged, source.settings)
            level.inner = _inner(level, merged)
        for problem in _missing(level, merged) if "config" in level.names else ():
            return ConfigurationError(problem.sentence, ", ".join(s.origin for s in sources(arguments)) or COMMAND_LINE)
    except ConfigurationError as found:
        return found
    return ConfigurationError(_condensed(str(error)))


# ------------------------------------------------------------------------------------------------------------ the walk


def parsed(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The options of a command that has no configuration.

    Args:
        parser: of the command, with `exit_on_error=False`.
        arguments: of the command, without its name.

    Raises:
        ConfigurationError: what the user reads.
    """
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        rest = list(arguments)
        while rest and not rest[0].startswith("-"):
            rest.pop(0)
        raise explain(parser, rest, error) from error


@dataclass
class _Problem:
    sentence: str
    key: str


def _in_level(level: Level, settings: Mapping[Any, Any], before: Any, key: str, title: str = "") -> Iterator[_Problem]:
    """What does not fit at a level.

    Args:
        level: what can be set.
        settings: what is set.
        before: what earlier files and options have set there.
        key: dotted path of the level.
        title: what the level belongs to, for the message.
    """
    before = before if isinstance(before, Mapping) else {}
    for written, value in settings.items():
        name = str(written).removesuffix("+")
        path = f"{key}.{name}" if key else name
        if name not in level.names:
            yield _Problem(_unknown(name, title or key or "the configuration", level), path)
        elif isinstance(level.names[name], Level):
            if isinstance(value, Mapping):
                yield from _in_level(level.names[name], value, before.get(name), path)
            elif not isinstance(value, str) and value is not None:
                yield _Problem(f"{name} must be a mapping, got {in_short(value)}", path)
        else:
            yield from _in_value(level.names[name], value, before.get(name), path, str(written).endswith("+"))


def _in_value(hint: Any, value: Any, before: Any, key: str, is_added: bool = False) -> Iterator[_Problem]:
    """What does not fit in a value of this type.

    Args:
        hint: the type.
        value: what is set.
        before: what earlier files and options have set.
        key: dotted path of the value.
        is_added: it is an item, or several, to be added to a list.
    """
    if hint is None or hint is inspect.Parameter.empty:
        return
    members = list(_members(hint))
    kinds = [kind for member in members for kind in _classes(member)]
    of_items = [
        typing.get_args(member)[0]
        for member in members
        if typing.get_origin(member) in _LISTS and typing.get_args(member)
    ]
    of_values = [typing.get_args(member)[1] for member in members if typing.get_origin(member) in _MAPPINGS]
    if (isinstance(value, list) and of_items) or is_added:
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            yield from _in_value(_union(of_items), item, None, f"{key}[{index}]")
    elif isinstance(value, Mapping) and kinds and (set(value) & set(_SPEC) or not of_values):
        yield from _in_spec(kinds, value, before, key)
    elif isinstance(value, Mapping) and isinstance(before, (list, Mapping, str)) and not of_values:
        yield from _in_spec(
            [kind for member in of_items for part in _members(member) for kind in _classes(part)], value, before, key
        )
    elif isinstance(value, Mapping) and of_values:
        for name, item in value.items():
            yield from _in_value(_union(of_values), item, None, f"{key}.{name}")
    elif not _fits(hint, value):
        if isinstance(value, str) and kinds and _NAME.fullmatch(value) and not {int, float} & set(members):
            yield from _in_spec(kinds, {"class_path": value}, None, key)
        else:
            yield _Problem(f"{key.rpartition('.')[2]} must be {_in_words(hint)}, got {in_short(value)}", key)


def _members(hint: Any) -> Iterator[Any]:
    """The types that a type is a union of."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _members(part)
    else:
        yield hint


def _union(hints: list[Any]) -> Any:
    return typing.Union[tuple(hints)] if hints else None  # noqa: UP007


def _in_spec(kinds: list[tuple[Any, int]], spec: Mapping[str, Any], before: Any, key: str) -> Iterator[_Problem]:
    """What does not fit in the description of an object."""
    if isinstance(before, list):
        before = before[-1] if before else None
    before = {"class_path": before} if isinstance(before, str) else before if isinstance(before, Mapping) else {}
    class_path = spec.get("class_path", before.get("class_path"))
    if class_path is None:
        named = [(kind, given) for kind, given in kinds if not inspect.isabstract(kind)]
        if len(named) != 1:
            yield _Problem(f"{key.rpartition('.')[2]} needs a class_path: {_among(kinds)}", key)
            return
        kind, num_given = named[0]
    elif not isinstance(class_path, str):
        yield _Problem(f"class_path must be the name of a class, got {in_short(class_path)}", f"{key}.class_path")
        return
    else:
        resolved = _resolved(class_path, kinds)
        if isinstance(resolved, str):
            yield _Problem(resolved, f"{key}.class_path" if "class_path" in spec and isinstance(spec, dict) else key)
            return
        kind, num_given = resolved
    level = Level.of_class(kind, num_given)
    title = getattr(kind, "__name__", str(kind))
    if set(spec) & set(_SPEC):
        for name in spec:
            if name not in _SPEC:
                hint = (
                    f"{name} belongs under init_args"
                    if name in level.names
                    else f"beside class_path there is only init_args, with the arguments of {title}"
                )
                yield _Problem(f"{key} has no {name}: {hint}", f"{key}.{name}")
        arguments = spec.get("init_args") or {}
        if not isinstance(arguments, Mapping):
            yield _Problem(f"init_args must be a mapping, got {in_short(arguments)}", f"{key}.init_args")
            return
        yield from _in_level(level, arguments, before.get("init_args"), f"{key}.init_args", title)
    else:
        yield from _in_level(level, spec, before.get("init_args"), key, title)
    if "class_path" in spec and set(spec) >= {"class_path"} and before.get("class_path") is None:
        given = set(spec.get("init_args") or {})
        missing = [name for name in level.required if name.partition(".")[0] not in given]
        if missing and key.count("."):  # of the model itself later files may give the rest
            yield _Problem(f"{title} needs {' and '.join(missing)}", f"{key}.init_args")


def _inner(level: Level, settings: Mapping[str, Any]) -> dict[str, Level]:
    found: dict[str, Level] = {}
    for name in ("model", "data"):
        spec = _spec(settings.get(name))
        if isinstance(spec.get("class_path"), str) and name in level.names:
            kinds = [kind for member in _members(level.names[name]) for kind in _classes(member)]
            resolved = _resolved(spec["class_path"], kinds)
            if not isinstance(resolved, str):
                found[name] = Level.of_class(*resolved)
    return found


def _spec(value: Any) -> Mapping[str, Any]:
    """The description of an object; a text is its class."""
    return value if isinstance(value, Mapping) else {"class_path": value}


def _missing(level: Level, settings: Mapping[str, Any]) -> Iterator[_Problem]:
    """What must be set and is not."""
    for name in level.required:
        if settings.get(name.partition(".")[0]) is None:
            yield _Problem(f"the configuration has no {name}; see recipes/quickstart.yaml for a complete one", name)
            return
    for name, inner in _inner(level, settings).items():
        spec = _spec(settings[name])
        absent = [argument for argument in inner.required if argument not in (spec.get("init_args") or {})]
        if absent:
            kind = spec["class_path"].rpartition(".")[2]
            yield _Problem(f"{kind} needs {' and '.join(absent)} under {name}.init_args", f"{name}.init_args")


def _unknown(name: str, title: str, level: Level) -> str:
    similar = difflib.get_close_matches(name, level.names, 1, 0.6) or [
        n for n in level.names if n.lower() == name.lower()
    ]
    if similar:
        return f"{title} has no {name}; did you mean {similar[0]}?"
    for section, inner in {**level.names, **level.inner}.items():
        if isinstance(inner, Level) and name in inner.names:
            return f"{title} has no {name}; it belongs under {section}"
    names = [name for name in level.names if name != "config"]
    listed = ", ".join(names[:_OTHERS]) + (", ..." if len(names) > _OTHERS else "")
    return f"{title} has no {name}; it has {listed or 'no settings'}"


# --------------------------------------------------------------------------------------------------------------- types


def _classes(hint: Any) -> Iterator[tuple[Any, int]]:
    """The class whose objects a type takes, with the number of arguments that the library gives to its constructor."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is collections.abc.Callable and len(parts) == 2 and isinstance(parts[0], list):
        for member in _members(parts[1]):
            yield from ((kind, len(parts[0])) for kind, _ in _classes(member))
    elif isinstance(hint, type) and origin is None and hint not in (*_PLAIN, torch.Tensor):
        yield from [] if hint.__module__ in ("builtins", "pathlib", "datetime", "collections.abc") else [(hint, 0)]


def _resolved(class_path: str, kinds: list[tuple[Any, int]]) -> tuple[Any, int] | str:
    """The class of this name, or why there is none."""
    found: Any = None
    if "." in class_path:
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
            named = {sub.__name__: sub for sub in _subclasses(kind)}
            if class_path in named:
                return named[class_path], given
        elif (inspect.isclass(found) and issubclass(found, kind)) or (not inspect.isclass(found) and callable(found)):
            return found, given
    if found is not None:
        return f"{class_path} is not one of {_among(kinds)}"
    names = sorted({sub.__name__ for kind, _ in kinds for sub in _subclasses(kind)})
    similar = difflib.get_close_matches(class_path, names, 1, 0.6)
    return f"there is no class {class_path}; " + (
        f"did you mean {similar[0]}?" if similar else f"there are {_among(kinds)}"
    )


def _subclasses(kind: Any) -> list[Any]:
    """A class and all below it that objects can be made of, as far as they are imported."""
    below = (
        [sub for direct in kind.__subclasses__() for sub in _subclasses(direct)]
        if hasattr(kind, "__subclasses__")
        else []
    )
    return [*([] if inspect.isabstract(kind) else [kind]), *below]


def _among(kinds: list[tuple[Any, int]], most: int = _OTHERS) -> str:
    names = list(
        dict.fromkeys(
            sub.__name__ for kind, _ in kinds for sub in _subclasses(kind) if not sub.__name__.startswith("_")
        )
    )
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _fits(hint: Any, value: Any) -> bool:
    """Whether the parser takes a value of this type."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
        parser.parse_object({"value": value})
    except (ArgumentError, TypeError, KeyError):
        return False
    except ValueError:  # a type that the parser does not know alone
        return True
    return True


def _in_words(hint: Any) -> str:
    """A type as a user would say it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        words = list(dict.fromkeys(_in_words(part) for part in parts if part is not torch.Tensor))
        return " or ".join(words)
    if origin in _LISTS:
        return f"a list (of {_in_words(parts[0])})" if parts else "a list"
    if origin in _MAPPINGS or hint is dict:
        return "a mapping"
    if origin is collections.abc.Callable or hint is collections.abc.Callable:
        kinds = list(_classes(hint))
        return f"a class_path such as {_among(kinds[:1], 5)}" if kinds else "the import path of a function"
    if isinstance(hint, type):
        return f"a class_path such as {_among([(hint, 0)], 5)}" if _subclasses(hint) else f"a {hint.__name__}"
    return str(hint).replace("typing.", "")


def _merge(target: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Let later settings take the place of earlier ones."""
    for written, value in settings.items():
        name = str(written).removesuffix("+")
        old = target.get(name)
        if isinstance(value, str) and isinstance(old, dict) and "class_path" in old:
            target[name] = {"class_path": value}
        elif name != written:
            target[name] = [
                *(old if isinstance(old, list) else [] if old is None else [old]),
                *(value if isinstance(value, list) else [value]),
            ]
        elif (
            isinstance(value, Mapping)
            and isinstance(old, dict)
            and value.get("class_path", old.get("class_path")) == old.get("class_path")
        ):
            if "class_path" in old and not set(value) & set(_SPEC):
                value = {"init_args": value}
            _merge(old, value)
        elif isinstance(value, Mapping) and isinstance(old, list):
            continue  # a setting of the last object of the list
        else:
            target[name] = dict(value) if isinstance(value, Mapping) else value


def _condensed(message: str) -> str:
    """The last resort: the innermost reasons of the parser, without its list of all types."""
    required = re.search(r'Key "([\w.]+)" is required', message)
    if required:
        return f"the configuration has no {required[1].removeprefix('fit.')}"
    dropped = (
        "Subtypes:",
        "Given value",
        "Does not validate",
        "Errors:",
        "Not a valid subclass",
        "- a class",
        "- a dict",
        "Subclass types",
    )
    lines = [
        line.strip(" -") for line in message.splitlines() if line.strip() and not line.strip(" -").startswith(dropped)
    ]
    return "\n".join(lines[:3]) or message.splitlines()[0]


# -------------------------------------------------------------------------------------------------- objects that refuse


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
