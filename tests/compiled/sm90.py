"""Compiles the kernels that a launch would start, for sm_90, on a machine without a GPU, and reads what came out.

The production launches run on meta tensors, so that every kernel is specialised exactly as a GPU would have it. What is
expected of it (registers, spills, shared memory, kinds of instructions) lies in `<op>.json` beside this file; run the
tests with VKERNELS_ACCEPT=1 to write what was found, and read the difference.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = 227 << 10  # bytes a block may have on Hopper
REGISTER_SLACK = 8  # how far register counts may drift without a word
# What is counted in the machine code, by the start of the instruction's name.
OPCODES = {"HGMMA": "wgmma", "HMMA": "mma", "DMMA": "mma", "UTMALDG": "tma_load", "UTMASTG": "tma_store",
           "USETMAXREG": "setmaxnreg", "STL": "spill", "LDL": "spill", "ATOM": "atomic", "RED": "atomic"}  # fmt: skip


class Sm90Driver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def launches() -> Iterator[list[tuple[str, Any]]]:
    """Inside, Triton launches compile for sm_90 instead of running: -> [(kernel name, compiled kernel)]."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, kernel))
        return kernel

    with mock.patch.object(driver, "_active", Sm90Driver()), mock.patch.object(JITFunction, "run", compile_only):
        yield found


def facts(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, warps and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts: dict[str, int] = {}
    for name in re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.M):
        for start, kind in OPCODES.items():
            if name.startswith(start) and not (start == "RED" and name.startswith("REDUX")):
                counts[kind] = counts.get(kind, 0) + 1
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": dict(sorted(counts.items())),
    }


def _output(tool: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / tool), *args], capture_output=True, text=True, check=True).stdout


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def check(op: str, cases: dict[str, Callable[[], Any]], *, spills: dict[str, int] | None = None) -> None:
    """Compile what each case launches and compare it with `<op>.json`; any difference is named in one line.

    Beyond that, of every kernel: no stack unless `spills` ({kernel name: bytes allowed}) grants it, shared memory that
    fits, no matrix instructions of the generations before Hopper.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for case, launch in cases.items():
        with launches() as kernels:
            launch()
        found[case] = [{"kernel": name, **facts(kernel)} for name, kernel in kernels]
        assert found[case], f"{op}, {case}: nothing was launched"
    wrong = [w for case, kernels in found.items() for k in kernels for w in _broken_rules(case, k, spills or {})]
    path = Path(__file__).parent / f"{op}.json"
    if os.environ.get("VKERNELS_ACCEPT") == "1":
        kept = json.loads(path.read_text())["cases"] if path.exists() else {}
        path.write_text(json.dumps({"triton": triton.__version__, "cases": {**kept, **found}}, indent=1) + "\n")
    expected = json.loads(path.read_text())
    if expected["triton"] == triton.__version__:  # another compiler may allocate otherwise; the rules hold for all
        for case in found:
            wrong += _differences(case, expected["cases"].get(case), found[case])
    assert not wrong, "\n".join([f"{op}:", *wrong])


def _broken_rules(case: str, kernel: dict[str, Any], spills: dict[str, int]) -> Iterator[str]:
    who = f"{case}, {kernel['kernel']}"
    if kernel["stack"] > spills.get(kernel["kernel"], 0):
        yield f"{who}: {kernel['stack']} bytes of stack, {spills.get(kernel['kernel'], 0)} are allowed"
    if kernel["shared"] > SHARED_LIMIT:
        yield f"{who}: {kernel['shared']} bytes of shared memory, Hopper has {SHARED_LIMIT}"
    if "mma" in kernel["instructions"]:
        yield f"{who}: matrix instructions older than Hopper's"


def _differences(case: str, expected: list | None, found: list) -> Iterator[str]:
    before, now = [k["kernel"] for k in expected or ()], [k["kernel"] for k in found]
    if before != now:
        yield f"{case}: launches {now}, expected {before}"
        return
    for old, new in zip(expected, found):
        who = f"{case}, {new['kernel']}"
        if abs(new["registers"] - old["registers"]) > REGISTER_SLACK:
            yield f"{who}: {new['registers']} registers, expected {old['registers']}"
        for key in ("stack", "shared", "warps"):
            if new[key] != old[key]:
                yield f"{who}: {key} {new[key]}, expected {old[key]}"
        if new["instructions"].keys() != old["instructions"].keys():
            yield f"{who}: instructions {sorted(new['instructions'])}, expected {sorted(old['instructions'])}"
