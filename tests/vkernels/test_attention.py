"""varlen_attention against float64, one query row at a time."""

import math
import random

import pytest
import torch
from op_check import compiles, error, judge, poison

import vkernels
from vkernels import _host, oracle
from vkernels.attention import _cpu_backward, _cpu_forward, _masked_backward, _masked_forward

# Flash-style backward takes the softmax's inner product from the rounded output: where a row's gradient nearly cancels
# (a few keys), that costs more than eager's direct form. Whole sequences stay far below.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3}


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def operands(Tq, Tk, Hq, Hk, D):
    return torch.randn(Tq, Hq, D), torch.randn(Tk, Hk, D), torch.randn(Tk, Hk, D)


def eager(cu_q, cu_k, kv_lo=None, kv_hi=None):
    """Dense mask and softmax in the inputs' dtype: what one writes first in plain torch."""

    def attend(q, k, v):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        visible = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
        for s in range(len(cu_q) - 1):
            for i in range(int(cu_q[s]), int(cu_q[s + 1])):
                lo, hi = int(cu_k[s]), int(cu_k[s + 1]) - (int(cu_q[s + 1]) - 1 - i)
                lo = lo if kv_lo is None else max(lo, int(kv_lo[i]))
                hi = hi if kv_hi is None else min(int(cu_k[s + 1]), int(kv_hi[i]))
                visible[i, lo : max(lo, hi)] = True
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
        p = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0)
        return torch.einsum("hij,jhd->ihd", p, v)

    return attend


def check(cu_q, cu_k, Hq, Hk, D, dtype, **bounds):
    q, k, v = operands(int(cu_q[-1]), int(cu_k[-1]), Hq, Hk, D)
    judge(
        lambda q, k, v: vkernels.varlen_attention(q, k, v, cu_q, cu_k, **bounds),
        eager(cu_q, cu_k, **bounds),
        lambda q, k, v: oracle.varlen_attention(q, k, v, cu_q, cu_k, **bounds)[0],
        [q, k, v],
        dtype,
        FLOOR,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "Hq", "Hk", "D"),
    [
        ((2,), 1, 1, 5),
        ((7, 1, 13, 2), 2, 2, 32),
        ((0, 5, 0, 0, 31, 0), 4, 2, 8),
        ((33, 17), 7, 1, 20),
        ((150,), 2, 1, 16),  # more than one block of queries and of keys
        ((3, 3, 3, 3, 40), 6, 3, 64),
    ],
)
def test_causal(backend, lengths, Hq, Hk, D, dtype):
    torch.manual_seed(0)
    check(cu(*lengths), cu(*lengths), Hq, Hk, D, dtype)


@pytest.mark.parametrize(
    ("of_q", "of_k"),
    [((1, 1, 1), (5, 1, 130)), ((3, 4), (9, 4)), ((5, 2), (3, 2)), ((4, 0, 2), (0, 6, 2)), ((40,), (170,))],
)
def test_other_numbers_of_queries_and_keys(backend, of_q, of_k):
    torch.manual_seed(0)
    check(cu(*of_q), cu(*of_k), 4, 2, 12, torch.float32)


def image_blocks(cu_q, lengths, start, block):
    """Documents whose rows from `start` on form one block that sees itself whole, as image tokens do."""
    hi = torch.arange(1, int(cu_q[-1]) + 1, dtype=torch.int32)
    for first, n in zip(cu_q.tolist(), lengths):
        if n >= start + block:
            hi[first + start : first + start + block] = first + start + block
    return hi


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_blocks_and_windows(backend, dtype):
    torch.manual_seed(0)
    lengths = (30, 12, 1, 60)
    c = cu(*lengths)
    rows = torch.arange(int(c[-1]), dtype=torch.int32)
    hi = image_blocks(c, lengths, 3, 16)
    check(c, c, 4, 2, 16, dtype, kv_hi=hi)
    check(c, c, 4, 2, 16, dtype, kv_lo=(rows - 6).clamp_min(0))
    check(c, c, 4, 2, 16, dtype, kv_lo=rows - 20, kv_hi=hi)


def test_any_intervals(backend):
    """Intervals beyond the document, empty ones and reversed ones."""
    torch.manual_seed(0)
    c = cu(30, 0, 70, 1)
    lo = torch.randint(-5, 105, (101,), dtype=torch.int32)
    check(c, c, 2, 1, 8, torch.float32, kv_lo=lo, kv_hi=lo + torch.randint(-3, 40, (101,), dtype=torch.int32))


