"""The Triton kernels of the embedding and of the sum by destination."""

import pytest
import torch

import vkernels
from vkernels.check.embedding import CHECKS, zipf
from vkernels.check.touched import CHECKS as TOUCHED_CHECKS
from vkernels.jit import embedding
from vkernels.jit.segment_sum import segment_sum, segment_sum_compact
from vkernels.segments import CHUNK, order_segments, sort_segments

SIZES = [30, 10]


IN_BF16 = {"3 tables, host order", "all the same", "codes, bias, host order", "everything"}  # the others are slow tests


def by_dtype(check):
    for dtype in check.dtypes:
        slow = dtype == torch.bfloat16 and check.name not in IN_BF16
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(check, dtype, id=f"{check.op}-{check.name}-{dtype}", marks=marks)


@pytest.mark.parametrize(("check", "dtype"), [p for c in CHECKS if c.small for p in by_dtype(c)])
def test_against_float64(check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


def test_gradients():
    torch.manual_seed(0)
    d = {"dtype": torch.float64, "requires_grad": True}
    ids, positions = torch.tensor([0, 4, 4, -1, 5]), torch.tensor([0, 1, 0, 1, 2])
    index = torch.tensor([3, 5])  # the second is padding

    def call(table, codes, weight, bias, places, rows):
        return vkernels.embed(ids, [table, codes], [0, 3], sizes=[3, 3], projections=[None, (weight, bias)],
                              terms=[(positions, places)], slots=[(rows, index)])  # fmt: skip

    shapes = (3, 2), (3, 2), (2, 2), (2,), (2, 2), (2, 2)
    assert torch.autograd.gradcheck(call, [torch.randn(s, **d) for s in shapes])


def tables_grads(ids, dy, order=None):
    tables = [torch.zeros(n + 2, dy.shape[1], dtype=dy.dtype, requires_grad=True) for n in SIZES]
    vkernels.embed(ids, tables, [0, SIZES[0]], sizes=SIZES, order=order).backward(dy)
    return [t.grad for t in tables]


def test_sorted_on_the_host_and_on_the_device_are_the_same_bits():
    g = torch.Generator().manual_seed(0)
    ids, dy = zipf(180, sum(SIZES), g, specials=0.6), torch.randn(180, 9, generator=g)
    order = vkernels.embed_order(ids, [0, SIZES[0]], SIZES)
    for a, b in zip(tables_grads(ids, dy, order), tables_grads(ids, dy)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("frozen", "vectors"), [((), 3), (("places",), 2), (("table",), 2), (("table", "rows", "modes"), 1)]
)
def test_only_what_is_asked_for_is_sorted(monkeypatch, frozen, vectors):
    """Slots are never sorted, and neither are the ids or positions of frozen tables."""
    torch.manual_seed(0)
    sorted_keys = []
    monkeypatch.setattr(embedding, "sort_segments", lambda keys, n: sorted_keys.append(keys) or sort_segments(keys, n))
    ids, positions, kinds = torch.randint(5, (30,)), torch.arange(30) % 7, torch.arange(30) % 2
    leaves = {name: torch.randn(n, 3).requires_grad_(name not in frozen)
              for name, n in (("table", 5), ("places", 7), ("modes", 2), ("rows", 4))}  # fmt: skip
    expected = {}
    for backend in ("torch", "triton"):
        with vkernels.force("embed", backend):
            terms = [(positions, leaves["places"]), (kinds, leaves["modes"])]
            slots = [(leaves["rows"], torch.tensor([3, 9, 30, 1]), "add")]
            out = vkernels.embed(ids, [leaves["table"]], [0], sizes=[5], terms=terms, slots=slots)
        wanted = [x for x in leaves.values() if x.requires_grad]
        with vkernels.force("embed", backend):
            expected[backend] = torch.autograd.grad(out, wanted, torch.arange(90.0).view(30, 3).sin())
    assert [len(keys) for keys in sorted_keys] == [30 * vectors]
    torch.testing.assert_close(expected["triton"], expected["torch"])


def test_a_sum_does_not_depend_on_other_tokens():
    """The rows of an id are added alike wherever they stand among the sorted ids, also if they come in pieces."""
    g = torch.Generator().manual_seed(0)
    ids, dy = torch.full((200,), 7), torch.randn(200, 5, generator=g)
    others = torch.randint(7, (50,), generator=g)
    alone = tables_grads(ids, dy)[0][7]
    among = tables_grads(torch.cat([others, ids]), torch.cat([torch.randn(50, 5, generator=g), dy]))[0][7]
    assert torch.equal(alone, among)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 1])
def test_segments_of_every_length_around_a_piece(length):
    torch.manual_seed(0)
    keys = torch.cat([torch.full((length,), 2), torch.tensor([0, 4, 5, -1])])[torch.randperm(length + 4)]
    values = torch.randn(length + 4, 3, dtype=torch.float64)
    out = torch.full((4, 3), -1.0, dtype=torch.float64)
    segment_sum(values, sort_segments(keys, 5), [out])
    assert (out[[1, 3]] == -1).all()  # nothing goes there
    torch.testing.assert_close(out[2], values[keys == 2].sum(0))
    torch.testing.assert_close(out[0], values[keys == 0].sum(0))


def test_values_with_any_strides():
    torch.manual_seed(0)
    keys, wide = torch.randint(5, (40,)), torch.randn(40, 24)
    for values in (wide[:, 3:20], wide.t().contiguous().t(), wide[:1].expand(40, -1)):
        out, expected = torch.zeros(5, values.shape[1]), torch.zeros(5, values.shape[1], dtype=torch.float64)
        segment_sum(values, sort_segments(keys, 5), [out])
        torch.testing.assert_close(out, expected.index_add_(0, keys, values.double()).float())


def test_only_the_destinations_that_are_asked_for():
    torch.manual_seed(0)
    keys, values = torch.randint(30, (200,)), torch.randn(200, 4)
    segments = order_segments([keys.int()], [0], [0], [30])
    whole = torch.zeros(30, 4)
    segment_sum(values, segments, [whole])
    some = [torch.zeros(5, 4, dtype=torch.bfloat16), torch.zeros(3, 4)]
    segment_sum(values, segments, some, starts=[20, 2])
    assert torch.equal(some[0], whole[20:25].bfloat16())
    assert torch.equal(some[1], whole[2:5])


def test_compact_sums():
    torch.manual_seed(0)
    keys, values = torch.randint(1000, (110,)), torch.randn(110, 4)
    keys[:80] = 500
    segments = sort_segments(keys, 1000)
    whole, out = torch.zeros(1000, 4), torch.full((110, 4), -1.0)
    segment_sum(values, segments, [whole])
    segment_sum_compact(values, segments, out)
    used = int(segments.counts[2])
    assert torch.equal(segments.rows[:used], keys.unique().int())
    assert torch.equal(out[:used], whole[segments.rows[:used]])
    assert (out[used:] == -1).all()


@pytest.mark.parametrize(("check", "dtype"), [p for c in TOUCHED_CHECKS if c.small for p in by_dtype(c)])
def test_touched_rows_against_float64(check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding
