"""swiglu, geglu and quick_gelu against float64 and eager torch."""

import functools

import pytest
import torch
import torch.nn.functional as F
from op_check import compiles, judge, leaves

import vkernels
from vkernels import _host, oracle
from vkernels.check.activations import CHECKS

CPU = torch.device("cpu")
GATED = [vkernels.swiglu, vkernels.geglu, functools.partial(vkernels.geglu, approximate="tanh")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(backend, check, dtype):
    for finding in check.run(CPU, dtype):
        assert finding.fine, finding


@pytest.mark.slow
@pytest.mark.parametrize("check", [c for c in CHECKS if not c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_large_against_float64(backend, check):
    for finding in check.run(CPU, torch.bfloat16):
        assert finding.fine, finding


@pytest.mark.parametrize("op", GATED)
def test_gradcheck(backend, op):
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(op, (gate, up))
    assert torch.autograd.gradcheck(op, gate)
    assert torch.autograd.gradcheck(vkernels.quick_gelu, gate)


@pytest.mark.parametrize("op", GATED)
def test_merged_is_apart(backend, op):
    """The same from one tensor, from its halves and from their copies, forward and backward."""
    torch.manual_seed(0)
    both, dy = torch.randn(11, 2, 48).requires_grad_(), torch.randn(11, 2, 24)
    results = []
    for args in [(both,), both.chunk(2, -1), [half.contiguous() for half in both.chunk(2, -1)]]:
        y = op(*args)
        results.append((y.detach(), *torch.autograd.grad(y, both, dy)))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b)


def test_extreme_gates_stay_finite(backend):
    gate = torch.tensor([-1e4, -100.0, -88.5, 0.0, 88.5, 1e4], requires_grad=True)
    for op in (*GATED, lambda gate, up: vkernels.quick_gelu(gate)):
        y = op(gate, torch.ones(6))
        (grad,) = torch.autograd.grad(y.sum(), gate)
        torch.testing.assert_close(y.detach(), gate.detach().relu(), atol=1e-30, rtol=1e-6)
        torch.testing.assert_close(grad, gate.detach().heaviside(torch.tensor(0.5)), atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(level):
    torch.manual_seed(0)
    widest = _host.isa_level()
    _host.limit_isa(level)
    try:
        x = torch.randn(33, 37)
        judge(vkernels.swiglu, lambda g, u: F.silu(g) * u, oracle.swiglu, [x, x + 1], torch.float32)
    finally:
        _host.limit_isa(widest)


def test_compiles_and_checks():
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    for op in GATED:
        compiles(op, x, x + 1)
        compiles(op, x)
    compiles(vkernels.quick_gelu, x)
    (x,) = leaves(x)
    for name, args in [("swiglu", (x, x.detach() + 1)), ("swiglu", (x, None)), ("geglu", (x, x.detach() + 1, "gelu")),
                       ("geglu", (x, None, "gelu_tanh")), ("quick_gelu", (x,))]:  # fmt: skip
        torch.library.opcheck(getattr(torch.ops.vkernels, name).default, args)


def test_messages():
    x = torch.ones(4, 7)
    with pytest.raises(ValueError, match=r"^swiglu: up \[4, 6\] torch.float32, expected gate's \[4, 7\] torch.float32"):
        vkernels.swiglu(x, x[:, :6])
    with pytest.raises(ValueError, match=r"^geglu: up .* torch.bfloat16, expected gate's .* torch.float32"):
        vkernels.geglu(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"^swiglu: gate \[4, 7\] without up, expected"):
        vkernels.swiglu(x)
    with pytest.raises(ValueError, match=r"^geglu: approximate 'erf', expected one of 'none', 'tanh'"):
        vkernels.geglu(x, x, approximate="erf")


@pytest.mark.parametrize("shape", [(2, 3, 0), (0,), (2, 0, 4)])
def test_nothing_in_a_row_or_no_rows(backend, shape):
    gate = torch.zeros(shape, requires_grad=True)
    y = vkernels.swiglu(gate, torch.zeros(shape))
    assert y.shape == shape
    y.sum().backward()
    assert gate.grad.shape == shape
