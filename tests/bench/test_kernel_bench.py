"""The kernel benches, without a GPU: cases compute the right thing, rows tell what happened, tables follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vkernels
from vkernels import measured, registry

ROOT = Path(__file__).resolve().parents[2]
GPU = "NVIDIA Toy 9000"


@pytest.fixture(autouse=True)
def nothing_forced():
    yield
    for op in registry.ops():
        vkernels.force(op, None)


def rows_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_every_case_computes_what_float64_does():
    """Ours and plain torch, outputs and gradients, at the sizes of a dry run."""
    import cases
    from measure import BASELINE, Implementation, Truth

    for case in cases.load():
        problem = case.make(cases.On(torch.device("cpu"), torch.float32), **case.small)
        truth = Truth(problem)
        for name, function in {"ours": problem.ours, BASELINE: problem.peers[BASELINE]()}.items():
            one, who = Implementation(problem, function), f"{case.op}, {case.name}, {name}"
            if problem.judged is not None:
                assert truth.error(one) < 1e-4, who
            one.prepare("forward" if problem.backward is None else "both")()
        assert problem.forward.bytes > 0, case
        assert case.small.keys() == case.full.keys(), case


def test_cases_of_one_op_differ_by_name_and_the_most_valuable_comes_first():
    import cases

    found = cases.load()
    assert len({(c.op, c.name) for c in found}) == len(found)
    assert found[0].op == "varlen_attention"
    assert {c.op for c in found} <= set(registry.ops())


def test_an_implementation_that_is_wrong_shows():
    import cases
    from measure import Implementation, Truth

    (case,) = [c for c in cases.load() if (c.op, c.name) == ("rms_norm", "T=32768 C=2048")]
    problem = case.make(cases.On(torch.device("cpu"), torch.float32), **case.small)
    assert Truth(problem).error(Implementation(problem, lambda x, w: vkernels.rms_norm(x, w) * 1.01)) > 5e-3

    def through(x, w):
        return vkernels.rms_norm(x, w).detach() + 0 * x  # right, but for its gradient

    assert Truth(problem).error(Implementation(problem, through)) > 0.5


def test_turns_are_interleaved_and_failures_kept():
    from gpu import Timer, in_turn

    calls = []

    def call(name, seconds=0.05):
        def run():
            calls.append(name)
            if name == "bad":
                raise RuntimeError("does not fit\nmore")
            time.sleep(seconds)

        return lambda: run

    timer = Timer(torch.device("cpu"))
    found, errors = in_turn(timer, {"a": call("a"), "bad": call("bad"), "slow": call("slow", 0.4)}, 1.0, rounds=2)
    assert calls[:3] == ["a", "bad", "slow"]
    assert (len(found["a"]), found["bad"], len(found["slow"])) == (2, [], 1)
    assert calls.count("bad") == calls.count("slow") == 1
    assert errors == {"bad": "RuntimeError: does not fit"}


def test_a_dry_run_writes_rows_and_the_page_and_no_table(tmp_path, capsys):
    import kernels_page
    import run
    import table
    from kernel_rows import Results

    arguments = ["--suite", "kernels", "--device", "cpu", "--budget", "3", "--out", str(tmp_path), "--sustained", "0.1"]
    assert run.main([*arguments, "--only", "swiglu", "--without", "torch.compile"]) == 0
    rows = rows_of(tmp_path)
    assert [r["case"] for r in rows if r["suite"] == "ceilings"] == ["copy", "copy", "gemm burst", "gemm sustained"]
    found = {(r["impl"], r["pass"]): r for r in rows if r["suite"] == "kernels"}
    assert {impl for impl, _ in found} == {"vkernels cpu", "vkernels torch", "torch eager", "Liger"}
    assert {p for _, p in found} == {"forward", "backward", "both"}
    assert found["Liger", "forward"]["error"] == "not installed: liger_kernel"
    ours = found["vkernels cpu", "forward"]
    assert [list(found["vkernels cpu", p]["facts"]) for p in ("forward", "backward", "both")] == [
        ["swiglu"], ["swiglu_backward"], []
    ]  # fmt: skip
    assert ours["ratio"] == pytest.approx(found["torch eager", "forward"]["p50"] / ours["p50"], rel=1e-2)
    assert ours["err"] < 1e-6
    assert (ours["bound"], ours["bytes"]) == ("bytes", 3 * 4 * 2048 * 1536)
    assert ours["gbs"] == pytest.approx(ours["bytes"] / ours["p50"] / 1e3, rel=1e-2)
    with pytest.raises(ValueError, match="rows of no GPU"):
        table.write(tmp_path)
    page = "\n".join(kernels_page.measured_tables(Results(rows)))
    assert "## Measured on a CPU" in page
    assert "| `swiglu` | T=2048 ffn=1536 | forward | cpu |" in page  # not the name of a GPU's size
    assert "| `rope` | | | not measured |" in page
    assert "no op has been run on a GPU" in page
    capsys.readouterr()


def test_no_time_left_is_a_row(tmp_path, capsys):
    import run

    arguments = ["--suite", "kernels", "--device", "cpu", "--budget", "0.01", "--out", str(tmp_path), "--only", "geglu"]
    assert run.main(arguments) == 0
    assert [r["error"] for r in rows_of(tmp_path) if r["suite"] == "kernels"] == ["no time left"]
    assert run.main(["--list", "--only", "geglu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "geglu"


def row(impl, p50, what="forward", op="varlen_attention", name="docs 8k", **more):
    """A row as a GPU would give it."""
    facts = {op + ("_backward" if what == "backward" else ""): {"head_dim": 128}} if "vkernels" in impl else {}
    found = {"suite": "kernels", "op": op, "name": name, "pass": what, "impl": impl, "facts": facts, "error": "why"}
    found |= {"p20": p50, "p50": p50, "p80": p50, "roofline": 0.5, "ratio": 2.0, "err": 1e-3, "env": {"gpu": GPU}}
    found |= {"dtype": "bfloat16", "case": f"{op} {what}", "unit": "us", "device": "cuda", "shape": {"T": 1}}
    return found | more


def test_the_table_has_the_fastest_first_and_the_registry_reads_it(tmp_path, monkeypatch):
    import table

    rows = [row("vkernels triton", 90), row("vkernels flash", 60), row("vkernels torch", None), row("Liger", 1)]
    rows += [row("vkernels triton", 10, shape={"T": 2}), row("vkernels flash", 90, shape={"T": 2})]
    rows += [row("vkernels triton", 5, "backward"), row("vkernels flash", 4, "backward")]
    rows += [row("vkernels triton", 6, "backward"), row("vkernels cuda", 1, device="cpu", env={"cpu": "toy"})]
    (tmp_path / "2026.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(measured, "FOLDER", tmp_path / "measured")
    path = table.write(tmp_path)
    assert path.name == "nvidia-toy-9000.json"
    where = {"head_dim": 128}
    assert json.loads(path.read_text()) == {
        "varlen_attention": [{"where": where, "order": ["triton", "flash"]}],
        "varlen_attention_backward": [{"where": where, "order": ["flash", "triton"]}],
    }
    monkeypatch.setattr(measured, "_gpu", lambda device: "nvidia-toy-9000")
    measured._table.cache_clear()
    assert measured.order("varlen_attention_backward", torch.device("cuda"), where) == ("flash", "triton")
    assert measured.order("varlen_attention", torch.device("cuda"), {"head_dim": 64}) == ()
    measured._table.cache_clear()


def test_targets_are_measured_missed_or_neither():
    import kernels_page
    from kernel_rows import TARGETS, Results

    rows = [row("vkernels triton", 10), row("torch varlen_attn", 16), row("vkernels flash", 8), row("cuDNN SDPA", None)]
    page = "\n".join(kernels_page.target_table(Results(rows)))
    assert f"| | target | {GPU} |" in page
    assert "| attention forward, beside torch's flash (FA2) | 1.5 x | 1.60 |" in page
    assert "| attention forward, beside the best peer | 0.9 x | 0.80 (missed) |" in page
    assert "| attention backward, beside the best peer | 0.85 x | not measured |" in page
    nothing = "\n".join(kernels_page.target_table(Results([])))
    assert nothing.count("not measured") == len(TARGETS)
    assert "| varlen_attention | docs 8k" not in "\n".join(kernels_page.measured_tables(Results([])))
    cells = "`varlen_attention` | docs 8k | forward | triton | 10 us | 2.00 | vkernels flash | 0.80 | 50% | 1.0e-03"
    assert f"| {cells} |" in list(kernels_page.op_table(Results(rows), GPU, "cuda"))


def test_every_target_names_a_case_that_exists():
    """A case that is renamed must not leave its target unmeasured for ever."""
    import cases
    from kernel_rows import OWN, TARGETS, Results

    rows = []
    for case in cases.load():
        problem = case.make(cases.On(torch.device("cpu"), torch.float32), **case.small)
        for what in problem.passes:
            for impl in (OWN[1], *problem.peers):
                rows.append(row(impl, 7, what, case.op, case.name))
    for name in ("qwen3-0.6b, even", "qwen3-1.7b, even"):
        for impl in ("vtrain", "torch.compile, Liger head", "HF + Liger"):
            rows.append(row(impl, 7, suite="e2e", name=name, mfu=0.4))
    results = Results(rows)
    assert [t.label for t in TARGETS if t.value(results, GPU) is None] == []


def test_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    import plot_kernels
    from kernel_rows import Results

    results = Results([row("vkernels triton", 10), row("torch varlen_attn", 16), row("Liger", 5, op="swiglu")])
    assert [(p.op, speed) for p, speed, _ in plot_kernels.bars(results, GPU)] == [("varlen_attention", 1.6)]
    plot_kernels.draw(tmp_path / "x.png", results, GPU)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_signatures_as_the_page_shows_them():
    import kernels_page

    def short(x: torch.Tensor, kind: str = "none") -> torch.Tensor: ...

    def long(a: tuple[int, int] = (1, 2), *, some_name: dict[str, int] | None = None, another_longer: float = 1e-6,
             yet_another_one: list[int] | None = None) -> None: ...  # fmt: skip

    assert kernels_page.signature("short", short) == "short(x: Tensor, kind: str = 'none') -> Tensor"
    lines = kernels_page.signature("long", long).splitlines()
    assert (lines[0], lines[-1]) == ("long(", ") -> None")
    assert lines[1].startswith("    a: tuple[int, int] = (1, 2), *, some_name: dict[str, int] | None = None,")
    assert max(map(len, lines)) <= kernels_page.WIDTH


def test_the_page_is_what_the_package_and_the_rows_say():
    import kernels_page

    assert kernels_page.TARGET.read_text() == kernels_page.page(), "run PYTHONPATH=. python bench/kernels_page.py"


def test_the_environment_without_git(monkeypatch):
    import harness

    monkeypatch.setenv("PATH", "")
    assert harness._git("status") == ""
    monkeypatch.setenv("VTRAIN_COMMIT", "abc")
    harness._commit.cache_clear()
    assert harness.environment()["commit"] == "abc"
    harness._commit.cache_clear()


def test_the_calls_of_a_gpu_are_made_in_order(monkeypatch):
    """With a GPU that is made up: flush, start, call, stop, wait; a graph is warmed up on a stream of its own."""
    from contextlib import nullcontext
    from unittest.mock import MagicMock

    from gpu import Timer

    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, other):
            return 0.25

    timer = Timer(torch.device("cpu"))
    timer.on_gpu, timer._flush = True, MagicMock(zero_=lambda: order.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    assert timer.times(lambda: order.append("call"), 0.0) == [250.0]
    assert order == ["flush", "sleep", "record", "call", "record", "wait"]
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    calls = []
    replay = timer.captured(lambda: calls.append(1))
    assert len(calls) == 4
    assert replay is torch.cuda.CUDAGraph().replay


def test_a_capture_is_the_call_itself_on_the_cpu():
    from gpu import Timer, start_reading

    timer = Timer(torch.device("cpu"))
    assert timer.captured(test_the_figure) is test_the_figure
    assert timer.peak_bytes(lambda: None) is None
    assert start_reading()() == {}  # no nvidia-smi here


@pytest.mark.slow
def test_training_steps_of_every_peer_that_is_here(tmp_path, capsys):
    import run

    arguments = ["--suite", "e2e", "--device", "cpu", "--budget", "60", "--out", str(tmp_path), "--sustained", "0.1"]
    assert run.main([*arguments, "--without", "torch.compile"]) == 0
    rows = [r for r in rows_of(tmp_path) if r["suite"] == "e2e"]
    assert {r["name"] for r in rows} == {"tiny, even", "tiny, mixed"}
    done = {(r["name"], r["impl"]) for r in rows if r["p50"]}
    assert done >= {(name, impl) for name in ("tiny, even", "tiny, mixed") for impl in ("vtrain", "torch eager", "HF")}
    for r in rows:
        if r["p50"]:
            assert 5 < r["loss"] < 8, r["impl"]  # ln 1000 = 6.9
            assert r["tokens_per_s"] == pytest.approx(512 / r["p50"] * 1e6, rel=1e-2)
    capsys.readouterr()


@pytest.mark.slow
def test_the_script_dry_runs(tmp_path):
    """The steps on the CPU in their shares of 160 seconds; what is not installed or has no time left is a row."""
    steps = "check,sanitizer,kernels,e2e,table"  # not build: other tests are using what it makes
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment["ONLY"] = "quick_gelu|tiny even"
    command = ["bash", str(ROOT / "scripts" / "bench_gpu.sh"), "--dry-run", "--steps", steps, "160"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "check.json").read_text())
    assert {r["suite"] for r in rows_of(tmp_path)} == {"ceilings", "kernels", "e2e"}
    assert "sanitizer: left out" in done.stdout
    wrong = subprocess.run(["bash", str(ROOT / "scripts" / "bench_gpu.sh"), "--fast"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--fast" in wrong.stderr
