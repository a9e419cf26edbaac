"""Output head and cross-entropy in one op: the logits of all rows never exist at once, and are made once.

Where one factor scales all that a weight's gradient is made of, the gradients are made in the forward pass, for a
factor of one, and scaled in the backward pass: 6 C V operations a row. Elsewhere (sums of several ranges that may be
weighed differently, over rows that see several ranges) the backward pass makes the logits again: 8 C V.
Held from the forward to the backward pass: the gradients in float32, 4 (T C + V C) bytes, instead of 2 T V.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from vkernels import head
from vkernels.arguments import require_floats, require_indices, require_separate
from vkernels.registry import (
    Backend,
    accumulate_dtype,
    anywhere,
    below_autograd,
    define,
    define_autograd,
    define_backward,
    jit,
    on_cpu,
)


class RangeMetrics(NamedTuple):
    """Of the scored rows by the range of their label, float32[ranges] each, without gradients.

    loss: the sum of their weighted losses. count: of their weights. scored: how many have a weight other than 0.
    correct: for how many of these the label is the likeliest column they may choose (the lowest one of equals).
    """

    loss: torch.Tensor
    count: torch.Tensor
    scored: torch.Tensor
    correct: torch.Tensor


def linear_cross_entropy(
    h: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bases: Sequence[int],
    labels: torch.Tensor,
    *,
    sizes: Sequence[int],
    row_weight: torch.Tensor | None = None,
    row_class: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    class_cu: Sequence[int] | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    joint: bool = False,
    metrics: bool = False,
):
    """Cross-entropy of h[T, C] @ weights[i][:sizes[i]].T over the union of all ranges. -> (sum, count) float32[ranges].

    Entry i holds the loss and the weight of the rows whose label lies in [bases[i], bases[i] + sizes[i]); other labels
    (negative, or in no range) are ignored. row_weight float32[T] multiplies each row's loss and count (default 1); a
    row of weight 0 adds exactly 0, whatever it holds. `sum` is differentiable in h and weights (of one dtype with h);
    entry-wise, with any factors; row_weight gets no gradient. float64 tensors give float64 sums.

    row_class int[T] restricts the softmax of a row to range row_class[t]; a negative one leaves it whole. A label
    outside its row's class costs infinity. The products are made with all ranges all the same; not so with
    rows int32[>= class_cu[-1]] and class_cu: only these rows are scored (each is listed once; T is padding), and
    rows[class_cu[i]:class_cu[i + 1]] against range i alone. class_cu, ints of the host, has one entry more than there
    are ranges, or two: the last group is then scored against all of them, so [0] * (ranges + 1) + [n] is n rows of a
    whole softmax.

    z_loss: the factor of lse^2 in each row's loss. label_smoothing: the share of the label that is spread evenly over
    the columns a row may choose from. softcap c > 0: logits are c * tanh(logits / c).
    joint: sum and count are scalars, over all ranges, and the gradients cost less (see the head of this file).
    metrics: -> (sum, count, RangeMetrics).
    """
    check("linear_cross_entropy", h, weights, bases, labels, sizes, row_class, rows, class_cu, softcap)
    if row_weight is not None:
        require_floats("linear_cross_entropy", row_weight=row_weight)
        if row_weight.shape != labels.shape:
            found = f"row_weight is {list(row_weight.shape)}"
            raise ValueError(f"linear_cross_entropy: {found}, expected {list(labels.shape)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing {label_smoothing}, expected one in [0, 1)")
    options = rows, None if class_cu is None else list(class_cu), z_loss, label_smoothing, softcap, joint, metrics
    lists = list(weights), list(bases), labels, list(sizes)
    row_weight = None if row_weight is None else row_weight.detach()
    total, count, table = _op(h, *lists, row_weight, row_class, *options, [])[:3]
    return (total, count, RangeMetrics(*table.unbind())) if metrics else (total, count)


def check(op, h, weights, bases, labels, sizes, row_class, rows, class_cu, softcap) -> None:
    """What both ops over the output head ask of their arguments."""
    require_floats(op, h=h, weights=list(weights))
    if h.dim() != 2:
        raise ValueError(f"{op}: h {list(h.shape)}, expected [T, C]; flatten a batch first")
    if not len(weights) == len(bases) == len(sizes) or not weights:
        found = f"{len(weights)} weights, {len(bases)} bases, {len(sizes)} sizes"
        raise ValueError(f"{op}: {found}; expected as many of each, and at least one")
    for i, (w, size) in enumerate(zip(weights, sizes)):
        if w.dim() != 2 or w.shape[1] != h.shape[1] or not 0 <= size <= w.shape[0]:
            raise ValueError(f"{op}: weights[{i}] is {list(w.shape)}, expected [>= {size}, {h.shape[1]}]")
        if w.dtype != h.dtype:
            raise ValueError(f"{op}: weights[{i}] is {w.dtype}, expected {h.dtype} as h")
        if w.device != h.device:
            raise ValueError(f"{op}: weights[{i}] is on {w.device}, expected {h.device} as h")
    require_separate(op, bases, sizes)
    require_indices(op, labels=labels)
    if row_class is not None:
        require_indices(op, row_class=row_class)
    for name, x in (("labels", labels), ("row_class", row_class)):
        if x is not None and x.shape != h.shape[:1]:
            raise ValueError(f"{op}: {name} is {list(x.shape)}, expected [{h.shape[0]}], one for each row of h")
    if (rows is None) != (class_cu is None) or (rows is not None and row_class is not None):
        raise ValueError(f"{op}: expected rows with class_cu, or row_class, or neither")
    if class_cu is not None:
        require_indices(op, rows=rows)
        falls = any(end < begin for begin, end in pairwise(class_cu))
        if len(class_cu) - len(sizes) not in (1, 2) or falls or class_cu[0] != 0:
            found = f"class_cu {list(class_cu)}"
            raise ValueError(f"{op}: {found}, expected the ends of {len(sizes)} or one more groups from 0 on")
        if class_cu[-1] > rows.shape[0]:
            raise ValueError(f"{op}: class_cu ends at {class_cu[-1]}, there are {rows.shape[0]} rows")
    if softcap < 0:
        raise ValueError(f"{op}: softcap {softcap}, expected a positive one, or 0 for none")


def forward(row_pass, h, weights, bases, labels, sizes, row_weight, row_class, rows, class_cu,
            z_loss, label_smoothing, softcap, joint, metrics, wanted):  # fmt: skip
    """-> [sum, count, metrics[4, ranges] (or [0])] and, where any is wanted, the gradients for a factor of one."""
    listed = head.tabulate(bases, sizes, labels, row_class, rows, class_cu)
    weight = _row_weights(listed, len(bases), row_weight, accumulate_dtype(h.dtype))
    terms = head.Terms(z_loss, label_smoothing, softcap, correct=metrics)
    scores = head.score(row_pass, h, weights, sizes, listed, terms, weight, wanted=wanted)
    live = weight != 0
    mine = (listed.kind == torch.arange(len(bases), device=h.device).unsqueeze(1)) & live

    def by_range(x: torch.Tensor) -> torch.Tensor:
        return torch.where(mine, x, 0).sum(1)

    loss, count = by_range(scores.loss * weight), by_range(weight)
    table = loss.new_empty(0)
    if metrics:
        table = torch.stack([loss, count, by_range(live.to(loss.dtype)), by_range(scores.correct)])
    total = [loss.sum(), count.sum(), table] if joint else [loss, count, table]
    return total + made(scores, wanted)


def backward(row_pass, dsum, h, weights, bases, labels, sizes, row_weight, row_class, rows, class_cu,
             z_loss, label_smoothing, softcap, wanted):  # fmt: skip
    """The gradients from the logits made once more, each row's for the factor of its own range."""
    listed = head.tabulate(bases, sizes, labels, row_class, rows, class_cu)
    acc = accumulate_dtype(h.dtype)
    worth = torch.cat([dsum.to(acc), dsum.new_zeros(1, dtype=acc)])[listed.kind]
    weight = _row_weights(listed, len(bases), row_weight, acc)
    terms = head.Terms(z_loss, label_smoothing, softcap)
    factor = torch.where(weight != 0, worth * weight, 0)
    return made(head.score(row_pass, h, weights, sizes, listed, terms, factor, wanted=wanted), wanted)


