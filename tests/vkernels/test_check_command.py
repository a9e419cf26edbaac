"""`python -m vkernels.check`: one page, what failed by name, an exit code; a crash stops nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch

import vkernels
from vkernels.check import __main__ as command
from vkernels.check import norms
from vkernels.check.judge import Check, Finding
from vkernels.registry import CannotRun, forced


def toy(name, *findings, error=None, op="rms_norm", small=True):
    def run(device, dtype):
        if error is not None:
            raise error
        return list(findings)

    return Check(op, name, run, (torch.float32,), small)


@pytest.fixture
def checks(monkeypatch):
    """Only what a test puts into vkernels.check.norms."""
    found = []
    monkeypatch.setattr(command, "modules", lambda: iter(["vkernels.check.norms"]))
    monkeypatch.setattr(norms, "CHECKS", found)
    return found


def page(capsys, *arguments):
    code = command.main(["--device", "cpu", *arguments])
    return code, capsys.readouterr()


def test_a_failure_a_crash_and_a_refusal(checks, capsys, tmp_path):
    checks += [
        toy("good", Finding("output 0", 1.0, 2.0)),
        toy("bad", Finding("output 0", 3.0, 2.0), Finding("gradient 1", math.nan, 1.0)),
        toy("broken", error=IndexError("no such row\nsecond line")),
        toy("too wide", error=CannotRun("the forced backend cannot run: the heads are too wide")),
        toy("exact", Finding("output 0", 0.0, 0.0)),
    ]
    code, out = page(capsys, "--json", str(tmp_path / "all.json"), "--backend", "torch")
    assert code == 1
    lines = out.out.splitlines()
    assert lines[1].split()[:3] == ["rms_norm", "torch", "FAILED"]
    assert "4 cases, 1 not taken" in lines[1]
    assert "rms_norm, torch, float32, bad: output 0: error 3, at most 2 expected" in lines
    assert "rms_norm, torch, float32, bad: gradient 1: error nan, at most 1 expected" in lines
    assert "rms_norm, torch, float32, broken: IndexError: no such row" in lines
    assert lines[-1].startswith("3 of 5 fine")
    rows = json.loads((tmp_path / "all.json").read_text())
    assert [row["crashed"] for row in rows] == ["", "", "IndexError: no such row", "", ""]
    assert rows[0]["findings"] == [{"what": "output 0", "error": 1.0, "bound": 2.0}]
    assert forced("rms_norm") is None


def test_a_choice_that_was_forced_before_stays(checks, capsys):
    checks.append(toy("good"))
    with vkernels.force("rms_norm", "torch"):
        assert page(capsys)[0] == 0
        assert forced("rms_norm") == "torch"


def test_every_backend_serves_its_own_run(checks, capsys):
    seen = []

    def run(device, dtype):
        seen.append(forced("rms_norm"))
        return []

    checks.append(Check("rms_norm", "who", run, (torch.float32,)))
    code, out = page(capsys)
    assert (code, seen) == (0, list(vkernels.backends("rms_norm", torch.device("cpu"))))
    assert [line.split()[1] for line in out.out.splitlines()[1:-1]] == seen


def test_choosing_ops_and_sizes(checks, capsys):
    checks += [toy("large", small=False, op="swiglu"), toy("small", op="swiglu"), toy("other")]
    code, out = page(capsys, "--op", "swiglu", "--quick", "--backend", "torch")
    assert code == 0
    assert "1 case  " in out.out
    assert "rms_norm" not in out.out
    code, out = page(capsys, "--op", "swigloo")
    assert (code, out.err) == (2, "error: no checks of swigloo\n")


def test_a_check_of_what_is_no_op(checks, capsys):
    checks.append(toy("tables", Finding("output 0", 1.0, 1.0), op="rope_tables"))
    code, out = page(capsys)
    assert code == 0
    assert out.out.splitlines()[1].split()[:3] == ["rope_tables", "-", "ok"]


def test_a_module_that_cannot_be_imported(monkeypatch, capsys):
    monkeypatch.setattr(command, "modules", lambda: iter(["vkernels.check.norms", "vkernels.check.missing"]))
    code, out = page(capsys, "--op", "rms_norm", "--quick", "--backend", "torch")
    assert code == 1
    assert "vkernels.check.missing, -, -, import: ModuleNotFoundError" in out.out


def test_many_failures_do_not_fill_the_page(checks, capsys):
    checks += [toy(f"bad {i}", Finding("output 0", 3.0, 2.0)) for i in range(30)]
    _, out = page(capsys, "--backend", "torch")
    assert "... and 10 more (--json FILE has all)" in out.out


def test_large_cases_are_left_out_when_the_time_is_over(checks, capsys):
    checks += [toy("large", Finding("output 0", 9.0, 1.0), small=False), toy("small", Finding("output 0", 0.5, 1.0))]
    code, out = page(capsys, "--backend", "torch", "--budget", "-1")
    assert code == 0
    assert "ok     1 case, 1 left out" in out.out.splitlines()[1]


@pytest.mark.slow
def test_processes_of_their_own(capsys, tmp_path):
    """What a child finds reaches the page and the file."""
    file = tmp_path / "all.json"
    ops = ["--op", "fsq_dequantize", "--op", "rms_norm", "--backend", "torch"]
    code, out = page(capsys, "--jobs", "2", "--quick", *ops, "--json", str(file))
    assert code == 0, out.out
    assert [line.split()[:3] for line in out.out.splitlines()[1:-1]] == [
        ["fsq_dequantize", "torch", "ok"], ["rms_norm", "torch", "ok"]
    ]  # fmt: skip
    assert {row["op"] for row in json.loads(file.read_text())} == {"fsq_dequantize", "rms_norm"}


def test_a_process_that_dies_is_a_crash_of_its_op(tmp_path):
    (dead,) = command._in_process(
        [command.sys.executable, "-c", "raise SystemExit('out of memory')"], "x", tmp_path, 60
    )
    assert dead.crashed == "exit code 1: out of memory"
    assert not dead.fine


def test_the_interpreter_is_not_asked_for_half_precision():
    check = Check("rms_norm", "x", None, (torch.float32, torch.bfloat16, torch.float64))
    cpu = torch.device("cpu")
    assert command.dtypes_of(check, "triton", cpu) == [torch.float32, torch.float64]
    assert command.dtypes_of(check, "torch", cpu) == list(check.dtypes)
    assert command.dtypes_of(check, "triton", torch.device("cuda")) == list(check.dtypes)


def test_every_op_has_checks():
    assert {c.op for c in command.collect([])} >= set(vkernels.registry.ops())


@pytest.mark.slow
def test_all_small_checks_on_this_machine(capsys):
    code, out = page(capsys, "--quick")
    assert code == 0, out.out
    assert len(out.out.splitlines()) <= 60
