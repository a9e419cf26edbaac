"""Stopping in good order: the first SIGTERM or SIGUSR1 lets the step end and be saved, the second one stops at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While it is entered, `name` is the signal that asks this process to stop, or "".

    A second signal ends the process at once with 128 + its number, as an unhandled one would: what was being written
    has no name yet, so the checkpoint before it stays usable. Outside the main thread signals cannot be caught, and
    nothing is.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._caught) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.name:
            os.write(sys.stderr.fileno(), f"{name} again: stopping at once\n".encode())
            os._exit(128 + number)
        self.name = name
        os.write(sys.stderr.fileno(), f"{name}: stopping after this step; once more stops at once\n".encode())
