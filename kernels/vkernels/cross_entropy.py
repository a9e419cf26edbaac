"""Output head and cross-entropy in one op: the logits of all rows never exist at once.

Rows are taken in chunks; the backward pass makes each chunk's logits again and turns them into their gradient in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from vkernels.registry import (
    Backend,
    accumulate_dtype,
    anywhere,
    below_autograd,
    define,
    define_autograd,
    define_backward,
    on_cpu,
)

_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # of one chunk's float32 logits; a second copy lives for a moment


def linear_cross_entropy(
    h: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bases: Sequence[int],
    labels: torch.Tensor,
    *,
    sizes: Sequence[int],
    row_weight: torch.Tensor | None = None,
    row_class: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of h[T, C] @ weights[i][:sizes[i]].T over the union of all ranges. -> (sum, count) float32[ranges].

    Entry i holds the loss and the weight of the rows whose label lies in [bases[i], bases[i] + sizes[i]); other labels
    (negative, or in no range) are ignored. row_weight float32[T] multiplies each row's loss and count (default 1).
    row_class int[T] restricts the softmax of a row to range row_class[t]; a negative one leaves it whole. A label
    outside its row's class costs infinity. `sum` is differentiable in h and weights; entry-wise, with any factors.
    """
    if not len(weights) == len(bases) == len(sizes) or not weights:
        found = f"{len(weights)} weights, {len(bases)} bases, {len(sizes)} sizes"
        raise ValueError(f"linear_cross_entropy: {found}; expected as many of each, and at least one")
    return _op(h, list(weights), list(bases), labels, list(sizes), row_weight, row_class)[:2]


