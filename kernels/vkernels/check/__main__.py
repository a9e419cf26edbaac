"""Every op against its float64 truth, on every backend that runs on this machine: one page, exit code 1 on a failure.

    python -m vkernels.check [--op NAME] [--backend NAME] [--device cpu|cuda] [--quick] [--jobs N] [--json FILE]

An error is judged beside the one that eager torch makes in the same dtype; the figures are the largest error over its
bound, at most 1 where all is well. A case that a backend does not take (it says why) is counted, not judged. What fails
or crashes is named under the table, and nothing else stops for it. --jobs runs every op in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import pkgutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

import vkernels
import vkernels.check
from vkernels import registry
from vkernels.check.judge import Check, Finding

MOST_FAILURES = 20  # named on the page; the JSON file has all


class Result(NamedTuple):
    """One check in one dtype on one backend: what was found, or why there is nothing."""

    op: str
    backend: str
    case: str
    dtype: str
    findings: Sequence[Finding] = ()
    refused: str = ""
    crashed: str = ""
    left_out: bool = False

    @property
    def fine(self) -> bool:
        return not self.crashed and all(f.fine for f in self.findings)

    @property
    def worst(self) -> float:
        """The largest error over its bound."""
        return max((_share(f) for f in self.findings), default=0.0)

    def complaints(self) -> Iterator[str]:
        who = f"{self.op}, {self.backend}, {self.dtype}, {self.case}"
        if self.crashed:
            yield f"{who}: {self.crashed}"
        for f in self.findings:
            if not f.fine:
                yield f"{who}: {f.what}: error {f.error:.3g}, at most {f.bound:.3g} expected"


def _share(finding: Finding) -> float:
    if finding.error == 0:
        return 0.0
    return finding.error / finding.bound if finding.bound and finding.error == finding.error else math.inf


def modules() -> Iterator[str]:
    """The names of the modules that may have checks."""
    for module in pkgutil.iter_modules(vkernels.check.__path__):
        if module.name not in ("__main__", "judge"):
            yield f"vkernels.check.{module.name}"


def collect(crashes: list[Result]) -> list[Check]:
    """All checks, by op; a module that cannot be imported is a crash of its own."""
    found: list[Check] = []
    for name in modules():
        try:
            found += getattr(importlib.import_module(name), "CHECKS", [])
        except Exception as error:
            crashes.append(Result(name, "-", "import", "-", crashed=_one_line(error)))
    return sorted(found, key=lambda check: check.op)  # stable: the cases of an op stay in order


def run(check: Check, backend: str, device: torch.device, dtype: torch.dtype, late: bool = False) -> Result:
    """The check with its op served by that backend; "-" where the op has none to choose from. late: leave it out."""
    about = (check.op, backend, check.name, str(dtype).removeprefix("torch."))
    if late:
        return Result(*about, left_out=True)
    before = registry.forced(check.op) if backend != "-" else None
    try:
        if backend != "-":
            vkernels.force(check.op, backend)
        return Result(*about, findings=check.run(device, dtype))
    except registry.CannotRun as reason:
        return Result(*about, refused=_one_line(reason))
    except Exception as error:  # also what the device reports: the next check may still work
        return Result(*about, crashed=_one_line(error))
    finally:
        if backend != "-":
            vkernels.force(check.op, before)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def backends_of(op: str, device: torch.device, wanted: str) -> list[str]:
    if op not in registry.ops():
        return ["-"]
    return [name for name in registry.backends(op, device) if wanted in ("", name)]


def lines(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the page, one for each op and backend."""
    for op, backend in dict.fromkeys((r.op, r.backend) for r in results):
        yield line(op, backend, [r for r in results if (r.op, r.backend) == (op, backend)])


def line(op: str, backend: str, results: Sequence[Result]) -> str:
    judged = [r for r in results if not r.refused and not r.left_out]
    worst: dict[str, float] = {}
    for r in judged:
        worst[r.dtype] = max(worst.get(r.dtype, 0.0), r.worst)
    figures = "  ".join(f"{dtype} {share:.2f}" for dtype, share in worst.items())
    counts = {"not taken": sum(bool(r.refused) for r in results), "left out": sum(r.left_out for r in results)}
    cases = f"{len(judged)} case{'' if len(judged) == 1 else 's'}"
    cases += "".join(f", {n} {what}" for what, n in counts.items() if n)
    verdict = "FAILED" if not all(r.fine for r in judged) else "ok" if judged else "-"
    return f"{op:22} {backend:12} {verdict:6} {cases:26} {figures}"


