"""linear_cross_entropy over vocabulary ranges against float64 and a plain joined head."""

import math

import pytest
import torch
import torch.nn.functional as F
from op_check import compiles, error, judge, poison

import vkernels
from vkernels import cross_entropy, oracle

LAYOUTS = [([0], [13], [16]), ([0, 11], [11, 7], [128, 8]), ([0, 3, 40], [3, 37, 1], [3, 64, 4])]


def head(layout, C, scale=0.5):
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
    inputs = [torch.randn(T, C), *head(layout, C)]
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
    h, weights = torch.randn(7, 4).to(dtype), [w.to(dtype) for w in head(layout, 4)]
    _, count = vkernels.linear_cross_entropy(h, weights, layout[0], labels, sizes=layout[1])
    assert count.tolist() == [2, 2]
    assert count.dtype == torch.float32
    _, count = vkernels.linear_cross_entropy(h, weights, layout[0], labels, sizes=layout[1], row_weight=weight)
    assert count.tolist() == [3, 0.75]


@pytest.mark.parametrize("T", [0, 5])
def test_a_batch_without_labels_costs_nothing(backend, T):
    layout = LAYOUTS[2]
    h = torch.randn(T, 8, requires_grad=True)
    weights = [w.requires_grad_() for w in head(layout, 8)]
    total, count = vkernels.linear_cross_entropy(h, weights, layout[0], torch.full((T,), -100), sizes=layout[1])
    total.sum().backward()
    assert total.tolist() == count.tolist() == [0, 0, 0]
    assert all((x.grad == 0).all() for x in (h, *weights))


def test_chunks_of_rows_change_nothing(backend, monkeypatch):
    torch.manual_seed(0)
    layout = LAYOUTS[2]
    labels = draw_labels(50, layout)
    inputs = [torch.randn(50, 8), *head(layout, 8)]
    results = []
    for limit in (1 << 30, 41 * 4 * 7):  # all rows at once; 7 at a time
        monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": limit})
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
    inputs = [torch.randn(T, 8), *head(layout, 8)]
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
    weights = head(layout, 8)
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
    inputs = [x.double().requires_grad_() for x in (torch.randn(5, 3), *head(layout, 3, 0.3))]
    weight = torch.rand(5)
    assert torch.autograd.gradcheck(on(vkernels.linear_cross_entropy, layout, labels, row_weight=weight), inputs)


def test_bitwise_repeatable(backend):
    torch.manual_seed(0)
    layout = LAYOUTS[2]
    labels, inputs, results = draw_labels(300, layout), [torch.randn(300, 16), *head(layout, 16)], []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        total = on(vkernels.linear_cross_entropy, layout, labels)(*leaves)
        results.append([total, *torch.autograd.grad(total.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_nothing_is_left_unwritten(backend, monkeypatch):
    layout = LAYOUTS[1]
    labels = torch.tensor([3, -100, 14])
    inputs = [x.requires_grad_() for x in (torch.randn(3, 5), *head(layout, 5))]
    poison(monkeypatch)
    total = on(vkernels.linear_cross_entropy, layout, labels)(*inputs)
    grads = torch.autograd.grad(total, inputs, torch.full(total.shape, 1.0))
    assert all(t.isfinite().all() for t in (total, *grads))
    assert all((g[n:] == 0).all() for g, n in zip(grads[1:], layout[1]))


def test_compiles_and_checks():
    torch.manual_seed(0)
    layout = LAYOUTS[1]
    labels = torch.tensor([3, -100, 14])
    inputs = [torch.randn(3, 5), *head(layout, 5)]
    compiles(on(vkernels.linear_cross_entropy, layout, labels), *inputs)
    h, *weights = (x.requires_grad_() for x in inputs)
    args = h, weights, layout[0], labels, layout[1], torch.rand(3), None
    torch.library.opcheck(torch.ops.vkernels.linear_cross_entropy.default, args)


def test_lists_of_other_lengths_are_an_error():
    with pytest.raises(ValueError, match="1 weights, 2 bases"):
        vkernels.linear_cross_entropy(torch.zeros(1, 2), [torch.zeros(4, 2)], [0, 4], torch.zeros(1), sizes=[4])
