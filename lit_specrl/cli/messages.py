"""From an exception to what the user of the command line reads."""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import textwrap
import traceback
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

DEBUG = "LIT_SPECRL_DEBUG"
"""Environment variable that, set to 1, prints tracebacks, as `--debug` does."""
_MOST_LINES = 8  # of a message, without the user's own frames and the place of the traceback
_WIDTH = 160  # characters
_CONFIGURATION = ("ValueError", "TypeError", "ImportError", "ModuleNotFoundError", "MisconfigurationException")
_PACKAGE = Path(__file__).parents[1]
_TRAINING = "_run_stage"  # the function of Lightning behind all set-up


class ConfigurationError(ValueError):
    """A configuration that cannot work: what is wrong, and where it stands."""

    def __init__(self, sentence: str, where: str = "") -> None:
        super().__init__(f"{sentence}\n  in {where}" if where else sentence)


@contextmanager
def told(command: str, debug: bool = False) -> Iterator[None]:
    """Inside, an exception becomes one screen on stderr and an exit code: 2 for a configuration that cannot work, 1 for
    what fails later.

    The traceback goes into a file, or, with `debug`, to stderr.

    Args:
        command: what the user called, as in `lit-specrl fit`.
        debug: print the traceback as well.
    """
    try:
        yield
    except Exception as error:
        _end(command, error, debug)


def _end(command: str, error: Exception, debug: bool) -> NoReturn:
    trace = "".join(traceback.format_exception(error))
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    said = sentence(error)
    subject = command if rank == 0 else f"{command} (rank {rank})"
    lines = _shortened(said if said.startswith(f"{subject} ") else f"{subject}: {said}")
    lines += [f"  at {frame}" for frame in own_frames(error)]
    if debug:
        print(trace, file=sys.stderr)
    elif not isinstance(error, ConfigurationError) or error.__cause__ is not None:  # others are the command line's own
        lines.append(f"  traceback: {_kept(trace)}")
    sys.stdout.flush()
    print("\n".join(lines if rank == 0 else [lines[0], lines[-1]]), file=sys.stderr, flush=True)
    raise SystemExit(exit_code(error)) from None


def exit_code(error: BaseException) -> int:
    """2 where the user's configuration is to blame, 1 for what goes wrong later."""
    if isinstance(error, (ConfigurationError, ArgumentError)):
        return 2
    kinds = {kind.__name__ for kind in type(error).__mro__}
    is_training = any(frame.name == _TRAINING for frame in traceback.extract_tb(error.__traceback__))
    return 2 if kinds & set(_CONFIGURATION) and not is_training else 1


def sentence(error: BaseException) -> str:
    """What is wrong: the words of the exception, after its class where they alone say too little."""
    text = str(error).strip()
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, OSError) and error.strerror:
        return _about_files(error)
    if kinds & {*_CONFIGURATION, "RunFailedError"} and (" " in text):
        return text
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in text:
        return "a checkpoint could not be written whole, probably because the disk is full; make room, or write elsewhere (trainer.default_root_dir)"
    if type(error) is RuntimeError and " " in text and _raised_in_library(error):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _about_files(error: OSError) -> str:
    """An error of the operating system, with what to do about the usual ones."""
    reason = (error.strerror or "").lower()
    subject = f"{error.filename}: {reason}" if error.filename is not None else reason
    remedies = {
        "no space left on device": "make room, or write elsewhere (trainer.default_root_dir)",
        "disk quota exceeded": "make room, or write elsewhere (trainer.default_root_dir)",
        "permission denied": "make it writable, or write elsewhere (trainer.default_root_dir)",
        "read-only file system": "write elsewhere (trainer.default_root_dir)",
        "no such file or directory": "check the path",
    }
    remedy = remedies.get(reason)
    return f"{subject}; {remedy}" if remedy else subject


def _raised_in_library(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)


def own_frames(error: BaseException) -> list[str]:
    """Where the user's own code took part, innermost last: three lines at most."""
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed += [_PACKAGE, Path(sys.argv[0] or ".").absolute()]
    found: list[str] = []
    for cause in _causes(error):
        for frame in traceback.extract_tb(cause.__traceback__):
            path = Path(frame.filename)
            if path.is_file() and not any(path.absolute().is_relative_to(folder) for folder in installed):
                found.append(f"{_short(path)}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()}"[:_WIDTH])
    return list(dict.fromkeys(found))[-3:]


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return chain


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _shortened(text: str) -> list[str]:
    """Lines that fit a screen."""
    lines: list[str] = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) or []
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], f"  ... {len(lines) - _MOST_LINES + 1} more lines with the traceback"]
    return lines


def _kept(trace: str) -> str:
    """Where the traceback is."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="lit-specrl-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(trace)
        return f"{file.name} (--debug prints it)"
    except OSError:
        return "--debug prints it"


def wants_debug(arguments: Sequence[str]) -> bool:
    """Whether the user asks for tracebacks."""
    return "--debug" in arguments or os.environ.get(DEBUG, "0") not in ("", "0")
