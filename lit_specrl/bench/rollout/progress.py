"""How far a run is, told from its process to the one that waits for it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType

STEPS_FILE = "steps.txt"
"""Beside the record of a run: a line for each step that is done."""


class ProgressTeller:
    """Inside, tells the last line of a file on stderr whenever there is another one.

    Args:
        file: that a run adds lines to; it need not be there yet.
        every_s: seconds between two looks.
    """

    def __init__(self, file: Path, every_s: float = 15.0) -> None:
        self.file, self.every_s = file, every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)

    def __enter__(self) -> ProgressTeller:
        self.file.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _tell(self) -> None:
        told = ""
        while not self._is_over.wait(self.every_s):
            lines = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
            if lines and lines[-1] != told:
                told = lines[-1]
                print(f"  {told}", file=sys.stderr, flush=True)
