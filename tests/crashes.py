"""Runs commands in processes that are made to die. They are forked from one that has imported everything, in 20 ms."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

from ranks import _free_port

TIMEOUT_S = 120
GRACE_S = 10  # for a process that was sent a signal

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["__main__", "torch._dynamo", "vtrain.pretrain", "vtrain.extract", "vtrain.shards", "vtrain.train.curve"]
)


@dataclass
class Ended:
    """What became of a process: its exit code (-9 = killed) and all that it printed."""

    code: int
    output: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error:")]


class Job:
    """`python -m vtrain.<command> <arguments>` on some ranks, begun at once. Output goes to files beside `log`.

    A command without settings is named by its module: `vtrain.shards`, or one of the tests', with main(arguments).
    """

    def __init__(self, command: str, arguments: list[str], log: Path, *, ranks: int = 1, **environment: str) -> None:
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(ranks)]
        shared = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), **environment}
        self.processes = []
        for rank, file in enumerate(self.logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            self.processes.append(forked(_child, command, arguments, str(file), shared | own))

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[Ended]:
        """By rank. RuntimeError with what was printed when a process has not ended by then."""
        if not self.ended_within(timeout_s):
            late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
            self.abort()
            raise RuntimeError(f"ranks {late} did not end in {timeout_s:.0f} s\n" + self.logs[late[0]].read_text())
        return [
            Ended(process.exitcode, log.read_text() if log.exists() else "")
            for process, log in zip(self.processes, self.logs)
        ]

    def ended_within(self, timeout_s: float) -> bool:
        """Whether all processes have ended, after at most so many seconds."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        return all(process.exitcode is not None for process in self.processes)

    def running(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def abort(self) -> None:
        """End the processes that still run; each prints where it is."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGABRT)
                process.join(GRACE_S)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def run_once(command: str, arguments: list[str], log: Path, **environment: str) -> Ended:
    (ended,) = Job(command, arguments, log, **environment).wait()
    return ended


def forked(function: Callable, *arguments: object) -> multiprocessing.Process:
    """function(*arguments) in a process that has no locks and threads of the test's own one."""
    _start_server()
    process = _context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def _start_server() -> None:
    """Start the process that others are forked from, unless it runs; it imports from where this one does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _child(command: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.environ |= environment
    import torch
    from tqdm import tqdm

    from vtrain import config, failpoints
    from vtrain.settings import COMMANDS

    torch.set_num_threads(1)
    faulthandler.enable()
    tqdm.set_lock(threading.RLock())  # its own one is a semaphore, which killed processes leave behind
    failpoints.activate()
    if command in COMMANDS:
        config.run_command(COMMANDS[command], importlib.import_module(f"vtrain.{command}").main, arguments)
    else:
        sys.exit(importlib.import_module(command).main(arguments))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders below a folder."""
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.name.startswith((".tmp-", ".old-"))]
