"""Runs functions on several gloo ranks. The workers live for the whole test session: importing torch is slow."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import time
import traceback
from multiprocessing.connection import wait

TIMEOUT_S = 240
GRACE_S = 10  # for the other ranks once one has failed: they wait in a collective


class _Pool:
    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.workers: list = []  # (process, pipe)

    def run(self, ranks: int, function, args: tuple) -> list:
        while len(self.workers) < ranks:
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))
        port = _free_port()
        for rank in range(ranks):
            self.workers[rank][1].send((rank, ranks, port, function, args))
        pending = {self.workers[rank][1]: rank for rank in range(ranks)}
        results: list = [None] * ranks
        failures = []
        deadline = time.monotonic() + TIMEOUT_S
        while pending:
            ready = wait(list(pending), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                self.close()
                failures.append(f"ranks {sorted(pending.values())} did not answer")
                break
            for pipe in ready:
                rank = pending.pop(pipe)
                ok, results[rank] = pipe.recv()
                if not ok:
                    failures.append(f"rank {rank} of {ranks}:\n{results[rank]}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures:
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        for process, _ in self.workers:
            process.kill()
        self.workers.clear()


_pool = _Pool()
atexit.register(_pool.close)


def run_ranks(ranks: int, function, *args) -> list:
    """function(*args) on `ranks` processes with torchrun's environment variables set; the results by rank.

    `function` must be importable (module level). An exception on any rank is raised here with its traceback.
    """
    return _pool.run(ranks, function, args)


def _serve(pipe) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, ranks, port, function, args = pipe.recv()
        except EOFError:
            return
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
