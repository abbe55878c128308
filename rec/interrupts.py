"""SIGTERM asks a run to stop: it writes a checkpoint and ends with a code of its own.

Preemption, a time limit and torchrun itself send SIGTERM. Every rank only takes note of it here; the loop agrees on a step over all
ranks, saves, and raises `StoppedError`.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType

STOPPED = 75  # exit code, EX_TEMPFAIL of sysexits.h: nothing is wrong, start again to go on
STOPPED_FILE = (
    "REC_STOPPED_FILE"  # environment variable: a file for the step that was saved; torchrun hands no exit code on
)


class StoppedError(Exception):
    """A run was told to stop, and has saved its state."""


class StopSignal:
    """Whether SIGTERM has come, while it is entered. It may come often: torchrun and a scheduler both send it."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            self._before = signal.signal(signal.SIGTERM, self._take_note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def forget_stop() -> None:
    """Empty the launching script's file: ranks that torchrun started again have not been told to stop."""
    file = os.environ.get(STOPPED_FILE)
    if file and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(file).write_text("")


def tell_launcher(step: int) -> None:
    """Write the saved step into the file that the launching script asked for; one rank of each host does."""
    file = os.environ.get(STOPPED_FILE)
    if file and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(file).write_text(f"{step}\n")
