"""The end of a process, which comes whatever a library has left running."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

PATIENCE_S = 20.0
"""Seconds for what others have registered for the end, such as loggers that upload."""


def end(status: int, patience_s: float = PATIENCE_S) -> NoReturn:
    """End this process with its work done.

    What was registered with `atexit` is called. Then the process ends without the interpreter's own tear-down, which
    waits for the threads of others and takes down what lies on a device in an order of its own; either can take many
    seconds, or for ever. Where the calls do not come back in time, they are named and left.

    Args:
        status: of the process.
        patience_s: seconds to wait for the calls.
    """
    calls = threading.Thread(target=atexit._run_exitfuncs, name="end", daemon=True)
    calls.start()
    calls.join(patience_s)
    if calls.is_alive():
        print(
            f"lit-specrl: the work is done, but the end is awaited in vain for {patience_s:g} s; the process ends now, "
            "and this is what it was waiting for:",
            file=sys.stderr,
        )
        faulthandler.dump_traceback(file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def run_and_end(main: Callable[[], None]) -> None:
    """Call a command line and end the process with its status.

    Several ranks end in the usual way: they still hold connections that the others use.
    """
    status = 0
    try:
        main()
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if _num_ranks() > 1:
        sys.exit(status)
    end(status)


def _num_ranks() -> int:
    distributed = sys.modules.get("torch.distributed")  # a mistake is told before torch is imported
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return int(os.environ.get("WORLD_SIZE", "1"))
    return int(distributed.get_world_size())
