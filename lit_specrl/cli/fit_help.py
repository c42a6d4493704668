"""Help of `lit-specrl fit` and its siblings, without imports: one screen, and a page for each class."""

from __future__ import annotations

import inspect
import textwrap
import typing
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from typing import Any

from lit_specrl.cli.descriptions import Description, description
from lit_specrl.cli.diagnosis import Level
from lit_specrl.cli.messages import ConfigurationError
from lit_specrl.cli.signatures import Signatures
from lit_specrl.cli.value_types import Unimported, Unknown, classes_of, in_words, members_of, resolve_class, subclasses

_WIDTH = 110  # characters
_OF_LEVELS = {
    "trainer": "lightning.pytorch.trainer.trainer.Trainer",
    "plan": "lit_specrl.callbacks.run_plan.RunPlan",
    "progress_bar": "lit_specrl.callbacks.progress_bar.RolloutProgressBar",
    "tensorboard": "lit_specrl.callbacks.logger_report.LoggerReport",
    "completions": "lit_specrl.callbacks.completion_writer.CompletionWriter",
}
_OF_EVERY_RUN = tuple(_OF_LEVELS)[1:]
_MOST_USED = """accelerator, devices, strategy, precision, max_epochs, max_steps, max_time, logger, val_check_interval,
check_val_every_n_epoch, default_root_dir"""
_OPTIONS = {
    "--config FILE": "recipe or block of settings; may be repeated, later ones win",
    "--ckpt_path FILE": "checkpoint to go on from; `last` is the newest of the run's folder, if there is one",
    "--seed_everything N": "of the weights that begin at random, and of all that has no seed of its own",
    "--print_config": "print all settings and end",
    "--debug": "print the traceback of an error",
    "--KEY.help [CLASS]": "what an argument takes, or the arguments of a class, as below",
}


def answer(command: str, summary: str, arguments: Sequence[str]) -> str | None:
    """What is asked for by `--help`, `--KEY.help` or `--KEY.help CLASS`; `None` where nothing is, or where the record
    of the classes does not tell.

    Args:
        command: `fit` or one of its siblings.
        summary: what the command does.
        arguments: of the command.

    Raises:
        ConfigurationError: help for something that there is not.
    """
    asked = next((index for index, one in enumerate(arguments) if _is_asked(one)), None)
    if asked is None:
        return None
    signatures = Signatures()
    if not signatures.are_current:
        return None
    if arguments[asked] in ("-h", "--help"):
        return _overview(command, summary, signatures)
    key, _, name = arguments[asked].removeprefix("--").partition("=")
    following = arguments[asked + 1 : asked + 2]
    name = name or next((one for one in following if not one.startswith("-")), "")
    return _page(signatures.command(command), key.removesuffix(".help"), name)


def _is_asked(argument: str) -> bool:
    name = argument.partition("=")[0]
    return name in ("-h", "--help") or (name.startswith("--") and name.endswith(".help"))


# -------------------------------------------------------------------------------------------------------------- pages


def _page(level: Level, key: str, name: str) -> str | None:
    """Help for what a dotted key takes."""
    parts = [part for part in key.split(".") if part != "init_args"]
    hints = list(_hints(level, parts))
    if not hints:
        raise ConfigurationError(f"there is no setting {key}; `lit-specrl fit --help` lists what there is")
    if isinstance(hints[0], Level):
        path = _OF_LEVELS.get(parts[-1], "")
        told = description(path) if path else Description()
        return "\n".join([f"--{key}: {told.first_sentence}", "", *_arguments(hints[0], key, told.arguments)])
    kinds = [(kind, given) for hint in hints for kind, given in _classes(hint)]
    if not kinds:
        return f"--{key}: {in_words(hints[0])}; `--{parts[0]}.help CLASS` describes it"
    if not any(_made(kind) for kind, _ in kinds):
        return None
    if not name:
        return _listed(key, [kind for kind, _ in kinds])
    found = resolve_class(name, kinds)
    if isinstance(found, str):
        raise ConfigurationError(found, f"--{key}.help")
    kind, given = found
    return None if kind is Unknown or kind.entry["level"] is None else _class_page(key, kind, given)


def _hints(level: Level, parts: Sequence[str]) -> Iterator[Any]:
    """Types, or further levels, that a dotted key has in any of the classes that can stand on its way."""
    levels = [level]
    for part in parts[:-1]:
        found = [one.names[part] for one in levels if part in one.names]
        levels = [one for one in found if isinstance(one, Level)]
        kinds = [
            kind for one in found if not isinstance(one, Level) for base, _ in _classes(one) for kind in _made(base)
        ]
        levels += [Level.of_class(kind) for kind in dict.fromkeys(kinds)]
    yield from (one.names[parts[-1]] for one in levels if one.names.get(parts[-1]) is not None)


def _classes(hint: Any) -> Iterator[tuple[Any, int]]:
    """Classes whose objects a type takes, also as items of a list or values of a mapping."""
    for member in members_of(hint):
        found = [(kind, given) for kind, given in classes_of(member) if issubclass(kind, Unimported)]
        yield from found
        if not found:
            for part in typing.get_args(member):
                yield from _classes(part) if not isinstance(part, list) else ()


def _made(kind: Any) -> list[type[Unimported]]:
    return [one for one in subclasses(kind) if not one.__name__.startswith("_") and one is not Unknown]


