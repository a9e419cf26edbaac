"""Timing of implementations beside each other on one device, its ceilings, and what it looks like meanwhile.

On a GPU: events around each call with the L2 cache flushed before it, as triton.testing.do_bench does, but inside a
time box; on the CPU: the clock. Implementations take turns, round after round; a value is the median of one round.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 << 20  # more than any L2
HEAD_START = 200_000  # clock cycles, 0.1 ms: the host is ahead of the GPU when the timed call begins
ROUNDS = 5
MOST_CALLS = 200  # of a round
COPY_BYTES = {"cuda": (64 << 20, 256 << 20, 1 << 30, 4 << 30), "cpu": (16 << 20, 64 << 20)}
GEMM_SIZE = {"cuda": 8192, "cpu": 512}


class Ceilings(NamedTuple):
    """Of this device, in this process: bytes per second of a copy (read + written), FLOP/s of a matrix product."""

    bandwidth: float
    flops: float

    def floor(self, flops: float, moved: float) -> float:
        """The shortest time in which so much could be done, in seconds."""
        return max(flops / self.flops, moved / self.bandwidth)


class Timer:
    """Times calls on one device, in microseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.on_gpu else None

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def times(self, call: Callable[[], object], seconds: float) -> list[float]:
        """The times of calls one by one, for about so many seconds; at least one."""
        end, found = time.perf_counter() + seconds, []
        one = self._on_gpu if self.on_gpu else self._on_cpu
        while len(found) < MOST_CALLS:
            found.append(one(call))
            if time.perf_counter() > end:
                break
        return found

    def _on_cpu(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    def _on_gpu(self, call: Callable[[], object]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START)
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e3

    def host_time(self, call: Callable[[], object], calls: int = 5) -> float:
        """How long the host is busy with a call, in microseconds: the shortest of a few."""
        found = []
        for _ in range(calls):
            self.synchronize()
            found.append(self._on_cpu(call))
        self.synchronize()
        return min(found)

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a CUDA graph to replay; on the CPU the call itself."""
        if not self.on_gpu:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Device memory that a call takes at its peak beyond what is there before it; None on the CPU."""
        if not self.on_gpu:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def in_turn(
    timer: Timer, calls: dict[str, Callable[[], Callable[[], object]]], seconds: float, rounds: int = ROUNDS
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time implementations in turn. -> ({name: the median of each round}, {name: why it failed}).

    calls: name -> what makes the call for a round (an output to differentiate, say), outside the timing; each was run
    before. All rounds together take about `seconds`; when twice as many are over, the rounds that were made have to do.
    A call that takes longer than its share of all rounds is made once.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    turns, share, box = dict(calls), seconds / len(calls) if calls else 0.0, time.perf_counter() + 2 * seconds
    for number in range(rounds + 1):  # the first only warms up
        for name, prepare in list(turns.items()):
            try:
                middle = statistics.median(timer.times(prepare(), share / rounds if number else 0.0))
            except Exception as error:  # a peer that fails is a result
                errors[name] = one_line(error)
                found[name] = []
                del turns[name]
                continue
            if number or middle > share * 1e6:
                found[name].append(middle)
            if not number and found[name]:
                del turns[name]
        if number and time.perf_counter() > box:
            break
    return found, errors


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def copy_bandwidth(timer: Timer, size: int, seconds: float = 0.5) -> list[float]:
    """Bytes per second, read + written, of copies of `size` bytes of random data."""
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: lambda: target.copy_(source)}
    return [2 * size / us * 1e6 for us in in_turn(timer, calls, seconds)[0]["copy"]]


def matrix_product(timer: Timer, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A product of random square matrices, and its floating-point operations."""
    n = GEMM_SIZE[timer.device.type]
    a, b = (torch.randn(n, n, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * n**3


def gemm_burst(timer: Timer, dtype: torch.dtype, seconds: float = 0.5) -> list[float]:
    """FLOP/s of single matrix products."""
    call, flops = matrix_product(timer, dtype)
    return [flops / us * 1e6 for us in in_turn(timer, {"gemm": lambda: call}, seconds)[0]["gemm"]]


def gemm_sustained(timer: Timer, dtype: torch.dtype, seconds: float) -> tuple[list[float], list[dict[str, str]]]:
    """FLOP/s in the stretches of an endless loop of matrix products, and the clocks during each."""
    call, flops = matrix_product(timer, dtype)
    rates, clocks = [], []
    end = time.perf_counter() + seconds
    while not rates or time.perf_counter() < end:
        timer.synchronize()
        reading = start_reading()
        start, calls = time.perf_counter(), 0
        while time.perf_counter() < start + min(1.0, seconds / 3):
            for _ in range(20):
                call()
            calls += 20
            timer.synchronize()  # keeps the queue short
        rates.append(flops * calls / (time.perf_counter() - start))
        clocks.append(reading())
    return rates, clocks


READINGS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")


def start_reading() -> Callable[[], dict[str, str]]:
    """Ask nvidia-smi for clocks, power and temperature without waiting; the call gives them, {} without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(READINGS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return dict

    def answer() -> dict[str, str]:
        try:
            output, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {}
        return dict(zip(READINGS, (value.strip() for value in output.split(",")))) if process.returncode == 0 else {}

    return answer


@contextlib.contextmanager
def free_afterwards(device: torch.device) -> Iterator[None]:
    """Give the memory of a case back before the next one."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
