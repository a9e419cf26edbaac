"""The benches of a device: kernels op by op, or whole training steps, each beside its strongest peers.

    PYTHONPATH=. python bench/run.py --suite kernels|e2e [--budget SECONDS] [--out DIR] [--only REGEX] [--without PEER]
    PYTHONPATH=. python bench/run.py --table --out DIR      # rows of a GPU -> kernels/vkernels/measured/<gpu>.json

The first rows are the ceilings of the device. Cases follow, the most valuable first, each in its share of the time that
is left; a row is written as soon as it is known, also of what failed, is not installed, or had no time left. On the CPU
it is a dry run: small sizes, the same program. docs/kernels.md is made of the rows.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cases
import table
import torch
from gpu import COPY_BYTES, Ceilings, Timer, copy_bandwidth, free_afterwards, gemm_burst, gemm_sustained
from harness import Rows
from measure import NO_TIME, Bench

from vkernels.measured import slug

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
MOST_SECONDS = 12.0  # of timing a case: 3 passes of 7 implementations, 5 rounds of 0.1 s each


class Budget:
    """The time that is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def ceilings(rows: Rows, timer: Timer, dtype: torch.dtype, sustained: float) -> Ceilings:
    """Measure and write what the device can do at most."""
    kind = timer.device.type
    bandwidths = []
    for size in COPY_BYTES[kind]:
        with free_afterwards(timer.device):
            found = copy_bandwidth(timer, size)
        rows.add("copy", "torch copy_", [x / 1e9 for x in found], "GB/s", shape={"bytes": size}, device=kind)
        bandwidths.append(statistics.median(found))
    name = str(dtype).removeprefix("torch.")
    burst = gemm_burst(timer, dtype)
    rows.add("gemm burst", "torch mm", [x / 1e12 for x in burst], "TFLOP/s", dtype=name, device=kind)
    rates, clocks = gemm_sustained(timer, dtype, sustained)
    common = {"dtype": name, "device": kind, "clocks": clocks}
    rows.add("gemm sustained", "torch mm", [x / 1e12 for x in rates], "TFLOP/s", **common)
    return Ceilings(max(bandwidths), statistics.median(burst))


def kernels(rows: Rows, bench: Bench, chosen: Sequence[cases.Case], budget: Budget) -> None:
    for number, case in enumerate(chosen):
        if budget.left() <= 0:
            rows.add(f"{case.op} forward", "-", [], "us", error=NO_TIME, op=case.op, name=case.name)
            continue
        share = budget.left() / (len(chosen) - number)
        with free_afterwards(bench.timer.device):
            bench.measure(case, min(share, MOST_SECONDS), budget.left)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", choices=["kernels", "e2e"])
    p.add_argument("--table", action="store_true", help="write the fastest backends of the rows in --out")
    p.add_argument("--budget", type=float, default=300.0, metavar="SECONDS")
    p.add_argument("--out", type=Path, help="folder of the rows (default: bench/results/<device>)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--only", default="", metavar="REGEX", help="cases whose `op name` it is found in")
    p.add_argument("--without", action="append", default=[], metavar="PEER", help="leave out those that begin so")
    p.add_argument("--sustained", type=float, default=10.0, metavar="SECONDS", help="of the endless matrix products")
    p.add_argument("--list", action="store_true", help="show the cases")
    return p


def device_name(device: str) -> str:
    return slug(torch.cuda.get_device_name()) if device == "cuda" else "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    out = args.out or Path(__file__).parent / "results" / device_name(args.device)
    if args.table:
        try:
            print(table.write(out))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    chosen = [c for c in cases.load() if re.search(args.only, f"{c.op} {c.name}")]
    if args.list:
        print("\n".join(f"{c.op:24} {c.name}" for c in chosen))
        return 0
    if args.suite is None:
        print("error: --suite kernels or --suite e2e (or --table, --list)", file=sys.stderr)
        return 2
    budget = Budget(args.budget)
    path = out / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{args.suite}.jsonl"
    timer, dtype = Timer(torch.device(args.device)), DTYPES[args.device]
    found = ceilings(Rows("ceilings", path), timer, dtype, min(args.sustained, args.budget / 20))
    rows = Rows(args.suite, path)
    if args.suite == "kernels":
        kernels(rows, Bench(rows, timer, found, dtype, args.without), chosen, budget)
    else:
        import e2e

        e2e.run(rows, timer, dtype, args.only, args.without, budget.left)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
