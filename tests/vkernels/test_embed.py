"""embed over vocabulary ranges: exact gathers, summed gradients."""

import pytest
import torch
from op_check import compiles, judge, poison

import vkernels
from vkernels import oracle

BASES, SIZES = [0, 5, 12], [5, 7, 3]


def tables(C, dtype=torch.float32, rows=16):
    return [torch.randn(rows, C).to(dtype) for _ in SIZES]


def by_ids(op, ids):
    return lambda *tables: op(ids, list(tables), BASES, sizes=SIZES)


def eager(ids, tables, bases, *, sizes):
    joined = torch.cat([t[:n] for t, n in zip(tables, sizes)])
    inside = ((ids >= 0) & (ids < sum(sizes))).unsqueeze(1)
    return torch.nn.functional.embedding(ids.clamp(0, sum(sizes) - 1), joined) * inside


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "C"), [(0, 4), (1, 1), (7, 17), (301, 64)])
def test_rows_and_gradients(backend, T, C, dtype, index):
    torch.manual_seed(0)
    ids = torch.randint(-1, 15, (T,)).to(index)
    judge(by_ids(vkernels.embed, ids), by_ids(eager, ids), by_ids(oracle.embed, ids), tables(C), dtype)


def test_rows_are_exact_copies(backend):
    torch.manual_seed(0)
    ids = torch.tensor([0, 4, 5, 11, 12, 14, -1, 15, -100, 3], dtype=torch.int32)
    some = tables(6)
    out = vkernels.embed(ids, some, BASES, sizes=SIZES)
    expected = [some[0][0], some[0][4], some[1][0], some[1][6], some[2][0], some[2][2]]
    assert torch.equal(out[:6], torch.stack(expected))
    assert (out[6:9] == 0).all()  # in no range
    assert torch.equal(out[9], some[0][3])


def test_padded_rows_and_unused_ids_get_no_gradient(backend):
    some = [t.requires_grad_() for t in tables(4)]
    ids = torch.tensor([0, 6, 6, -1, 14])
    vkernels.embed(ids, some, BASES, sizes=SIZES).sum().backward()
    expected = [torch.zeros(16, 4) for _ in SIZES]
    expected[0][0], expected[1][1], expected[2][2] = 1, 2, 1
    assert all(torch.equal(t.grad, e) for t, e in zip(some, expected))


def test_a_frozen_table_gets_none(backend):
    some = tables(4)
    some[1].requires_grad_()
    vkernels.embed(torch.arange(15), some, BASES, sizes=SIZES).sum().backward()
    assert some[0].grad is None
    assert some[1].grad.sum() == 7 * 4


def test_many_rows_of_one_id_keep_float32_sums_in_bf16(backend):
    """4096 gradients of one hot row: summed in bf16 they would stop growing at 256."""
    some = [t.bfloat16().requires_grad_() for t in tables(3)]
    vkernels.embed(torch.zeros(4096, dtype=torch.int32), some, BASES, sizes=SIZES).sum().backward()
    assert (some[0].grad[0] == 4096).all()


def test_gradcheck(backend):
    torch.manual_seed(0)
    ids = torch.tensor([0, 6, 6, -1, 14])
    some = [t.double().requires_grad_() for t in tables(3)]
    assert torch.autograd.gradcheck(by_ids(vkernels.embed, ids), some)


def test_bitwise_repeatable_on_any_number_of_threads():
    torch.manual_seed(0)
    ids, dy = torch.randint(15, (9000,)), torch.randn(9000, 130)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 1):
            torch.set_num_threads(threads)
            some = [torch.zeros(16, 130, requires_grad=True) for _ in SIZES]
            vkernels.embed(ids, some, BASES, sizes=SIZES).backward(dy)
            results.append([t.grad for t in some])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_nothing_is_left_unwritten(backend, monkeypatch):
    some = [t.requires_grad_() for t in tables(5)]
    poison(monkeypatch)
    out = vkernels.embed(torch.tensor([0, 6, -1]), some, BASES, sizes=SIZES)
    grads = torch.autograd.grad(out, some, torch.full(out.shape, 1.0))
    assert all(t.isfinite().all() for t in (out, *grads))


def test_compiles_and_checks():
    ids = torch.tensor([0, 6, -1, 13])
    compiles(by_ids(vkernels.embed, ids), *tables(4))
    some = [t.requires_grad_() for t in tables(4)]
    torch.library.opcheck(torch.ops.vkernels.embed.default, (ids, some, BASES, SIZES))


def test_lists_of_other_lengths_are_an_error():
    with pytest.raises(ValueError, match="3 tables, 2 bases"):
        vkernels.embed(torch.zeros(2, dtype=torch.int32), tables(2), [0, 5], sizes=SIZES)