def _own(kinds: Sequence[type[Unimported]]) -> list[type[Unimported]]:
    """This library's, without those that others are built on."""
    return [one for one in kinds if one.__module__.startswith("lit_specrl.") and not one.__subclasses__()]


def _listed(key: str, kinds: Sequence[Any]) -> str:
    """The classes that an argument takes, each with a sentence."""
    found = list(dict.fromkeys(one for kind in kinds for one in _made(kind)))
    found.sort(key=lambda one: not one.__module__.startswith("lit_specrl."))
    lines = [
        f"--{key} takes one of these classes; `--{key}.help CLASS` describes the arguments of one.",
        "",
        *_columns({one.__name__: description(_path(one)).first_sentence for one in found}),
    ]
    return "\n".join([*lines, "", "Your own go by their import path, as in my_file.MyClass."])


def _class_page(key: str, kind: type[Unimported], given: int) -> str:
    lines = [f"{kind.__module__}.{kind.__name__}", "", *description(_path(kind)).text.splitlines(), ""]
    told: dict[str, str] = {}
    for one in reversed(inspect.getmro(kind)):
        told |= description(_path(one)).arguments
    return "\n".join([*lines, *_arguments(kind.arguments(given), key, told)])


def _arguments(level: Level, key: str, told: dict[str, str]) -> list[str]:
    """Each argument with its type, its default and what it means."""
    lines = []
    for name, hint in level.names.items():
        kind = "a mapping" if isinstance(hint, Level) else _in_words(hint, f"--{key}.{name}")
        default = "required" if name in level.required else _default(level, name)
        lines.append(f"  --{key}.{name}  ({', '.join(filter(None, [kind, default]))})")
        lines += textwrap.wrap(told.get(name, ""), _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return lines


def _in_words(hint: Any, option: str) -> str:
    """A type; its classes are listed on a page of their own."""
    if hint is None:
        return ""
    plain = [part for part in members_of(hint) if not list(_classes(part))]
    words = [in_words(part) for part in plain]
    return " or ".join(words if len(plain) == len(list(members_of(hint))) else [f"a class, see {option}.help", *words])


def _default(level: Level, name: str) -> str:
    value = level.defaults.get(name, SUPPRESS)
    if value == SUPPRESS:
        return ""
    words = {None: "null", True: "true", False: "false"} if value is None or isinstance(value, bool) else {}
    return f"default: {words.get(value, value) if words else value}"


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# ----------------------------------------------------------------------------------------------------------- overview


def _overview(command: str, summary: str, signatures: Signatures) -> str:
    level = signatures.command(command)
    lines = [
        f"usage: lit-specrl {command} --config FILE [--config FILE ...] [--KEY VALUE ...]",
        "",
        f"{summary[:1].upper()}{summary[1:]}. Begin with",
        "",
        f"  lit-specrl {command} --config recipes/quickstart.yaml",
        "",
        "Every setting of a configuration is an option: --model.num_generations 8, --data.batch_size 16.",
        "",
        "options:",
        *_columns(_OPTIONS),
    ]
    lines += ["", "what is learned, --model: `--model.help GRPO` describes the arguments", *_made_of(level, "model")]
    lines += [*_names(_level_of(signatures, "GRPO"))]
    lines += ["", "prompts, --data: `--data.help PromptDataModule`, `--data.train.help FileSource`"]
    lines += [*_names(_level_of(signatures, "PromptDataModule"))]
    in_every_run = [_OF_LEVELS[part] for part in _OF_EVERY_RUN]
    callbacks = [one for one in _own(_made(signatures.named("Callback"))) if _path(one) not in in_every_run]
    lines += ["", "additions, --trainer.callbacks+ NAME: `--trainer.callbacks.help PrefixCache`"]
    lines += _columns({one.__name__: description(_path(one)).first_sentence for one in callbacks})
    lines += ["", "reports of every run:"]
    lines += _columns(
        {
            f"--{part}.{name}": description(_OF_LEVELS[part]).arguments.get(name, "")
            for part in _OF_EVERY_RUN
            if part in level.names
            for name in level.names[part].names
        }
    )
    lines += [
        "",
        "Lightning's trainer, --trainer: `--trainer.help` describes all; most used are",
        *textwrap.indent(_MOST_USED, "  ").splitlines(),
    ]
    return "\n".join(lines)


def _level_of(signatures: Signatures, name: str) -> Level:
    kind = signatures.named(name)
    assert kind is not None, f"{name} is recorded"
    level: Level = kind.arguments(0)
    return level


def _made_of(level: Level, name: str) -> list[str]:
    kinds = [kind for base, _ in _classes(level.names[name]) for kind in _own(_made(base))]
    return _columns({kind.__name__: description(_path(kind)).first_sentence for kind in kinds})


def _names(level: Level) -> list[str]:
    return _wrapped(tuple(level.names))


def _wrapped(names: Sequence[str]) -> list[str]:
    return textwrap.wrap(", ".join(names), _WIDTH, initial_indent="  ", subsequent_indent="  ")


def _columns(rows: dict[str, str]) -> list[str]:
    """A line for each name, cut to the width of a screen."""
    width = max(map(len, rows))
    return [
        f"  {name:{width}}  {textwrap.shorten(text, _WIDTH - width, placeholder=' ...')}" for name, text in rows.items()
    ]
