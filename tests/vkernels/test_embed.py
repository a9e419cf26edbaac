"""embed over vocabulary ranges: exact gathers, summed gradients."""

import pytest
import torch
from op_check import compiles, judge, poison
from torch._dynamo.testing import CompileCounterWithBackend

import vkernels
from vkernels import _host, oracle
from vkernels.check.embedding import CHECKS
from vkernels.segments import CHUNK, destinations, sort_segments

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
    none = [None] * 3
    torch.library.opcheck(torch.ops.vkernels.embed.default, (ids, some, BASES, SIZES, [], [0] * 3, 0, none, none, []))


def everything(ids, order=None):
    """A call with codes, terms and slots, as a function of its float inputs, and their shapes."""
    positions = torch.arange(ids.shape[0]) % 4
    index = torch.tensor([2, ids.shape[0], 0])  # the second is padding

    def call(table, codes, weight, bias, places, features, added):
        slots = [(features, index, "replace"), vkernels.Slot(added, index + 1, "add")]
        return vkernels.embed(ids, [table, codes], [0, 5], sizes=[5, 4], projections=[None, (weight, bias)],
                              terms=[(positions, places)], slots=slots, order=order)  # fmt: skip

    return call, [(6, 3), (5, 2), (3, 2), (3,), (4, 3), (3, 3), (3, 3)]


