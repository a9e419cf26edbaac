"""Places where a test makes the disk fail: every write, fsync, rename and delete of vtrain.files passes one.

VTRAIN_FAILPOINT="write:manifest.json#2:kill" acts when such a file is written for the second time (default: the first):
    kill   SIGKILL to this process, as the kernel does when memory runs out
    raise  OSError: an input/output error
    full   OSError: no space left on device
    stop   SIGTERM to this process, which goes on: it is asked to stop in good order
A write that is killed or fails leaves half of its bytes. VTRAIN_FAILPOINT_LOG=file: a line for every point passed.
Points are named by operation and kind of file, its name without numbers: a new file has its points without more ado.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

ACTIONS = ("kill", "raise", "full", "stop")
_NUMBER = re.compile(r"[-_]?\b(?=[0-9a-f]*[0-9])[0-9a-f]+\b")  # decimal or hexadecimal: steps, ranks, hashes

_hit: Callable | None = None  # what a point does; None = nothing, as always outside tests


def point(operation: str, path: str | os.PathLike, file: BinaryIO | None = None, data: bytes = b"") -> None:
    """Pass the point `operation:kind(path)`. A fault leaves half of `data` in `file`."""
    if _hit is not None:
        _hit(f"{operation}:{kind(path)}", file, data)


def kind(path: str | os.PathLike) -> str:
    """The name of a file or folder without numbers and `.tmp-`: `.tmp-rank-00003.json` -> `rank.json`."""
    name = re.sub(r"^(\.(tmp|old)-)+", "", Path(path).name)
    return _NUMBER.sub("", name).strip("-_.")


def activate(environment: Mapping[str, str] = os.environ) -> None:
    """Obey the two variables from now on; called at import. ValueError where VTRAIN_FAILPOINT has another form."""
    global _hit
    fault, log = environment.get("VTRAIN_FAILPOINT", ""), environment.get("VTRAIN_FAILPOINT_LOG", "")
    _hit = _Faults(fault, log) if fault or log else None


class _Faults:
    def __init__(self, fault: str, log: str) -> None:
        self.log = log
        target, _, self.action = fault.rpartition(":")
        self.name, _, number = target.partition("#")
        if fault and (":" not in self.name or self.action not in ACTIONS or not (number or "1").isdigit()):
            raise ValueError(f"VTRAIN_FAILPOINT: {fault!r}; expected operation:kind[#n]:{'|'.join(ACTIONS)}")
        self.number = int(number or 1)
        self.passed: Counter[str] = Counter()
        self.lock = threading.Lock()  # a checkpoint may be written by a thread of its own

    def __call__(self, name: str, file: BinaryIO | None, data: bytes) -> None:
        with self.lock:
            self.passed[name] += 1
            due = name == self.name and self.passed[name] == self.number
            if self.log:
                with open(self.log, "a") as log:
                    log.write(name + "\n")
        if due:
            self._act(name, file, data)

    def _act(self, name: str, file: BinaryIO | None, data: bytes) -> None:
        if self.action == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if file is not None:
            with suppress(OSError):
                file.write(data[: len(data) // 2])
                file.flush()
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if self.action == "full" else errno.EIO
        raise OSError(number, f"{os.strerror(number)} (failpoint {name})")


activate()
