"""rms_norm, swiglu and rope against float64 and eager torch."""

import pytest
import torch
import torch.nn.functional as F
from op_check import compiles, judge, poison

import vkernels
from vkernels import _host, oracle

DTYPES = [torch.float32, torch.bfloat16]


def rotate_half(x, cos, sin):
    cos, sin = (torch.cat([t, t], -1).unsqueeze(1) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def angles(T, half, top=200_000):
    theta = torch.randint(top, (T, 1)).double() * 10000.0 ** -(torch.arange(half).double() / half)
    return theta.cos().float(), theta.sin().float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 64), (3, 5, 17), (257, 31), (2, 1, 128), (0, 8)])
def test_rms_norm(backend, shape, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(shape) * 3, torch.randn(shape[-1])
    judge(vkernels.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), oracle.rms_norm, [x, w], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (3, 5, 17), (257, 31), (0, 8)])
def test_swiglu(backend, shape, dtype):
    torch.manual_seed(0)
    gate, up = torch.randn(shape) * 4, torch.randn(shape)
    judge(vkernels.swiglu, lambda g, u: F.silu(g) * u, oracle.swiglu, [gate, up], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "Hq", "Hk", "D"), [(1, 1, 1, 2), (7, 4, 2, 32), (257, 3, 1, 10), (5, 7, 1, 128), (0, 2, 1, 8)]
)
def test_rope(backend, T, Hq, Hk, D, dtype):
    torch.manual_seed(0)
    cos, sin = angles(T, D // 2)

    def eager(q, k):
        return rotate_half(q, cos, sin), rotate_half(k, cos, sin)

    judge(
        lambda q, k: vkernels.rope(q, k, cos, sin),
        eager,
        lambda q, k: oracle.rope(q, k, cos, sin),
        [torch.randn(T, Hq, D), torch.randn(T, Hk, D)],
        dtype,
    )


def test_rope_turns_positions_into_relative_ones():
    theta = torch.arange(50).double()[:, None] * 10000.0 ** -(torch.arange(8).double() / 8)
    cos, sin = theta.cos().float(), theta.sin().float()
    a, b = torch.randn(16), torch.randn(16)
    q, k = vkernels.rope(a.expand(50, 1, 16), b.expand(50, 1, 16), cos, sin)
    scores = q[:, 0] @ k[:, 0].T
    for shift in (1, 7):
        torch.testing.assert_close(scores[shift:, shift:], scores[:-shift, :-shift], rtol=1e-4, atol=1e-4)


def test_extreme_gates_stay_finite(backend):
    gate = torch.tensor([-1e4, -100.0, -88.5, 0.0, 88.5, 1e4], requires_grad=True)
    y = vkernels.swiglu(gate, torch.ones(6))
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 0.0, 88.5, 1e4]), atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(gate.grad, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-30, rtol=1e-6)


def test_slices_of_merged_projections(backend):
    """Strided operands, as the decoder passes them, give what their contiguous copies give."""
    torch.manual_seed(0)
    gate, up = torch.randn(11, 2 * 24).chunk(2, -1)
    torch.testing.assert_close(vkernels.swiglu(gate, up), vkernels.swiglu(gate.contiguous(), up.contiguous()))
    qkv = torch.randn(11, (4 + 2 + 2) * 8)
    q, k, _ = (x.unflatten(1, (-1, 8)) for x in qkv.split([32, 16, 16], dim=1))
    cos, sin = angles(11, 4)
    for a, b in zip(vkernels.rope(q, k, cos, sin), vkernels.rope(q.contiguous(), k.contiguous(), cos, sin)):
        torch.testing.assert_close(a, b)
    x, w = torch.randn(20, 11).T, torch.randn(20)
    torch.testing.assert_close(vkernels.rms_norm(x, w), vkernels.rms_norm(x.contiguous(), w))


def test_gradcheck(backend):
    torch.manual_seed(0)
    d = {"dtype": torch.float64, "requires_grad": True}
    assert torch.autograd.gradcheck(vkernels.rms_norm, (torch.randn(3, 5, **d), torch.randn(5, **d)))
    assert torch.autograd.gradcheck(vkernels.swiglu, (torch.randn(3, 5, **d), torch.randn(3, 5, **d)))
    cos, sin = (t.double() for t in angles(3, 2))
    args = (torch.randn(3, 2, 4, **d), torch.randn(3, 1, 4, **d))
    assert torch.autograd.gradcheck(lambda q, k: vkernels.rope(q, k, cos, sin), args)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(level):
    torch.manual_seed(0)
    widest = _host.isa_level()
    _host.limit_isa(level)
    try:
        x, w = torch.randn(33, 37), torch.randn(37)
        judge(vkernels.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), oracle.rms_norm, [x, w], torch.float32)
        judge(vkernels.swiglu, lambda g, u: F.silu(g) * u, oracle.swiglu, [x, x + 1], torch.float32)
    finally:
        _host.limit_isa(widest)


def test_bitwise_repeatable_on_any_number_of_threads():
    torch.manual_seed(0)
    x, w = torch.randn(9000, 130), torch.randn(130)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 1):
            torch.set_num_threads(threads)
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = vkernels.rms_norm(a, b)
            y.backward(x)
            results.append((y.detach(), a.grad, b.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other))


def test_nothing_is_left_unwritten(backend, monkeypatch):
    x, w, up = torch.randn(5, 19), torch.randn(19), torch.randn(5, 19)
    q, k = torch.randn(5, 2, 10), torch.randn(5, 1, 10)
    cos, sin = angles(5, 5)
    poison(monkeypatch)
    inputs = [t.requires_grad_() for t in (x, w, up, q, k)]
    outputs = [vkernels.rms_norm(x, w), vkernels.swiglu(x, up), *vkernels.rope(q, k, cos, sin)]
    grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(o).fill_(1.0) for o in outputs])
    assert all(t.isfinite().all() for t in [*outputs, *grads])


def test_compiles_and_checks():
    torch.manual_seed(0)
    x, w, q, k = torch.randn(6, 8), torch.randn(8), torch.randn(6, 2, 8), torch.randn(6, 1, 8)
    cos, sin = angles(6, 4)
    compiles(vkernels.rms_norm, x, w)
    compiles(vkernels.swiglu, x, x + 1)
    compiles(lambda q, k: vkernels.rope(q, k, cos, sin)[0], q, k)
    x, w, q, k = (t.requires_grad_() for t in (x, w, q, k))
    for op, args in (("rms_norm", (x, w, 1e-6)), ("swiglu", (x, x.detach() + 1)), ("rope", (q, k, cos, sin, False))):
        torch.library.opcheck(getattr(torch.ops.vkernels, op).default, args)
