"""What is wrong with a configuration that the parser refuses: the first key that does not fit, in the user's words.

The parser tells of every type that a value could have had; here each value is looked at alone, along the signatures of
its classes.
"""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lit_specrl.cli.configuration_files import COMMAND_LINE, Source, in_short, sources
from lit_specrl.cli.messages import ConfigurationError
from lit_specrl.cli.other_names import OTHER_NAMES
from lit_specrl.cli.value_types import (
    LISTS,
    MAPPINGS,
    MAX_LISTED,
    Unimported,
    Unknown,
    class_names,
    classes_of,
    fits,
    in_words,
    members_of,
    resolve_class,
    union,
)

_SPEC = ("class_path", "init_args", "dict_kwargs")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_EXAMPLES = {"Optimizer": "torch.optim.AdamW", "LRScheduler": "torch.optim.lr_scheduler.LinearLR"}
_CLASS_NAME = re.compile(r"(\w+\.)*_*[A-Z]\w*")  # not the name of a file


class _Anything(dict[str, Any]):
    """Has every name, with nothing known of it."""

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> None:
        return None


@dataclass
class Level:
    """What can be set at one level: names, with the type or the further level behind each."""

    names: dict[str, Any] = field(default_factory=dict)
    required: list[str] = field(default_factory=list)
    inner: dict[str, Level] = field(default_factory=dict)
    """Arguments of the classes that are named so far."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """By name, of those that have one."""

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
            inner.defaults[name] = action.default
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
        if kind is Unknown:
            return cls(_Anything())
        if inspect.isclass(kind) and issubclass(kind, Unimported):
            recorded: Level = kind.arguments(num_given)
            return recorded
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
    try:
        found = first_problem(level, sources(arguments, "config" not in level.names), parser.prog)
    except ConfigurationError as unreadable:
        return unreadable
    return found or ConfigurationError(_condensed(str(error)))


def first_problem(level: Level, settings: Sequence[Source], program: str) -> ConfigurationError | None:
    """The first of all settings that does not fit.

    Args:
        level: what the command takes.
        settings: files and options, in the order in which they count.
        program: name of a command without configuration files.
    """
    has_files = "config" in level.names
    merged: dict[str, Any] = {}
    title = "the configuration" if has_files else program
    incomplete: dict[str, str] = {}
    for source in settings:
        for problem in _in_level(level, source.settings, merged, "", title):
            if problem.may_follow:
                incomplete.setdefault(problem.sentence, f"{problem.key}, {source.origin}")
                continue
            as_text = _in_level(level, source.as_text, merged, "", title) if source.as_text else [problem]
            if all(other.may_follow for other in as_text):
                break
            where = f"{problem.key}, {source.origin}" if problem.key else source.origin
            return ConfigurationError(problem.sentence, where)
        _merge(merged, source.settings)
        level.inner = _inner(level, merged)
    for problem in _in_level(level, merged, {}, "", title) if incomplete else ():
        if problem.may_follow:
            return ConfigurationError(problem.sentence, incomplete.get(problem.sentence, problem.key))
    for problem in _missing(level, merged) if has_files else ():
        return ConfigurationError(problem.sentence, ", ".join(source.origin for source in settings) or COMMAND_LINE)
    return None


# ------------------------------------------------------------------------------------------------------------ the walk


@dataclass
class _Problem:
    sentence: str
    key: str
    may_follow: bool = False
    """Something is missing, which later files and options may give."""


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
    members = list(members_of(hint))
    if any(member is Any for member in members):
        return
    kinds = [kind for member in members for kind in classes_of(member)]
    of_items = [
        typing.get_args(member)[0]
        for member in members
        if typing.get_origin(member) in LISTS and typing.get_args(member)
    ]
    kinds_of_items = [kind for member in of_items for part in members_of(member) for kind in classes_of(part)]
    of_values = [typing.get_args(member)[1] for member in members if typing.get_origin(member) in MAPPINGS]
    if (isinstance(value, list) and of_items) or is_added:
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            yield from _in_value(union(of_items), item, None, f"{key}[{index}]")
    elif isinstance(value, Mapping) and kinds and (set(value) & set(_SPEC) or not of_values):
        yield from _in_spec(kinds, value, before, key)
    elif isinstance(value, Mapping) and isinstance(before, (list, Mapping, str)) and kinds_of_items and not of_values:
        yield from _in_spec(kinds_of_items, value, before, key)
    elif isinstance(value, Mapping) and of_values:
        before = before if isinstance(before, Mapping) else {}
        for name, item in value.items():
            yield from _in_value(union(of_values), item, before.get(name), f"{key}.{name}")
    elif not fits(hint, value):
        if isinstance(value, str) and kinds and _NAME.fullmatch(value) and not {int, float} & set(members):
            yield from _in_spec(kinds, {"class_path": value}, None, key)
        else:
            yield _Problem(f"{key.rpartition('.')[2]} must be {in_words(hint)}, got {in_short(value)}", key)


def _in_spec(kinds: list[tuple[Any, int]], spec: Mapping[str, Any], before: Any, key: str) -> Iterator[_Problem]:
    """What does not fit in the description of an object."""
    if isinstance(before, list):
        before = before[-1] if before else None
    before = {"class_path": before} if isinstance(before, str) else before if isinstance(before, Mapping) else {}
    class_path = spec.get("class_path", before.get("class_path"))
    if class_path is None:
        named = [(kind, given) for kind, given in kinds if not inspect.isabstract(kind)]
        if named and (example := _EXAMPLES.get(named[0][0].__name__)):  # called by the library: its class knows more
            yield _Problem(f"{key.rpartition('.')[2]} needs a class_path, such as {example}", key)
            return
        if len(named) != 1:
            yield _Problem(f"{key.rpartition('.')[2]} needs a class_path: {class_names(kinds)}", key)
            return
        kind, num_given = named[0]
    elif not isinstance(class_path, str):
        yield _Problem(f"class_path must be the name of a class, got {in_short(class_path)}", f"{key}.class_path")
        return
    else:
        resolved = resolve_class(class_path, kinds)
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
        if missing and key.count("."):  # `_missing` tells of model and data
            yield _Problem(f"{title} needs {' and '.join(missing)}", f"{key}.init_args", may_follow=True)


def _inner(level: Level, settings: Mapping[str, Any]) -> dict[str, Level]:
    found: dict[str, Level] = {}
    for name in ("model", "data"):
        spec = _spec(settings.get(name))
        if isinstance(spec.get("class_path"), str) and name in level.names:
            kinds = [kind for member in members_of(level.names[name]) for kind in classes_of(member)]
            resolved = resolve_class(spec["class_path"], kinds)
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
    if name in OTHER_NAMES and "num_generations" in level.names:
        return f"{title} has no {name}; here it is {OTHER_NAMES[name]}"
    similar = difflib.get_close_matches(name, level.names, 1, 0.6) or [
        n for n in level.names if n.lower() == name.lower()
    ]
    if similar:
        return f"{title} has no {name}; did you mean {similar[0]}?"
    for section, inner in {**level.names, **level.inner}.items():
        if isinstance(inner, Level) and name in inner.names:
            return f"{title} has no {name}; it belongs under {section}"
    names = [name for name in level.names if name != "config"]
    listed = ", ".join(names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
    return f"{title} has no {name}; it has {listed or 'no settings'}"


def _merge(target: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Let later settings take the place of earlier ones."""
    for written, value in settings.items():
        name = str(written).removesuffix("+")
        old = target.get(name)
        if isinstance(value, Mapping) and isinstance(old, str) and _CLASS_NAME.fullmatch(old):
            old = target[name] = {"class_path": old}
        if isinstance(value, str) and isinstance(old, dict) and "class_path" in old:
            target[name] = {**old, "class_path": value}
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
        elif isinstance(value, Mapping) and isinstance(old, dict) and "class_path" in value and "init_args" in old:
            target[name] = {**value, "init_args": {**old["init_args"], **(value.get("init_args") or {})}}
        elif isinstance(value, Mapping) and isinstance(old, list):  # a setting of the last object of the list
            last = {name: old[-1] if old else None}
            _merge(last, {name: value})
            target[name] = [*old[:-1], last[name]]
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
