"""rms_norm, add_rms_norm and layer_norm against float64 and eager torch."""

import pytest
import torch
from op_check import compiles, judge, leaves

import vkernels
from vkernels import _host, oracle
from vkernels.check.norms import CHECKS, OPS

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(backend, check, dtype):
    for finding in check.run(CPU, dtype):
        assert finding.fine, finding


def inputs(op, rows=9, columns=30, **kwargs):
    torch.manual_seed(0)
    wide, narrow, _ = OPS[op]
    shapes = [(rows, columns)] * wide + [(columns,)] * narrow
    return [torch.randn(shape, **kwargs) for shape in shapes]


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(backend, op):
    args = inputs(op, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(getattr(vkernels, op), args)


@pytest.mark.parametrize("op", OPS)
def test_columns_apart(backend, op):
    rows, *rest = inputs(op)
    apart = rows.T.contiguous().T
    ours = getattr(vkernels, op)
    for a, b in zip(torch.atleast_1d(ours(apart, *rest)), torch.atleast_1d(ours(rows, *rest))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(op, level):
    widest = _host.isa_level()
    _host.limit_isa(level)
    try:
        judge(getattr(vkernels, op), OPS[op][2], getattr(oracle, op), inputs(op, 33, 37), torch.float32)
    finally:
        _host.limit_isa(widest)


@pytest.mark.parametrize("op", OPS)
def test_bitwise_repeatable_on_any_number_of_threads(op):
    wide = OPS[op][0]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 1):
            torch.set_num_threads(threads)
            args = leaves(*inputs(op, 9000, 130))
            y = getattr(vkernels, op)(*args)
            outputs = y if isinstance(y, tuple) else (y,)
            results.append([*outputs, *torch.autograd.grad(outputs, args, [args[wide - 1].detach()] * len(outputs))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other))


def test_the_stream_and_its_norm(backend):
    """The norm is that of the stream as rounded; either output alone has gradients; x and residual share theirs."""
    x, residual, w = leaves(*inputs("add_rms_norm"))
    y, stream = vkernels.add_rms_norm(x, residual, w)
    dy, dstream = torch.randn(9, 30), torch.randn(9, 30)
    both = torch.autograd.grad([y, stream], (x, residual, w), [dy, dstream], retain_graph=True)
    first = torch.autograd.grad(y, (x, residual, w), dy, retain_graph=True)
    second = torch.autograd.grad(stream, (x, residual, w), dstream)
    for b, f, s in zip(both, first, second):
        torch.testing.assert_close(b, f + s)
    assert torch.equal(both[0], both[1])
    x, residual = x.bfloat16(), 100 * residual.bfloat16()
    y, stream = vkernels.add_rms_norm(x, residual, w)
    assert torch.equal(stream, x + residual)
    assert torch.equal(y, vkernels.rms_norm(stream, w))


def test_a_mean_far_from_zero_costs_no_digits(backend):
    x, w, b = inputs("layer_norm", 4, 67)
    x = x + 3000
    truth = oracle.layer_norm(x, w, b)
    torch.testing.assert_close(vkernels.layer_norm(x, w, b).double(), truth, atol=3e-3, rtol=0)  # x has steps of 2e-4


def test_compiles_and_checks():
    for op in OPS:
        args = inputs(op)
        ours = getattr(vkernels, op)
        compiles(lambda *a, f=ours: torch.stack(f(*a)) if isinstance(f(*a), tuple) else f(*a), *args)
        torch.library.opcheck(getattr(torch.ops.vkernels, op).default, (*leaves(*args), 1e-6))


def test_messages():
    x, w = torch.ones(4, 6), torch.ones(6)
    with pytest.raises(ValueError, match=r"^rms_norm: weight \[5\], expected \[6\]"):
        vkernels.rms_norm(x, w[:5])
    with pytest.raises(ValueError, match=r"^layer_norm: bias \[1\], expected \[6\]"):
        vkernels.layer_norm(x, w, w[:1])
    with pytest.raises(ValueError, match=r"^add_rms_norm: residual \[3, 6\] torch.float32, expected x's \[4, 6\]"):
        vkernels.add_rms_norm(x, x[:3], w)
    with pytest.raises(ValueError, match=r"^add_rms_norm: residual \[4, 6\] torch.bfloat16, expected .* torch.float32"):
        vkernels.add_rms_norm(x, x.bfloat16(), w)


def test_rows_too_wide_for_a_kernel_go_to_torch():
    takes = vkernels.registry._table["layer_norm"]["triton"].takes
    assert takes({"columns": 8192}) is None
    assert takes({"columns": 8193}) == "rows of 8193 elements, it takes up to 8192"
