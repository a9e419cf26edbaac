"""linear_cross_entropy and linear_logprob over vocabulary ranges, against float64 and a plain joined head."""

import math

import pytest
import torch
import torch.nn.functional as F
from op_check import compiles, error, judge, poison
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import vkernels
from vkernels import cross_entropy, head, logprob, oracle
from vkernels.check.cross_entropy import CHECKS, draw, grouped, own_class

LAYOUTS = [([0], [13], [16]), ([0, 11], [11, 7], [128, 8]), ([0, 3, 40], [3, 37, 1], [3, 64, 4])]


def tables(layout, C, scale=0.5):
    """Weights with large numbers in the padded rows: reading one of them shows."""
    _, sizes, rows = layout
    weights = [torch.randn(r, C) * scale for r in rows]
    for w, n in zip(weights, sizes):
        w[n:] = 100.0
    return weights


def draw_labels(T, layout):
    labels = torch.randint(-40, layout[0][-1] + layout[1][-1], (T,), dtype=torch.int32)
    return labels.masked_fill_(labels < 0, -100)


def on(op, layout, labels, **options):
    """The op as a function of (h, *weights), its sums only."""
    bases, sizes, _ = layout
    return lambda h, *weights: op(h, list(weights), bases, labels, sizes=sizes, **options)[0]


def eager(h, weights, bases, labels, *, sizes, row_weight=None):
    logits = h @ torch.cat([w[:n] for w, n in zip(weights, sizes)]).T
    loss = F.cross_entropy(logits, labels.long(), ignore_index=-100, reduction="none").float()
    loss = loss if row_weight is None else loss * row_weight
    sums = [loss[(labels >= b) & (labels < b + n)].sum() for b, n in zip(bases, sizes)]
    return torch.stack(sums), None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("T", "C"), [(1, 8), (61, 24)])
