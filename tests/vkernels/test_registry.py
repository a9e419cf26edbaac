"""Backends: chosen by device, logged once, forced, refused with a reason; fake tensors; what importing costs."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vkernels
from vkernels import measured, registry


@pytest.fixture
def toy(monkeypatch):
    """A table with one op of two backends, the first for the meta device only."""

    def only_meta(device):
        return None if device.type == "meta" else f"no meta device but {device.type}"

    first = registry.Backend(lambda x: "first", None, only_meta)
    second = registry.Backend(lambda x: "second", None, registry.on_cpu)
    monkeypatch.setattr(registry, "_table", {"toy": {"first": first, "second": second}})
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.setattr(registry, "_forced", {})
    return lambda device="cpu": registry.select("toy", torch.device(device)).forward(None)


def test_the_first_backend_that_can_run_is_chosen_and_logged_once(toy, caplog):
    with caplog.at_level(logging.INFO, logger="vkernels"):
        assert [toy(), toy(), toy("meta")] == ["second", "second", "first"]
    assert [r.message for r in caplog.records] == ["toy on cpu: backend second", "toy on meta: backend first"]


def test_a_forced_backend_that_cannot_run_raises(toy):
    with vkernels.force("toy", "first"):
        with pytest.raises(ValueError, match=r"vkernels\.toy.*'first'.*no meta device but cpu"):
            toy()
        assert toy("meta") == "first"
    assert toy() == "second"


def test_no_backend_at_all_raises(toy):
    with pytest.raises(ValueError, match="no backend runs on cuda"):
        toy("cuda")


def test_force_nests_and_lasts(toy):
    vkernels.force("toy", "second")
    with pytest.raises(ValueError):
        toy("meta")
    with vkernels.force("toy", "first"):
        assert toy("meta") == "first"
    with pytest.raises(ValueError):
        toy("meta")
    vkernels.force("toy", None)
    assert toy("meta") == "first"


def test_unknown_names_are_errors(toy):
    with pytest.raises(ValueError, match="no backend 'third'; it has first, second"):
        vkernels.force("toy", "third")
    for backend in ("first", None):
        with pytest.raises(ValueError, match="no op 'toi'"):
            vkernels.force("toi", backend)


def test_every_op_runs_on_the_cpu():
    for op in registry.ops():
        assert registry._choose(op, torch.device("cpu"), {}, op) in {"cpu", "torch"}


def test_the_backward_pass_uses_the_same_choice(monkeypatch):
    calls = []
    backend = registry._table["swiglu"]["torch"]
    spy = backend._replace(backward=lambda *args: calls.append("torch") or backend.backward(*args))
    monkeypatch.setitem(registry._table["swiglu"], "torch", spy)
    x = torch.randn(3, 4, requires_grad=True)
    with vkernels.force("swiglu", "torch"):
        vkernels.swiglu(x, x.detach()).sum().backward()
    vkernels.swiglu(x, x.detach()).sum().backward()
    assert calls == ["torch"]


def test_without_gradients_nothing_is_recorded():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    with torch.no_grad():
        assert vkernels.rms_norm(x, w).grad_fn is None
    assert vkernels.rms_norm(x.detach(), w).grad_fn is None
    assert vkernels.rms_norm(x, w).grad_fn is not None


def test_second_derivatives_are_refused_not_wrong():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    (dx,) = torch.autograd.grad(vkernels.rms_norm(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_block_runs_forward_and_backward_on_fake_tensors():
    """Shapes and dtypes alone carry a block through: no data is touched."""
    with FakeTensorMode():
        T, C = 10, 16
        d = {"dtype": torch.bfloat16, "requires_grad": True}
        table, gain, head = torch.empty(128, C, **d), torch.empty(C, **d), torch.empty(128, C, **d)
        ids = torch.zeros(T, dtype=torch.int32)
        cos = torch.empty(T, 4)
        cu = torch.empty(3, dtype=torch.int32)
        x = vkernels.rms_norm(vkernels.embed(ids, [table], [0], sizes=[100]), gain)
        q, k = vkernels.rope(x.view(T, 2, 8), x.view(T, 2, 8), cos, cos)
        x = x + vkernels.varlen_attention(q, k, x.view(T, 2, 8), cu, max_seqlen_q=16).view(T, C)
        x = vkernels.swiglu(x, x)
        codes, codes_ids = vkernels.fsq_quantize(x[:, :2], [8, 8])
        x = x + torch.nn.functional.pad(codes, (0, C - 2))
        total, count = vkernels.linear_cross_entropy(x, [head], [0], ids, sizes=[100])
        total.sum().backward()
        nearest = vkernels.vq_nearest(x.float(), torch.empty(5, C))
        counts, sums = vkernels.vq_code_sums(x, nearest, 5)
        vkernels.vq_ema_update(counts, sums, sums.clone(), counts.clone(), sums.clone(), 0.9, 1e-5)
    assert [t.dtype for t in (x, total, count, nearest, codes_ids, sums)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.int32,
        torch.int32,
        torch.float32,
    ]
    assert table.grad.shape == (128, C)
    assert head.grad.shape == (128, C)
    assert vkernels.fsq_dequantize(torch.arange(3), [8, 8]).shape == (3, 2)


def test_import_needs_no_triton():
    blocked = "import sys; sys.modules['triton'] = None; import vkernels; assert 'vtrain' not in sys.modules"
    subprocess.run([sys.executable, "-c", blocked], check=True)


@pytest.fixture
def measured_order(monkeypatch, tmp_path):
    """A table of measurements for every device, given as a dictionary."""

    def use(table):
        (tmp_path / "toy-gpu.json").write_text(json.dumps(table))
        monkeypatch.setattr(measured, "FOLDER", tmp_path)
        monkeypatch.setattr(measured, "_gpu", lambda device: measured.slug("Toy (GPU)"))

    measured._table.cache_clear()
    yield use
    measured._table.cache_clear()


def test_the_measured_order_comes_first(toy, monkeypatch, measured_order):
    def no_wide(facts):
        return "the heads are too wide" if facts["D"] > 128 else None

    def named(name, takes=registry.takes_all):
        return registry.Backend(lambda: name, None, registry.anywhere, takes)

    monkeypatch.setattr(registry, "_table", {"toy": {"a": named("a"), "b": named("b", no_wide), "c": named("c")}})
    measured_order({"toy": [{"where": {"mask": "causal"}, "order": ["b", "c"]}],
                    "toy_backward": [{"where": {}, "order": ["c"]}]})  # fmt: skip

    def chosen(name="toy", **facts):
        return registry.select("toy", torch.device("cpu"), facts, name).forward()

    assert chosen(mask="causal", D=64) == "b"
    assert chosen(mask="causal", D=256) == "c"  # b does not take it
    assert chosen(mask="window", D=64) == "a"  # not measured: the order of the table
    assert chosen("toy_backward", mask="window", D=64) == "c"
    with vkernels.force("toy", "b"), pytest.raises(ValueError, match="'b' cannot run: the heads are too wide"):
        chosen(mask="causal", D=256)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "GPUs only" in registry.on_gpu(torch.device("cpu"))
    assert registry.on_gpu(torch.device("cuda", 0)) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert registry.on_gpu(torch.device("cpu")) is None