def test_random_layouts_equal_the_masked_path():
    """The host kernel in float64 against dense masks, over sizes around its vectors, tiles and blocks."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        Hk = rng.choice([1, 2, 3])
        Hq, D = Hk * rng.choice([1, 2, 5]), rng.randint(1, 40)
        of_q = [rng.choice([0, 1, 7, 8, 9, 31, 32, 33, 65]) for _ in range(rng.randint(1, 4))]
        of_k = [rng.choice([n, n, n + 3, 0, 129]) for n in of_q]
        c_q, c_k = cu(*of_q), cu(*of_k)
        Tq, Tk = sum(of_q), sum(of_k)
        q, k, v = (x.double() for x in operands(Tq, Tk, Hq, Hk, D))
        kv_lo = torch.randint(-3, Tk + 3, (Tq,)) if rng.random() < 0.5 else None
        kv_hi = torch.randint(-3, Tk + 3, (Tq,)) if rng.random() < 0.5 else None
        args = (c_q, c_k, Tq, Tk, kv_lo, kv_hi, 0.5, None)
        expected = _masked_forward(q, k, v, *args)
        expected += _masked_backward(q, q, k, v, *expected, *args)
        actual = _cpu_forward(q, k, v, *args)
        actual += _cpu_backward(q, q, k, v, *actual, *args)
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_nan_is_not_hidden(backend):
    q, k, v = operands(40, 40, 1, 1, 8)
    k[20] = math.nan
    o = vkernels.varlen_attention(q, k, v, cu(10, 30))
    assert o[:20].isfinite().all()
    assert o[20:].isnan().all()


def test_a_row_without_keys_is_zero(backend):
    torch.manual_seed(0)
    c = cu(4, 3)
    q, k, v = (x.requires_grad_() for x in operands(7, 7, 2, 1, 8))
    kv_hi = torch.tensor([1, 0, 3, 0, 5, 4, 7], dtype=torch.int32)
    o, lse = vkernels.varlen_attention(q, k, v, c, max_seqlen_q=4, kv_hi=kv_hi, return_lse=True)
    empty = torch.tensor([False, True, False, True, False, True, False])
    assert (o[empty] == 0).all()
    assert (lse[:, empty] == -math.inf).all()
    assert lse[:, ~empty].isfinite().all()
    grads = torch.autograd.grad(o.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][empty] == 0).all()


def test_lse_and_scale(backend):
    torch.manual_seed(0)
    c = cu(5, 20)
    q, k, v = operands(25, 25, 4, 2, 8)
    o, lse = vkernels.varlen_attention(q, k, v, c, scale=0.7, return_lse=True)
    true_o, true_lse = oracle.varlen_attention(q, k, v, c, scale=0.7)
    assert error(o, true_o) < 1e-6
    torch.testing.assert_close(lse, true_lse.float(), rtol=1e-6, atol=1e-6)


def test_large_scores_do_not_overflow(backend):
    torch.manual_seed(0)
    c = cu(300)
    q, k, v = operands(300, 300, 1, 1, 16)
    o = vkernels.varlen_attention(q * 60, k * 60, v, c)
    assert error(o, oracle.varlen_attention(q * 60, k * 60, v, c)[0]) < 1e-4


def test_a_packed_document_is_bitwise_what_it_is_alone():
    torch.manual_seed(0)
    lengths = (20, 64, 1, 130)
    q, k, v = operands(215, 215, 4, 2, 32)
    packed = vkernels.varlen_attention(q, k, v, cu(*lengths))
    at = 0
    for n in lengths:
        rows = slice(at, at + n)
        assert torch.equal(packed[rows], vkernels.varlen_attention(q[rows], k[rows], v[rows], cu(n)))
        at += n


def test_slices_of_a_merged_projection(backend):
    torch.manual_seed(0)
    c = cu(9, 8)
    q, k, v = (x.unflatten(1, (-1, 8)) for x in torch.randn(17, 64).split([32, 16, 16], dim=1))
    expected = vkernels.varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), c)
    torch.testing.assert_close(vkernels.varlen_attention(q, k, v, c), expected)


@pytest.mark.parametrize("T", [0, 1])
def test_smallest(backend, T):
    q, k, v = (x.requires_grad_() for x in operands(T, T, 2, 1, 4))
    o = vkernels.varlen_attention(q, k, v, cu(T, 0))
    o.sum().backward()
    assert torch.equal(o, v.repeat_interleave(2, dim=1))
    assert torch.equal(v.grad, torch.full_like(v, 2.0))


def test_the_masked_path_takes_queries_in_chunks(monkeypatch):
    """Small chunks give what one big chunk gives."""
    torch.manual_seed(0)
    c = cu(20, 21)
    q, k, v = operands(41, 41, 4, 2, 8)
    args = (c, c, 41, 41, None, None, 0.3, None)
    o, lse = _masked_forward(q, k, v, *args)
    grads = _masked_backward(o, q, k, v, o, lse, *args)
    monkeypatch.setattr("vkernels.attention._CHUNK_SCORES", 4 * 41 * 7)
    o2, lse2 = _masked_forward(q, k, v, *args)
    for a, b in zip((o, lse, *grads), (o2, lse2, *_masked_backward(o, q, k, v, o, lse, *args))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set(level):
    torch.manual_seed(0)
    widest = _host.isa_level()
    _host.limit_isa(level)
    try:
        check(cu(37, 5), cu(37, 5), 2, 1, 20, torch.float32)
    finally:
        _host.limit_isa(widest)


def test_gradcheck(backend):
    torch.manual_seed(0)
    q, k, v = (x.double().requires_grad_() for x in operands(6, 8, 2, 1, 4))
    c_q, c_k = cu(2, 0, 4), cu(3, 0, 5)
    assert torch.autograd.gradcheck(lambda *x: vkernels.varlen_attention(*x, c_q, c_k), (q, k, v))
    hi = torch.tensor([3, 1, 8, 5, 3, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *x: vkernels.varlen_attention(*x, c_q, c_k, kv_hi=hi), (q, k, v))


def test_bitwise_repeatable_on_any_number_of_threads():
    torch.manual_seed(0)
    lengths = (300, 7, 80, 80)
    q, k, v = operands(467, 467, 4, 2, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 1):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            o = vkernels.varlen_attention(*leaves, cu(*lengths))
            results.append((o.detach(), *torch.autograd.grad(o, leaves, q)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_nothing_is_left_unwritten(backend, monkeypatch):
    q, k, v = operands(9, 12, 2, 1, 5)
    c_q, c_k = cu(4, 0, 5, 0), cu(3, 2, 6, 1)
    poison(monkeypatch)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o = vkernels.varlen_attention(*inputs, c_q, c_k)
    grads = torch.autograd.grad(o, inputs, torch.full(o.shape, 1.0))
    assert all(t.isfinite().all() for t in (o, *grads))
    assert (grads[1][3:5] == 0).all()  # keys of a document without queries


def test_compiles_and_checks():
    torch.manual_seed(0)
    c = cu(4, 3)
    q, k, v = operands(7, 7, 2, 1, 8)
    compiles(lambda q, k, v: vkernels.varlen_attention(q, k, v, c, max_seqlen_q=4), q, k, v)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    hi = torch.full((7,), 7, dtype=torch.int32)
    for tiles in (None, vkernels.attention_tiles(c, kv_hi=hi)):
        args = (q, k, v, c, c, 4, 4, None, hi, 0.3, tiles)
        torch.library.opcheck(torch.ops.vkernels.varlen_attention.default, args)


def test_bad_operands_are_named():
    q, k, v = operands(6, 6, 3, 2, 8)
    with pytest.raises(ValueError, match="multiple of Hk"):
        vkernels.varlen_attention(q, k, v, cu(6))
    q = q[:, :2]
    for bad, what in ((cu(5), "does not run from 0"), (torch.tensor([0, 4, 2, 6]).int(), "decreases")):
        with pytest.raises(ValueError, match=what):
            vkernels.varlen_attention(q, k, v, bad)
    for arguments, bounds, what in (
        ((q, q.bfloat16(), q, cu(6)), {}, "k torch.bfloat16"),
        ((q[0], q, q, cu(6)), {}, r"expected \[Tq, Hq, D\]"),
        ((q, q, q, cu(6)[None]), {}, r"cu_seqlens_q is \[1, 2\]"),
        ((q, q, q, cu(6), cu(3, 3)), {}, "two lists of the same length"),
        ((q, q, q, cu(6)), {"kv_lo": cu(6)}, r"kv_lo is \[2\]"),
        ((q, q, q, cu(6)), {"kv_hi": torch.zeros(6, 1).int()}, r"kv_hi is \[6, 1\]"),
    ):
        with pytest.raises(ValueError, match=rf"^varlen_attention: .*{what}"):
            vkernels.varlen_attention(*arguments, **bounds)
    with pytest.raises(ValueError, match="scale is 0, expected a number above 0"):
        vkernels.varlen_attention(q, k, v, cu(6), scale=0)