def test_gradcheck_of_everything(backend):
    torch.manual_seed(0)
    call, shapes = everything(torch.tensor([-1, 6, -1, 3, 8, 4, 9]))
    assert torch.autograd.gradcheck(call, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


def test_everything_compiles_and_checks():
    ids = torch.tensor([-1, 6, -1, 3, 8, 4, 9])
    order = vkernels.embed_order(ids, [0, 5], [5, 4], terms=[(torch.arange(7) % 4, 4)])
    call, shapes = everything(ids, order)
    compiles(call, *[torch.randn(s) for s in shapes])
    table, codes, weight, bias = (torch.randn(s, requires_grad=True) for s in shapes[:4])
    rows, places = torch.randn(2, 3, requires_grad=True), torch.tensor([-1, 1, 0, -1, -1, -1, -1], dtype=torch.int32)
    args = (ids, [table, codes, rows], [0, 5, 0], [5, 4, 2], [places], [0, 0, 1], 1,
            [None, weight, None], [None, bias, None], list(vkernels.embed_order(ids, [0, 5], [5, 4])))  # fmt: skip
    torch.library.opcheck(torch.ops.vkernels.embed.default, args)


def test_other_numbers_of_tokens_and_slots_are_not_compiled_anew():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(ids, table, rows):
        slots = [(rows, torch.arange(rows.shape[0], device=ids.device))]
        return vkernels.embed(ids, [table], [0], sizes=[10], slots=slots)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for T in (9, 12, 17, 23):
        leaves = torch.randn(10, 4, requires_grad=True), torch.randn(T // 2, 4, requires_grad=True)
        ids = torch.arange(T) % 11
        found, expected = compiled(ids, *leaves), call(ids, *leaves)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        grads, truth = (torch.autograd.grad(x.sin().sum(), leaves) for x in (found, expected))
        torch.testing.assert_close(grads, truth, rtol=0, atol=0)
    assert counter.frame_count <= 2  # the first sizes, then any


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: c.name)
def test_mixtures(backend, check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


def test_a_slot_takes_the_place_of_a_token_or_is_added_to_it(backend):
    table = torch.randn(5, 3, requires_grad=True)
    ids, index, rows = torch.tensor([1, 2, 3]), torch.tensor([1, 3, -7]), torch.randn(3, 3, requires_grad=True)
    for role, kept in (("replace", 0), ("add", 1)):
        out = vkernels.embed(ids, [table], [0], sizes=[5], slots=[(rows, index, role)])
        torch.testing.assert_close(out, torch.stack([table[1], rows[0] + kept * table[2], table[3]]))
        d_table, d_rows = torch.autograd.grad(out.sum(), [table, rows])
        assert d_table.sum(1).tolist() == [0, 3, 3 * kept, 3, 0]
        assert d_rows.sum(1).tolist() == [3, 0, 0]


def tables_of(segments):
    """Destination -> its entries, in the order in which they are added."""
    pieces, joins, used = (int(n) for n in segments.counts)
    partial, found = {}, {}
    for begin, end, row, to in segments.pieces[:pieces].tolist():
        assert 0 < end - begin <= CHUNK
        entries = segments.order[begin:end].tolist()
        if to >= 0:
            partial[to] = (row, entries)
        else:
            assert segments.rows[~to] == row
            found[row] = entries
    for first, last, row, to in segments.joins[:joins].tolist():
        assert segments.rows[~to] == row
        assert all(partial[k][0] == row for k in range(first, last))
        found[row] = [e for k in range(first, last) for e in partial.pop(k)[1]]
    assert not partial
    assert segments.rows[:used].tolist() == sorted(found)
    return found


@pytest.mark.parametrize(
    ("T", "sizes"), [(0, [3, 4]), (1, [1]), (500, [3, 4]), (300, [2000, 9]), (70, [1, 0, 3]), (9000, [5_000_000, 7])]
)
def test_the_order_of_additions(T, sizes):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, sum(sizes) + 1, (T,), generator=g, dtype=torch.int32)
    positions = torch.arange(T) % 13
    bases = [sum(sizes[:i]) for i in range(len(sizes))]
    made = vkernels.embed_order(ids, bases, sizes, terms=[(positions, 11)])
    keys = destinations([ids, positions], [0] * len(sizes) + [1], [*bases, 0], [*sizes, 11])
    expected = {}
    for entry, (i, offset) in enumerate([(i, 0) for i in ids.tolist()] + [(p, sum(sizes)) for p in positions.tolist()]):
        if 0 <= i < (11 if offset else sum(sizes)):
            expected.setdefault(i + offset, []).append(entry)
    assert tables_of(made) == expected
    for host, device in zip(made, sort_segments(keys, sum(sizes) + 11)):
        assert torch.equal(host, device)


def test_host_tables_refuse_what_does_not_fit():
    order, *rest = (t.numpy() for t in vkernels.embed_order(torch.arange(9), [0], [9]))
    small = [torch.zeros(3, 4, dtype=torch.int32).numpy(), *rest[1:]]
    with pytest.raises(ValueError, match="too small"):
        _host.embed_order([torch.arange(9).int().numpy()], [0], [0], [9], CHUNK, order, *small)
    with pytest.raises(ValueError, match="expected int32 index vectors"):
        _host.embed_order([torch.arange(8).int().numpy()], [0], [0], [9], CHUNK, order, *rest)


ONE = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vkernels.embed(ONE, tables(2), [0, 5], sizes=SIZES), "3 tables, 2 bases"),
        (lambda: vkernels.embed(ONE, tables(2), [0, 4, 12], sizes=SIZES), r"\[0, 5\) and from 4 on overlap"),
        (lambda: vkernels.embed(ONE, tables(2), [0, 17, 40], sizes=[17, 1, 1]), r"table 0 is .*16, 2.*rows >= 17, 2"),
        (lambda: vkernels.embed(ONE, [*tables(2)[:2], tables(3)[0]], BASES, sizes=SIZES), r"table 2 is .*rows >= 3, 2"),
        (lambda: vkernels.embed(ONE, tables(2), BASES, sizes=SIZES, terms=[(ONE[:1], tables(2)[0])]), "term 0 has"),
        (lambda: vkernels.embed(ONE, tables(2), BASES, sizes=SIZES, slots=[(tables(2)[0], ONE, "add")]), "slot 0 has"),
        (lambda: vkernels.embed(ONE, tables(2), BASES, sizes=SIZES, slots=[(ONE, ONE, "mix")]), "the role 'mix'"),
        (lambda: vkernels.embed(ONE, tables(2), BASES, sizes=SIZES,
                                projections=[None, None, (torch.ones(2, 2), torch.ones(3))]), "bias 2 is"),
        (lambda: vkernels.embed(ONE, tables(2), BASES, sizes=SIZES,
                                order=vkernels.embed_order(torch.arange(3), BASES, SIZES)), "an order of 3 entries"),
        (lambda: vkernels.embed_order(ONE, [0], [5], terms=[(ONE[:1], 3)]), r"expected \[T\] on the CPU"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
