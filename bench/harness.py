"""What the benches share: rows, quantiles, the machine's description, and child processes that take turns."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

LOAD = round(os.getloadavg()[0], 2)  # of the machine before this bench: rows of a busy one are worth nothing
WARM_UP = 1  # rounds that are not counted: imports, page faults, the first epoch's order


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 (the median) and p80 to 4 significant digits; the outer two are values that were measured."""
    ranked = sorted(values)
    found = {f"p{q}": ranked[min(int(q / 100 * len(ranked)), len(ranked) - 1)] for q in (20, 80)}
    return {name: float(f"{x:.4g}") for name, x in {**found, "p50": statistics.median(ranked)}.items()}


def environment(package: str = "") -> dict[str, Any]:
    """The commit ("+" = with changes on top), versions, processor, date, load; `package` is the peer of the row."""
    import torch

    found = {
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{_processor()}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
        "load": LOAD,
    }
    if torch.cuda.is_available():
        found |= _gpu()
    if package:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["peer"] = f"{package} {metadata.version(package)}"
    return found


@functools.cache
def _gpu() -> dict[str, str]:
    import torch

    found = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    return found


@functools.cache
def _commit() -> str:
    """Of this checkout; of a copy without its history, what VTRAIN_COMMIT says."""
    if "VTRAIN_COMMIT" in os.environ:
        return os.environ["VTRAIN_COMMIT"]
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")


def _git(*command: str) -> str:
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", *command], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        return done.stdout.strip()
    return ""


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")
    return "unknown"


class Rows:
    """Shows rows and appends them to a JSON-lines file, each as soon as it is known. path: None = only shown."""

    def __init__(self, suite: str, path: Path | None) -> None:
        self.suite, self.path = suite, path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        case: str,
        impl: str,
        values: Sequence[float],
        unit: str,
        *,
        shape: dict[str, Any] | None = None,
        dtype: str = "",
        baseline: float | None = None,
        less: bool = False,
        package: str = "",
        error: str = "",
        **more: Any,
    ) -> dict[str, Any]:
        """One row: quantiles of `values`, one value a round; no values = why, in `error`.

        ratio: median / baseline; the inverse where `less` is better, as of times.
        """
        row = {"suite": self.suite, "case": case, "impl": impl, "shape": shape or {}, "dtype": dtype}
        row |= quantiles(values) if values else {"p20": None, "p50": None, "p80": None, "error": error}
        ratio = round(baseline / row["p50"] if less else row["p50"] / baseline, 4) if values and baseline else None
        row |= {"unit": unit, "ratio": ratio, "rounds": len(values), **more, "env": environment(package)}
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        spread = f"{row['p50']:>10.6g} {unit} ({row['p20']:.4g}-{row['p80']:.4g})" if values else f"error: {error}"
        print(f"{case:24} {impl:28} {dtype:7} {spread}" + (f"  x{ratio:.3g}" if ratio else ""), flush=True)
        return row


class Child:
    """A process that answers requests one by one, see `serve`. stderr goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        one_thread = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **one_thread},
            )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer, {"error": one line} where there is none."""
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        return json.loads(answer) if answer else {"error": f"the process ended with code {self._process.wait()}"}

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:  # a peer's thread that does not end with its interpreter
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: one JSON line in, one out, until stdin ends. What else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # a peer that fails is a result
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps(reply), file=answers, flush=True)


def interleaved(
    children: dict[str, Child], request: dict[str, Any], rounds: int, warm_up: int = WARM_UP
) -> dict[str, list[dict[str, Any]]]:
    """The answers of each child, asked in turn, round after round, so that all share what the machine is doing.

    The warm-up rounds are left out. A child that fails is not asked again: its one answer is the error.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    failed: dict[str, dict[str, Any]] = {}
    for number in range(warm_up + rounds):
        for name, child in children.items():
            if name in failed:
                continue
            found = child.ask(request)
            if "error" in found:
                failed[name] = found
            elif number >= warm_up:
                answers[name].append(found)
    return {name: [failed[name]] if name in failed else answers[name] for name in children}


def timed_rate(amounts: Iterator[int], seconds: float, most: float = float("inf")) -> dict[str, float]:
    """{"rate": sum of amounts per second, "cores": processor time per second}.

    Until the amounts end, `seconds` are over or `most` is reached.
    """
    gc.collect()
    gc.freeze()  # a full collection of what torch and others import takes 84 ms: it would hit one round of several
    total, start, used = 0, time.perf_counter(), time.process_time()
    for amount in amounts:
        total += amount
        if time.perf_counter() - start >= seconds or total >= most:
            break
    took = time.perf_counter() - start
    return {"rate": total / took, "cores": (time.process_time() - used) / took}