def test_sums_and_gradients(backend, T, C, layout, dtype, weighted):
    torch.manual_seed(1)
    labels = draw_labels(T, layout) if T > 1 else torch.tensor([2])
    options = {"row_weight": torch.rand(T) * 3} if weighted else {}
    inputs = [torch.randn(T, C), *tables(layout, C)]
    judge(
        on(vkernels.linear_cross_entropy, layout, labels, **options),
        on(eager, layout, labels, **options),
        on(oracle.linear_cross_entropy, layout, labels, **options),
        inputs,
        dtype,
        floor={torch.float32: 3e-7, torch.bfloat16: 1.5e-3},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts(backend, dtype):
    layout = LAYOUTS[1]
    labels = torch.tensor([0, 10, 11, 17, -100, 18, 500])  # the last two lie in no range
    weight = torch.tensor([1.0, 2.0, 0.5, 0.25, 7.0, 7.0, 7.0])
    h, weights = torch.randn(7, 4).to(dtype), [w.to(dtype) for w in tables(layout, 4)]
    _, count = vkernels.linear_cross_entropy(h, weights, layout[0], labels, sizes=layout[1])
    assert count.tolist() == [2, 2]
    assert count.dtype == torch.float32
    _, count = vkernels.linear_cross_entropy(h, weights, layout[0], labels, sizes=layout[1], row_weight=weight)
    assert count.tolist() == [3, 0.75]


@pytest.mark.parametrize("T", [0, 5])
def test_a_batch_without_labels_costs_nothing(backend, T):
    layout = LAYOUTS[2]
    h = torch.randn(T, 8, requires_grad=True)
    weights = [w.requires_grad_() for w in tables(layout, 8)]
    total, count = vkernels.linear_cross_entropy(h, weights, layout[0], torch.full((T,), -100), sizes=layout[1])
    total.sum().backward()
    assert total.tolist() == count.tolist() == [0, 0, 0]
    assert all((x.grad == 0).all() for x in (h, *weights))


def test_chunks_of_rows_change_nothing(backend, monkeypatch):
    torch.manual_seed(0)
    layout = LAYOUTS[2]
    labels = draw_labels(50, layout)
    inputs = [torch.randn(50, 8), *tables(layout, 8)]
    results = []
    for limit in (1 << 30, 41 * 4 * 7):  # all rows at once; 7 at a time
        monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": limit})
        leaves = [x.clone().requires_grad_() for x in inputs]
        total = on(vkernels.linear_cross_entropy, layout, labels)(*leaves)
        results.append([total, *torch.autograd.grad(total.sum(), leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_a_row_class_restricts_the_softmax(backend):
    torch.manual_seed(0)
    layout = LAYOUTS[1]
    T = 40
    labels = draw_labels(T, layout)
    own = (labels >= 11).to(torch.int8)
    row_class = torch.where(torch.arange(T) % 3 == 0, -1, own)
    inputs = [torch.randn(T, 8), *tables(layout, 8)]
    judge(
        on(vkernels.linear_cross_entropy, layout, labels, row_class=row_class),
        on(oracle.linear_cross_entropy, layout, labels, row_class=row_class),
        on(oracle.linear_cross_entropy, layout, labels, row_class=row_class),
        inputs,
        torch.float32,
        floor={torch.float32: 1e-6},
    )
    wrong = torch.where(labels >= 0, 1 - own, 0)
    assert on(vkernels.linear_cross_entropy, layout, labels, row_class=wrong)(*inputs)[0] == math.inf


def test_a_frozen_range_gets_no_gradient(backend):
    torch.manual_seed(0)
    layout = LAYOUTS[1]
    labels = draw_labels(20, layout)
    h = torch.randn(20, 8, requires_grad=True)
    weights = tables(layout, 8)
    weights[1].requires_grad_()
    on(vkernels.linear_cross_entropy, layout, labels)(h, *weights).sum().backward()
    assert weights[0].grad is None
    assert weights[1].grad.abs().sum() > 0
    assert h.grad.abs().sum() > 0


def test_large_logits_stay_finite(backend):
    h, w = torch.randn(9, 4) * 1e3, torch.randn(16, 4) * 1e2
    total = vkernels.linear_cross_entropy(h, [w], [0], torch.arange(9), sizes=[16])[0]
    truth = oracle.linear_cross_entropy(h, [w], [0], torch.arange(9), sizes=[16])[0]
    assert error(total, truth) < 1e-6


def test_gradcheck(backend):
    torch.manual_seed(0)
    layout = LAYOUTS[1]
    labels = torch.tensor([0, 12, -100, 10, 17])
    inputs = [x.double().requires_grad_() for x in (torch.randn(5, 3), *tables(layout, 3, 0.3))]
    weight = torch.rand(5)
    assert torch.autograd.gradcheck(on(vkernels.linear_cross_entropy, layout, labels, row_weight=weight), inputs)


def test_bitwise_repeatable(backend):
    torch.manual_seed(0)
    layout = LAYOUTS[2]
    labels, inputs, results = draw_labels(300, layout), [torch.randn(300, 16), *tables(layout, 16)], []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        total = on(vkernels.linear_cross_entropy, layout, labels)(*leaves)
        results.append([total, *torch.autograd.grad(total.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_nothing_is_left_unwritten(backend, monkeypatch):
    layout = LAYOUTS[1]
    labels = torch.tensor([3, -100, 14])
    inputs = [x.requires_grad_() for x in (torch.randn(3, 5), *tables(layout, 5))]
    poison(monkeypatch)
    total = on(vkernels.linear_cross_entropy, layout, labels)(*inputs)
    grads = torch.autograd.grad(total, inputs, torch.full(total.shape, 1.0))
    assert all(t.isfinite().all() for t in (total, *grads))
    assert all((g[n:] == 0).all() for g, n in zip(grads[1:], layout[1]))


def every_way(where):
    """The ways to restrict rows, with the loss made at once or again."""
    own = own_class(where)
    return {
        "whole": {},
        "joint": {"joint": True},
        "classes": {"row_class": own, "row_weight": torch.arange(len(own)) % 3 * 0.5},
        "grouped": grouped(where, block=4),
        "partly grouped": grouped(where, block=4, whole=True),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_checks(backend, check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


@pytest.mark.parametrize("way", ["whole", "joint", "classes", "grouped", "partly grouped"])
def test_gradcheck_of_every_term(backend, way):
    inputs, where = draw([4, 3], 8, 2, torch.Generator().manual_seed(0))
    inputs = [x.double().requires_grad_() for x in inputs]
    bases, labels, sizes = where.values()
    options = {**every_way(where)[way], "z_loss": 0.3, "label_smoothing": 0.2, "softcap": 3.0}

    def loss(h, *weights):
        return vkernels.linear_cross_entropy(h, list(weights), bases, labels, sizes=sizes, **options)[0]

    def logprob(h, *weights):
        some = {k: v for k, v in options.items() if k in ("row_class", "rows", "class_cu", "softcap")}
        return vkernels.linear_logprob(
            h, list(weights), bases, labels, sizes=sizes, temperature=0.7, entropy=True, **some
        )

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(logprob, inputs)


@pytest.mark.parametrize("way", ["whole", "joint", "grouped"])
def test_a_graph_can_be_used_again_with_other_factors(backend, way):
    inputs, where = draw([9, 6], 30, 4, torch.Generator().manual_seed(0))
    bases, labels, sizes = where.values()
    options = every_way(where)[way]
    x = [t.requires_grad_() for t in inputs]
    total, _ = vkernels.linear_cross_entropy(x[0], x[1:], bases, labels, sizes=sizes, **options)
    truth, _ = oracle.linear_cross_entropy(x[0], x[1:], bases, labels, sizes=sizes, **options)
    for factors in (torch.tensor([2.0, -0.5]), torch.tensor([0.0, 1e3])):
        factors = factors[1] if way == "joint" else factors
        ours = torch.autograd.grad(total, x, factors, retain_graph=True)
        theirs = torch.autograd.grad(truth, x, factors.double(), retain_graph=True)
        for mine, true in zip(ours, theirs):
            assert error(mine, true) < 1e-6


def test_one_matrix_in_several_places(backend):
    """Tied weights, in the head twice and in a product before it: the gradients add up."""
    torch.manual_seed(0)
    w, labels = torch.randn(8, 4, requires_grad=True), torch.tensor([0, 7, 9, 14])

    def loss(op, w):
        return op(torch.ones(4, 8).to(w) @ w, [w, w], [0, 8], labels, sizes=[8, 8], joint=True)[0]

    ours, theirs = (torch.autograd.grad(loss(op, w), w)[0] for op in (vkernels.linear_cross_entropy, oracle_of_float32))
    torch.testing.assert_close(ours, theirs)


def oracle_of_float32(h, *args, **options):
    total, count = oracle.linear_cross_entropy(h, *args, **options)
    return total.float(), count


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprob"])
def test_rows_worth_nothing_add_nothing(backend, op):
    inputs, where = draw([20], 8, 4, torch.Generator().manual_seed(0))
    bases, labels, sizes = where.values()
    inputs[0][[1, 2]] = math.inf  # without a label; weighed by 0
    h, w = (x.requires_grad_() for x in inputs)
    weight = torch.ones(8)
    weight[2] = 0
    if op == "linear_cross_entropy":
        total, count = vkernels.linear_cross_entropy(h, [w], bases, labels, sizes=sizes, row_weight=weight)
        assert count.item() == 5
        assert total.isfinite()
        total.backward()
    else:
        logprob = vkernels.linear_logprob(h, [w], bases, labels, sizes=sizes)
        assert logprob[[1, 5]].tolist() == [0, 0]
        logprob.backward(weight)
    assert all(x.grad.isfinite().all() for x in (h, w))
    assert (h.grad[[1, 2, 5]] == 0).all()


def test_an_empty_list_of_rows(backend):
    h, w = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    labels, rows = torch.tensor([1, 2, 3]), torch.full((4,), 3, dtype=torch.int32)
    for cu in ([0, 4], [0, 0]):
        total, count = vkernels.linear_cross_entropy(h, [w], [0], labels, sizes=[8], rows=rows, class_cu=cu)
        total.sum().backward()
        logprob = vkernels.linear_logprob(h, [w], [0], labels, sizes=[8], rows=rows, class_cu=cu)
        assert total.item() == count.item() == logprob.abs().sum().item() == 0
    assert (h.grad == 0).all()
    assert (w.grad == 0).all()


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("way", ["whole", "classes", "grouped", "partly grouped"])
def test_the_logits_of_all_rows_never_exist(monkeypatch, way):
    T, C, step = 300, 8, 20
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": step * 4 * 168})
    inputs, where = draw([100, 60], T, C, torch.Generator().manual_seed(0))
    (h, *weights), (bases, labels, sizes) = [x.bfloat16() for x in inputs], where.values()
    options = every_way(where)[way]
    rows = [options.get(k) for k in ("row_class", "rows", "class_cu")]
    args = h, weights, bases, labels, sizes
    with LargestTensor() as seen:  # inside the ops
        cross_entropy.forward(head.score_rows, *args, None, *rows, 0.1, 0.1, 2.0, False, True, [True] * 3)
        cross_entropy.backward(head.score_rows, torch.ones(2), *args, None, *rows, 0.1, 0.1, 2.0, [True] * 3)
        spread = logprob.forward(head.score_rows, *args, *rows, 0.8, 2.0, True)
        logprob.backward(head.score_rows, *spread, *args, *rows, 0.8, 2.0, [True] * 3)
    assert step * 160 < seen.elements <= step * 168


def test_a_softmax_of_many_columns(backend):
    """As many as the largest vocabularies have."""
    torch.manual_seed(0)
    V, h = 300_001, torch.randn(3, 4)
    w, labels = torch.randn(V, 4), torch.tensor([0, V - 1, 77])
    total, _, found = vkernels.linear_cross_entropy(h, [w], [0], labels, sizes=[V], metrics=True)
    truth = oracle.linear_cross_entropy(h, [w], [0], labels, sizes=[V])[0]
    assert error(total, truth) < 1e-6
    assert found.correct.item() == 0


def test_the_lowest_of_equals_is_the_likeliest(backend):
    h, w = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    found = vkernels.linear_cross_entropy(h, [w], [0], torch.tensor([1, 2, 0]), sizes=[4], metrics=True)[2]
    assert found.scored.item() == 3
    assert found.correct.item() == 1


@pytest.mark.parametrize("way", ["whole", "joint", "grouped"])
def test_compiles_and_checks(way):
    inputs, where = draw([9, 6], 12, 5, torch.Generator().manual_seed(0))
    bases, labels, sizes = where.values()
    options = every_way(where)[way]
    rows = {k: v for k, v in options.items() if k in ("rows", "class_cu")}

    def loss(h, *weights):
        return vkernels.linear_cross_entropy(h, list(weights), bases, labels, sizes=sizes, **options)[0]

    def logprob(h, *weights):
        return vkernels.linear_logprob(h, list(weights), bases, labels, sizes=sizes, **rows)

    compiles(loss, *inputs)
    compiles(logprob, *inputs)
    h, *weights = (x.requires_grad_() for x in inputs)
    listed = rows.get("rows"), rows.get("class_cu")
    args = h, weights, bases, labels, sizes, torch.rand(12), None, *listed, 1e-3, 0.1, 2.0, way == "joint", True, []
    torch.library.opcheck(torch.ops.vkernels.linear_cross_entropy.default, args)
    args = h, weights, bases, labels, sizes, None, *listed, 0.9, 2.0, True
    torch.library.opcheck(torch.ops.vkernels.linear_logprob.default, args)


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_logprob"])
def test_groups_of_other_sizes_are_not_compiled_anew(op):
    """The packer's groups end elsewhere in every step."""
    torch._dynamo.reset()
    inputs, where = draw([9, 6], 20, 5, torch.Generator().manual_seed(0))
    counter = CompileCounterWithBackend("aot_eager")
    rows = torch.arange(20, dtype=torch.int32)

    def call(h, weights, class_cu):
        out = getattr(vkernels, op)(h, weights, **where, rows=rows, class_cu=class_cu)
        return out[0] if op == "linear_cross_entropy" else out

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    h, *weights = (x.requires_grad_() for x in inputs)
    for end in (3, 5, 8, 11, 13):
        found, expected = compiled(h, weights, [0, end, 19]), call(h, weights, [0, end, 19])
        found[found.isfinite()].sum().backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert counter.frame_count <= 2  # the first ends, then any


def test_weights_of_rows_get_no_gradient(backend):
    (h, w), where = draw([9], 6, 5, torch.Generator().manual_seed(0))
    weight = torch.rand(6, requires_grad=True)
    for x in (h, h.requires_grad_()):
        total, _ = vkernels.linear_cross_entropy(x, [w], **where, row_weight=weight)
        assert total.requires_grad == x.requires_grad
    total.sum().backward()
    assert weight.grad is None


def test_bad_arguments_are_named():
    h, w, rows = torch.zeros(1, 2), torch.zeros(4, 2), torch.zeros(3, dtype=torch.int32)
    one = torch.zeros(1, dtype=torch.int64)

    def bad(message, weights=(w,), bases=(0,), sizes=(4,), ops=("linear_cross_entropy", "linear_logprob"),
            labels=one, **options):  # fmt: skip
        for op in ops:
            with pytest.raises(ValueError, match=rf"^{op}: {message}"):
                getattr(vkernels, op)(h, list(weights), list(bases), labels, sizes=list(sizes), **options)

    bad("1 weights, 2 bases", bases=[0, 4])
    bad(r"weights\[0\] is \[4, 2\], expected \[>= 5, 2\]", sizes=[5])
    bad(r"weights\[0\] is torch.bfloat16, expected torch.float32", weights=[w.bfloat16()])
    bad("expected rows with class_cu", rows=rows)
    bad("expected rows with class_cu, or row_class", rows=rows, class_cu=[0, 3], row_class=one)
    bad("labels is torch.float32", labels=torch.zeros(1))
    bad(r"labels is \[3\], expected \[1\]", labels=rows)
    bad(r"row_class is \[3\], expected \[1\]", row_class=rows)
    bad("row_class is torch.float32", row_class=torch.zeros(1))
    bad(r"row_weight is \[3\], expected \[1\]", row_weight=torch.ones(3), ops=["linear_cross_entropy"])
    for cu in ([0], [0, 3, 2], [1, 3], [0, 1, 2, 3]):
        bad("class_cu .*, expected the ends of 1 or one more groups", rows=rows, class_cu=cu)
    bad("class_cu ends at 4, there are 3 rows", rows=rows, class_cu=[0, 4])
    bad("softcap -1", softcap=-1.0)
    bad("label_smoothing 1", label_smoothing=1, ops=["linear_cross_entropy"])
    bad("temperature 0", temperature=0.0, ops=["linear_logprob"])
