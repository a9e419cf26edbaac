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
    has no name yet, so the checkpoint before it stays usable. A thread sees to that, since Python runs handlers in the
    main thread only, and that one may hang in a collective. Outside the main thread signals cannot be caught, and
    nothing is.
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, object] = {}
        self._pipe = (-1, -1)
        self._wakeup_before = -1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            threading.Thread(target=_count, args=(self._pipe[0],), name="signals", daemon=True).start()
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {s: signal.signal(s, self._caught) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe[1])  # which ends the thread

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name


def _count(pipe: int) -> None:
    """Read the numbers of signals as they arrive; the second one of `SIGNALS` ends the process."""
    arrived = 0
    while byte := os.read(pipe, 1):
        if byte[0] not in SIGNALS:
            continue
        arrived += 1
        name = signal.Signals(byte[0]).name
        if arrived > 1:
            _tell(f"{name} again: stopping at once")
            os._exit(128 + byte[0])
        _tell(f"{name}: stopping after this step; once more stops at once")
    os.close(pipe)


def _tell(text: str) -> None:
    os.write(sys.stderr.fileno(), f"{text}\n".encode())