def _row_weights(listed, ranges, row_weight, acc):
    """float[n], 0 for the rows that are ignored."""
    one = torch.ones((), dtype=acc, device=listed.kind.device)
    return torch.where(listed.kind < ranges, one if row_weight is None else listed.take(row_weight).to(acc), 0)


def made(scores, wanted):
    """The gradients as a list of tensors, empty ones for what was not wanted; an empty list where nothing was."""
    found = [scores.dh, *scores.dweights] if any(wanted) else []
    return [scores.loss.new_empty(0) if x is None else x for x in found]


def _forward(*args):
    return forward(head.score_rows, *args)


def _backward(*args):
    return backward(head.score_rows, *args)


def scored_rows(labels, bases, sizes, rows, class_cu):
    """(rows, class_cu) of the rows that have a label: on the host, choosing costs less than the products it saves."""
    inside = torch.zeros(labels.shape[0] + 1, dtype=torch.bool)  # the last one is padding
    for base, size in zip(bases, sizes):
        inside[:-1] |= (labels >= base) & (labels < base + size)
    if rows is None:
        rows = inside.nonzero().squeeze(1).int()
        return rows, [0] * (len(bases) + 1) + [rows.shape[0]]
    keep = inside[torch.where(rows < 0, labels.shape[0], rows).clamp(max=labels.shape[0]).long()]
    kept = torch.cat([torch.zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return rows[keep], kept[class_cu].tolist()


def wide(h, weights):
    """h and weights in the accumulation dtype, in which the host multiplies fastest."""
    acc = accumulate_dtype(h.dtype)
    return h.to(acc), [w.to(acc) for w in weights]


def _cpu_forward(h, weights, bases, labels, sizes, row_weight, row_class, rows, class_cu, *options):
    rows, class_cu = scored_rows(labels, bases, sizes, rows, class_cu)
    return _forward(*wide(h, weights), bases, labels, sizes, row_weight, row_class, rows, class_cu, *options)


def _cpu_backward(dsum, h, weights, bases, labels, sizes, row_weight, row_class, rows, class_cu, *options):
    rows, class_cu = scored_rows(labels, bases, sizes, rows, class_cu)
    return _backward(dsum, *wide(h, weights), bases, labels, sizes, row_weight, row_class, rows, class_cu, *options)


def _fake_forward(h, weights, bases, labels, sizes, row_weight, row_class, rows, class_cu,
                  z_loss, label_smoothing, softcap, joint, metrics, wanted):  # fmt: skip
    ranges = () if joint else (len(bases),)
    shapes = ranges, ranges, ((4, len(bases)) if metrics else (0,))
    return [h.new_empty(s, dtype=accumulate_dtype(h.dtype)) for s in shapes] + fake_gradients(h, weights, wanted)


def fake_gradients(h, weights, wanted):
    acc = accumulate_dtype(h.dtype)
    made = zip((h, *weights), wanted) if any(wanted) else ()
    return [x.new_empty(x.shape if want else (0,), dtype=acc) for x, want in made]


def _fake_backward(dsum, h, weights, bases, labels, sizes, row_weight, row_class, rows, class_cu,
                   z_loss, label_smoothing, softcap, wanted):  # fmt: skip
    return fake_gradients(h, weights, wanted)


_ARGUMENTS = (
    "Tensor h, Tensor[] weights, int[] bases, Tensor labels, int[] sizes, Tensor? row_weight, Tensor? row_class,"
    " Tensor? rows, SymInt[]? class_cu, float z_loss, float label_smoothing, float softcap"
)
_op = define(
    "linear_cross_entropy",
    f"({_ARGUMENTS}, bool joint, bool metrics, bool[] wanted) -> Tensor[]",
    fake=_fake_forward,
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    triton=jit("cross_entropy", "cross_entropy_forward", "cross_entropy_backward"),
    torch=Backend(_forward, _backward, anywhere),
)
_backward_op = define_backward(
    "linear_cross_entropy", f"(Tensor dsum, {_ARGUMENTS}, bool[] wanted) -> Tensor[]", fake=_fake_backward
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, labels, row_weight, row_class, rows, lists, options, *weights):
        bases, sizes, class_cu = lists
        *terms, joint, metrics = options
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[7:]]  # a frozen range's gradient is not computed
        # One factor for all that a weight's gradient is made of.
        ctx.scaled = joint or len(bases) == 1 or (class_cu is not None and class_cu[-1] == class_cu[len(bases)])
        how = *terms, joint, metrics, wanted if ctx.scaled else []
        with below_autograd():
            total, count, table, *grads = _op(
                h, list(weights), bases, labels, sizes, row_weight, row_class, rows, class_cu, *how
            )
        ctx.lists, ctx.terms, ctx.wanted = lists, terms, wanted
        ctx.dtypes = [h.dtype, *(w.dtype for w in weights)]
        if ctx.scaled:
            ctx.save_for_backward(labels, *grads)
        else:
            ctx.save_for_backward(h, labels, row_weight, row_class, rows, *weights)
        ctx.mark_non_differentiable(count, table)
        return total, count, table

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum, *_):
        bases, sizes, class_cu = ctx.lists
        if ctx.scaled:
            labels, *grads = ctx.saved_tensors
            grads = _scaled(grads, dsum, labels, bases, sizes, ctx.wanted, ctx.dtypes)
        else:
            h, labels, row_weight, row_class, rows, *weights = ctx.saved_tensors
            grads = _backward_op(dsum, h, weights, bases, labels, sizes, row_weight, row_class, rows, class_cu,
                                 *ctx.terms, ctx.wanted)  # fmt: skip
            grads = [g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)]
        dh, *dweights = (g if want else None for g, want in zip(grads, ctx.wanted))
        return dh, *[None] * 6, *dweights


def _scaled(grads, dsum, labels, bases, sizes, wanted, dtypes):
    """The gradients for a factor of one times the factors dsum, [] or of each weight's range, in their final dtypes."""
    factors = dsum.expand(len(bases)) if dsum.dim() == 0 else dsum
    of_rows = factors[0]
    if dsum.dim() and len(bases) > 1:
        of_rows = torch.zeros_like(labels, dtype=dsum.dtype)
        for base, size, factor in zip(bases, sizes, factors.unbind()):
            of_rows = torch.where((labels >= base) & (labels < base + size), factor, of_rows)
        of_rows = of_rows.unsqueeze(1)
    pairs = zip(grads, [of_rows, *factors.unbind()], wanted, dtypes)
    return [
        torch.mul(g, factor, out=g.new_empty(g.shape, dtype=dtype)) if want else g for g, factor, want, dtype in pairs
    ]


def _pack(h, weights, bases, labels, sizes, row_weight, row_class, rows, class_cu, *options_wanted):
    *options, _ = options_wanted
    return h, labels, row_weight, row_class, rows, (bases, sizes, class_cu), tuple(options), *weights


define_autograd("linear_cross_entropy", _LinearCrossEntropy, pack=_pack)
