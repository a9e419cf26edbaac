"""Names what a rank was doing when nothing went on any more, and ends it, so that a job never hangs in silence."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

EXIT_CODE = 75  # EX_TEMPFAIL: worth starting again


class Watchdog:
    """Ends the process when nothing has begun or got on for `timeout_s` seconds (0 = never).

    `doing(operation, step)` is called at the beginning of every operation and `beat()` inside long ones; the message
    names rank, step and operation, and the stacks of all threads follow it.
    """

    def __init__(self, rank: int, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self.operation, self.step, self.since = "start", 0, time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def doing(self, operation: str, step: int) -> None:
        self.operation, self.step, self.since = operation, step, time.monotonic()

    def beat(self) -> None:
        """The operation under way gets on."""
        self.since = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.timeout_s > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(self.timeout_s / 10, 5.0)):
            idle = time.monotonic() - self.since
            if idle > self.timeout_s:
                print(
                    f"error: rank {self.rank}, step {self.step}: no progress for {idle:.0f} s in: {self.operation}",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback()
                os._exit(EXIT_CODE)