def _chunk_rows(h, sizes):
    limit = _CHUNK_BYTES.get(h.device.type, 32 << 20)
    return max(1, limit // (4 * sum(sizes)))


def _label_columns(labels, bases, sizes):
    """-> (each label's column in the joined logits, 0 where ignored; its range, n_ranges where ignored), int64[T]."""
    column = torch.zeros_like(labels, dtype=torch.int64)
    kind = torch.full_like(column, len(bases))
    start = 0
    for i, (base, size) in enumerate(zip(bases, sizes)):
        inside = (labels >= base) & (labels < base + size)
        column = torch.where(inside, labels.long() - base + start, column)
        kind.masked_fill_(inside, i)
        start += size
    return column, kind


def _logits(h, weights, sizes, row_class):
    """One chunk's logits [t, sum(sizes)] in the accumulation dtype, a range next to the other."""
    acc = accumulate_dtype(h.dtype)
    logits = torch.empty(h.shape[0], sum(sizes), dtype=acc, device=h.device)
    start = 0
    for i, (w, size) in enumerate(zip(weights, sizes)):
        part = logits[:, start : start + size]
        if h.dtype == acc:
            torch.mm(h, w[:size].t(), out=part)
        else:
            part.copy_(h @ w[:size].t())
        if row_class is not None:
            part.masked_fill_(((row_class >= 0) & (row_class != i)).unsqueeze(1), float("-inf"))
        start += size
    return logits


def _forward(h, weights, bases, labels, sizes, row_weight, row_class):
    acc = accumulate_dtype(h.dtype)
    column, kind = _label_columns(labels, bases, sizes)
    lse = torch.empty(h.shape[0], dtype=acc, device=h.device)
    target = torch.empty_like(lse)
    step = _chunk_rows(h, sizes)
    for a in range(0, h.shape[0], step):
        rows = slice(a, a + step)
        logits = _logits(h[rows], weights, sizes, None if row_class is None else row_class[rows])
        torch.logsumexp(logits, 1, out=lse[rows])
        torch.gather(logits, 1, column[rows].unsqueeze(1), out=target[rows].unsqueeze(1))
    weight = torch.ones_like(lse) if row_weight is None else row_weight.to(acc)
    loss = (lse - target) * weight
    sums, counts = [], []
    for i in range(len(bases)):
        sums.append(torch.where(kind == i, loss, 0).sum())
        counts.append(torch.where(kind == i, weight, 0).sum())
    return torch.stack(sums), torch.stack(counts), lse


def _backward(dsum, h, weights, bases, labels, sizes, row_weight, row_class, lse, wanted):
    acc = accumulate_dtype(h.dtype)
    column, kind = _label_columns(labels, bases, sizes)
    # What one unit of row t's loss is worth to the caller; 0 for ignored rows.
    worth = torch.cat([dsum.to(acc), dsum.new_zeros(1, dtype=acc)])[kind]
    if row_weight is not None:
        worth = worth * row_weight
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dweights = [torch.zeros_like(w, dtype=acc) if want else w.new_empty(0) for w, want in zip(weights, wanted)]
    step = _chunk_rows(h, sizes)
    for a in range(0, h.shape[0], step):
        rows = slice(a, a + step)
        dlogits = _logits(h[rows], weights, sizes, None if row_class is None else row_class[rows])
        dlogits.sub_(lse[rows].unsqueeze(1)).exp_().mul_(worth[rows].unsqueeze(1))
        dlogits.scatter_add_(1, column[rows].unsqueeze(1), -worth[rows].unsqueeze(1))
        dlogits = dlogits.to(h.dtype)
        total = torch.zeros(dlogits.shape[0], h.shape[1], dtype=acc, device=h.device)
        start = 0
        for w, dw, want, size in zip(weights, dweights, wanted, sizes):
            part = dlogits[:, start : start + size]
            if want:
                dw[:size] += part.t() @ h[rows]
            total += part @ w[:size]
            start += size
        dh[rows] = total
    return [dh, *(dw.to(w.dtype) for dw, w in zip(dweights, weights))]


def _scored_rows(labels, bases, sizes):
    """The rows whose label lies in a range, int64[n]: on the host a selection costs less than the products it saves."""
    inside = torch.zeros(labels.shape, dtype=torch.bool)
    for base, size in zip(bases, sizes):
        inside |= (labels >= base) & (labels < base + size)
    return inside.nonzero().squeeze(1)


def _selected(h, weights, labels, row_weight, row_class, rows):
    """The operands of the scored rows only, h and weights in the accumulation dtype."""
    acc = accumulate_dtype(h.dtype)
    some = [None if x is None else x.index_select(0, rows) for x in (h, labels, row_weight, row_class)]
    return some[0].to(acc), [w.to(acc) for w in weights], *some[1:]


def _cpu_forward(h, weights, bases, labels, sizes, row_weight, row_class):
    rows = _scored_rows(labels, bases, sizes)
    H, W, labels, row_weight, row_class = _selected(h, weights, labels, row_weight, row_class, rows)
    total, count, some = _forward(H, W, bases, labels, sizes, row_weight, row_class)
    return total, count, H.new_zeros(h.shape[0]).index_copy_(0, rows, some)


def _cpu_backward(dsum, h, weights, bases, labels, sizes, row_weight, row_class, lse, wanted):
    rows = _scored_rows(labels, bases, sizes)
    H, W, labels, row_weight, row_class = _selected(h, weights, labels, row_weight, row_class, rows)
    some = lse.index_select(0, rows)
    dh, *dweights = _backward(dsum, H, W, bases, labels, sizes, row_weight, row_class, some, wanted)
    return [
        h.new_zeros(h.shape).index_copy_(0, rows, dh.to(h.dtype)),
        *(d.to(w.dtype) for d, w in zip(dweights, weights)),
    ]


def _fake_forward(h, weights, bases, labels, sizes, row_weight, row_class):
    acc = accumulate_dtype(h.dtype)
    return (
        h.new_empty(len(bases), dtype=acc),
        h.new_empty(len(bases), dtype=acc),
        h.new_empty(h.shape[0], dtype=acc),
    )


def _fake_backward(dsum, h, weights, bases, labels, sizes, row_weight, row_class, lse, wanted):
    return [h.new_empty(h.shape), *(w.new_empty(w.shape if want else 0) for w, want in zip(weights, wanted))]


_op = define(
    "linear_cross_entropy",
    "(Tensor h, Tensor[] weights, int[] bases, Tensor labels, int[] sizes, Tensor? row_weight, Tensor? row_class)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    torch=Backend(_forward, _backward, anywhere),
)
_backward_op = define_backward(
    "linear_cross_entropy",
    "(Tensor dsum, Tensor h, Tensor[] weights, int[] bases, Tensor labels, int[] sizes, Tensor? row_weight,"
    " Tensor? row_class, Tensor lse, bool[] wanted) -> Tensor[]",
    fake=_fake_backward,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, bases, labels, sizes, row_weight, row_class, *weights):
        with below_autograd():
            total, count, lse = _op(h, list(weights), bases, labels, sizes, row_weight, row_class)
        ctx.save_for_backward(h, labels, row_weight, row_class, lse, *weights)
        ctx.layout = bases, sizes
        ctx.mark_non_differentiable(count, lse)
        return total, count, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum, *_):
        h, labels, row_weight, row_class, lse, *weights = ctx.saved_tensors
        bases, sizes = ctx.layout
        wanted = list(ctx.needs_input_grad[6:])  # a frozen range's gradient is not computed
        dh, *dweights = _backward_op(dsum, h, weights, bases, labels, sizes, row_weight, row_class, lse, wanted)
        return dh, None, None, None, None, None, *(dw if want else None for dw, want in zip(dweights, wanted))


def _pack(h, weights, bases, labels, sizes, row_weight=None, row_class=None):
    return h, bases, labels, sizes, row_weight, row_class, *weights


define_autograd("linear_cross_entropy", _LinearCrossEntropy, pack=_pack)