def dtypes_of(check: Check, backend: str, device: torch.device) -> list[torch.dtype]:
    """Its dtypes; in Triton's interpreter without the half-precision ones, in which it computes wrongly."""
    interpreted = device.type == "cpu" and backend == "triton"
    return [d for d in check.dtypes if not interpreted or d.itemsize > 2]


def judge_all(checks: Sequence[Check], device: torch.device, backend: str, budget: float) -> list[Result]:
    """Run everything in this process, the small cases first, and print the lines of each op as soon as it is done.

    Large cases are left out for which an op has no time any more of its share of the `budget`.
    """
    end, results = time.monotonic() + budget, []
    ops = list(dict.fromkeys(check.op for check in checks))
    for number, op in enumerate(ops):
        own = sorted((c for c in checks if c.op == op), key=lambda c: not c.small)
        work = [(c, b, d) for c in own for b in backends_of(op, device, backend) for d in dtypes_of(c, b, device)]
        stop = time.monotonic() + (end - time.monotonic()) / (len(ops) - number)
        mine = [run(c, b, device, d, late=not c.small and time.monotonic() > stop) for c, b, d in work]
        print("\n".join(lines(mine)), flush=True)
        results += mine
    return results


def judge_in_processes(args: argparse.Namespace, ops: Sequence[str]) -> list[Result]:
    """The same with a process for each op, `--jobs` at a time: kernels compile side by side, crashes stay apart."""
    share = args.budget * args.jobs / len(ops)
    command = [sys.executable, "-m", "vkernels.check", "--device", args.device, "--budget", str(share)]
    command += ["--quick"] * args.quick + ["--backend", args.backend] * bool(args.backend)
    results = []
    with ThreadPoolExecutor(args.jobs) as pool, tempfile.TemporaryDirectory() as folder:
        done = pool.map(lambda op: _in_process([*command, "--op", op], op, Path(folder), 3 * share + 120), ops)
        for mine in done:
            print("\n".join(lines(mine)), flush=True)
            results += mine
    return results


def _in_process(command: Sequence[str], op: str, folder: Path, seconds: float) -> list[Result]:
    file = folder / f"{op}.json"
    try:
        done = subprocess.run(
            [*command, "--json", str(file)], capture_output=True, text=True, timeout=min(seconds, 1e6)
        )
    except subprocess.TimeoutExpired:
        return [Result(op, "-", "process", "-", crashed=f"not done after {seconds:.0f} s")]
    if not file.exists():
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return [Result(op, "-", "process", "-", crashed=f"exit code {done.returncode}: {last}"[:300])]
    rows = json.loads(file.read_text())
    return [Result(**{**row, "findings": [Finding(**f) for f in row["findings"]]}) for row in rows]


def report(results: Sequence[Result], seconds: float) -> int:
    """Name what failed. -> the exit code."""
    complaints = [complaint for r in results for complaint in r.complaints()]
    for complaint in complaints[:MOST_FAILURES]:
        print(complaint)
    if len(complaints) > MOST_FAILURES:
        print(f"... and {len(complaints) - MOST_FAILURES} more (--json FILE has all)")
    run = [r for r in results if not r.left_out]
    bad = sum(not r.fine for r in run)
    print(f"{len(run) - bad} of {len(run)} fine, {seconds:.0f} s")
    return int(bad > 0 or not run)


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [{**r._asdict(), "findings": [f._asdict() for f in r.findings]} for r in results]


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return f"vkernels on {name}, torch {torch.__version__}; the largest error of each dtype over its bound"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m vkernels.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--op", action="append", help="only this op; may be given several times")
    p.add_argument("--backend", default="", help="only this backend")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--quick", action="store_true", help="only the small cases")
    p.add_argument("--jobs", type=int, default=0, metavar="N", help="a process for each op, so many at a time")
    p.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="then leave large cases out")
    p.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    start, results = time.monotonic(), []
    checks = [c for c in collect(results) if (c.small or not args.quick) and (not args.op or c.op in args.op)]
    unknown = set(args.op or ()) - {c.op for c in checks}
    if unknown:
        print(f"error: no checks of {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but torch finds no CUDA device", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    print(machine(device), flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if args.jobs:
            results += judge_in_processes(args, list(dict.fromkeys(c.op for c in checks)))
        else:
            results += judge_all(checks, device, args.backend, args.budget)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(as_json(results), indent=1) + "\n")
    return report(results, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
