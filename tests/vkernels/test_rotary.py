"""rope and qk_norm_rope against float64 and eager torch."""

import pytest
import torch
from op_check import compiles, judge, leaves

import vkernels
from vkernels import _host, oracle
from vkernels.check.rotary import CHECKS, _norm_rope

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(backend, check, dtype):
    for finding in check.run(CPU, dtype):
        assert finding.fine, finding


@pytest.mark.slow
@pytest.mark.parametrize("check", [c for c in CHECKS if not c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_large_against_float64(backend, check):
    for finding in check.run(CPU, torch.float32):
        assert finding.fine, finding


def inputs(T=6, Hq=4, Hk=2, D=10, **kwargs):
    """q, k, their weights; cos, sin."""
    torch.manual_seed(0)
    return [torch.randn(shape, **kwargs) for shape in [(T, Hq, D), (T, Hk, D), (D,), (D,)]], vkernels.rope_tables(
        torch.arange(T), D
    )


def test_gradcheck(backend):
    args, tables = inputs(3, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    tables = [t.double() for t in tables]
    assert torch.autograd.gradcheck(lambda *qk: vkernels.rope(*qk, *tables), args[:2])
    assert torch.autograd.gradcheck(lambda *a: vkernels.qk_norm_rope(*a, *tables), args)


def test_positions_turn_into_relative_ones(backend):
    cos, sin = vkernels.rope_tables(torch.arange(50), 16)
    torch.manual_seed(0)
    a, b = torch.randn(16), torch.randn(16)
    q, k = vkernels.rope(a.expand(50, 1, 16), b.expand(50, 1, 16), cos, sin)
    scores = q[:, 0] @ k[:, 0].T
    for shift in (1, 7):
        torch.testing.assert_close(scores[shift:, shift:], scores[:-shift, :-shift], rtol=1e-4, atol=1e-4)


def test_norm_and_rotation_are_those_of_their_own_ops(backend):
    (q, k, q_weight, k_weight), tables = inputs()
    apart = vkernels.rope(vkernels.rms_norm(q, q_weight), vkernels.rms_norm(k, k_weight), *tables)
    for a, b in zip(vkernels.qk_norm_rope(q, k, q_weight, k_weight, *tables), apart):
        torch.testing.assert_close(a, b)


def test_slices_are_read_in_place(backend):
    """Slices of a merged projection give bit for bit what their copies give, forward and backward."""
    torch.manual_seed(0)
    qkv, tables = torch.randn(11, 8, 8).requires_grad_(), vkernels.rope_tables(torch.arange(11), 8)
    weights = torch.randn(8), torch.randn(8)
    for op in (vkernels.rope, lambda q, k, *tables: vkernels.qk_norm_rope(q, k, *weights, *tables)):
        results = []
        for copy in (False, True):
            q, k, _ = (x.contiguous() if copy else x for x in qkv.split((4, 2, 2), 1))
            y = torch.cat(op(q, k, *tables), 1)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), qkv)))
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(level):
    args, tables = inputs(5, 3, 1, 38)
    widest = _host.isa_level()
    _host.limit_isa(level)
    try:
        judge(lambda *a: vkernels.qk_norm_rope(*a, *tables), lambda *a: _norm_rope(*a, *tables),
              lambda *a: oracle.qk_norm_rope(*a, *tables), args, torch.float32)  # fmt: skip
    finally:
        _host.limit_isa(widest)


def test_bitwise_repeatable_on_any_number_of_threads():
    args, tables = inputs(3000, 8, 4, 32)
    args, results = leaves(*args), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 1):
            torch.set_num_threads(threads)
            outputs = vkernels.qk_norm_rope(*args, *tables)
            results.append([*outputs, *torch.autograd.grad(outputs, args, [args[0].detach(), args[1].detach()])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other))


def test_compiles_and_checks():
    args, tables = inputs()
    compiles(lambda q, k: torch.cat(vkernels.rope(q, k, *tables), 1), *args[:2])
    compiles(lambda *a: torch.cat(vkernels.qk_norm_rope(*a, *tables), 1), *args)
    args = leaves(*args)
    torch.library.opcheck(torch.ops.vkernels.rope.default, (*args[:2], *tables, False))
    torch.library.opcheck(torch.ops.vkernels.qk_norm_rope.default, (*args, *tables, 1e-6))


def test_messages():
    (q, k, weight, _), (cos, sin) = inputs()
    with pytest.raises(ValueError, match=r"^rope: q \[6, 4, 10\], k \[5, 2, 10\], expected"):
        vkernels.rope(q, k[:5], cos, sin)
    with pytest.raises(ValueError, match=r"^rope: q \[6, 4, 9\].* with D even"):
        vkernels.rope(q[..., :9], k[..., :9], cos, sin)
    with pytest.raises(ValueError, match=r"^qk_norm_rope: cos \[6, 5\], sin \[5, 5\], expected \[6, 5\]"):
        vkernels.qk_norm_rope(q, k, weight, weight, cos, sin[:5])
    with pytest.raises(ValueError, match=r"^qk_norm_rope: k_weight \[9\], expected \[10\]"):
        vkernels.qk_norm_rope(q, k, weight, weight[:9], cos, sin)
