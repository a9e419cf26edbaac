"""The log-probability of each row's label under the output head: the logits of all rows never exist at once.

Without gradients it is 2 C V operations a row; the backward pass makes the logits again, since what a row's
log-probability is worth is known only then: 6 C V more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from vkernels import head
from vkernels.cross_entropy import check, fake_gradients, made, scored_rows, wide
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


def linear_logprob(
    h: torch.Tensor,
    weights: Sequence[torch.Tensor],
    bases: Sequence[int],
    labels: torch.Tensor,
    *,
    sizes: Sequence[int],
    row_class: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    class_cu: Sequence[int] | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log softmax(h[T, C] @ weights[i][:sizes[i]].T / temperature) at each row's label -> float32[T].

    0 for rows whose label lies in no range, and for those that `rows` does not list; -inf for a label outside of the
    row's class. The softmax is over the union of all ranges, or as row_class, or rows and class_cu, restrict it;
    softcap acts before the temperature; see linear_cross_entropy. float64 tensors give float64.
    entropy: -> (logprob, entropy float32[T] of the distribution that the row's label is drawn from, 0 likewise).
    Both are differentiable in h and weights; a row whose gradients are 0 adds exactly 0, whatever it holds.
    """
    check("linear_logprob", h, weights, bases, labels, sizes, row_class, rows, class_cu, softcap)
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature {temperature}, expected a positive one")
    lists = list(weights), list(bases), labels, list(sizes)
    class_cu = None if class_cu is None else list(class_cu)
    logprob, spread = _op(h, *lists, row_class, rows, class_cu, temperature, softcap, entropy)
    return (logprob, spread) if entropy else logprob


def forward(row_pass, h, weights, bases, labels, sizes, row_class, rows, class_cu, temperature, softcap, entropy):
    """-> (logprob[T], entropy[T], or [0] if not asked for)."""
    listed = head.tabulate(bases, sizes, labels, row_class, rows, class_cu)
    scored = listed.kind < len(bases)
    terms = head.Terms(softcap=softcap, temperature=temperature, entropy=entropy)
    scores = head.score(row_pass, h, weights, sizes, listed, terms, scored.to(accumulate_dtype(h.dtype)))
    logprob = listed.put(torch.where(scored, -scores.loss, 0))
    return logprob, listed.put(torch.where(scored, scores.entropy, 0)) if entropy else logprob.new_empty(0)


def backward(row_pass, dlogprob, dentropy, h, weights, bases, labels, sizes, row_class, rows, class_cu,
             temperature, softcap, wanted):  # fmt: skip
    """The gradients from the logits made once more; dentropy[T], or [0] where there is no entropy."""
    listed = head.tabulate(bases, sizes, labels, row_class, rows, class_cu)
    acc, scored, entropy = accumulate_dtype(h.dtype), listed.kind < len(bases), dentropy.shape == dlogprob.shape
    factor = torch.where(scored, -listed.take(dlogprob).to(acc), 0)
    of_entropy = torch.where(scored, listed.take(dentropy).to(acc), 0) if entropy else None
    terms = head.Terms(softcap=softcap, temperature=temperature, entropy=entropy)
    return made(head.score(row_pass, h, weights, sizes, listed, terms, factor, of_entropy, wanted), wanted)


def _forward(*args):
    return forward(head.score_rows, *args)


def _backward(*args):
    return backward(head.score_rows, *args)


def _cpu_forward(h, weights, bases, labels, sizes, row_class, rows, class_cu, *options):
    rows, class_cu = scored_rows(labels, bases, sizes, rows, class_cu)
    return _forward(*wide(h, weights), bases, labels, sizes, row_class, rows, class_cu, *options)


def _cpu_backward(dlogprob, dentropy, h, weights, bases, labels, sizes, row_class, rows, class_cu, *options):
    rows, class_cu = scored_rows(labels, bases, sizes, rows, class_cu)
    return _backward(dlogprob, dentropy, *wide(h, weights), bases, labels, sizes, row_class, rows, class_cu, *options)


def _fake_forward(h, weights, bases, labels, sizes, row_class, rows, class_cu, temperature, softcap, entropy):
    acc = accumulate_dtype(h.dtype)
    return h.new_empty(h.shape[0], dtype=acc), h.new_empty(h.shape[0] if entropy else 0, dtype=acc)


def _fake_backward(dlogprob, dentropy, h, weights, *rest):
    return fake_gradients(h, weights, rest[-1])


_ARGUMENTS = (
    "Tensor h, Tensor[] weights, int[] bases, Tensor labels, int[] sizes, Tensor? row_class, Tensor? rows,"
    " SymInt[]? class_cu, float temperature, float softcap"
)
_op = define(
    "linear_logprob",
    f"({_ARGUMENTS}, bool entropy) -> (Tensor, Tensor)",
    fake=_fake_forward,
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    triton=jit("cross_entropy", "logprob_forward", "logprob_backward"),
    torch=Backend(_forward, _backward, anywhere),
)
_backward_op = define_backward(
    "linear_logprob",
    f"(Tensor dlogprob, Tensor dentropy, {_ARGUMENTS}, bool[] wanted) -> Tensor[]",
    fake=_fake_backward,
)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, labels, row_class, rows, lists, options, *weights):
        bases, sizes, class_cu = lists
        with below_autograd():
            outputs = _op(h, list(weights), bases, labels, sizes, row_class, rows, class_cu, *options)
        ctx.save_for_backward(h, labels, row_class, rows, *weights)
        ctx.lists, ctx.options = lists, options
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprob, dentropy):
        h, labels, row_class, rows, *weights = ctx.saved_tensors
        bases, sizes, class_cu = ctx.lists
        *terms, _ = ctx.options
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        grads = _backward_op(dlogprob, dentropy, h, weights, bases, labels, sizes, row_class, rows, class_cu,
                             *terms, wanted)  # fmt: skip
        dh, *dweights = (g.to(x.dtype) if want else None for g, x, want in zip(grads, (h, *weights), wanted))
        return dh, *[None] * 5, *dweights


def _pack(h, weights, bases, labels, sizes, row_class, rows, class_cu, *options):
    return h, labels, row_class, rows, (bases, sizes, class_cu), options, *weights


define_autograd("linear_logprob", _LinearLogprob, pack=_pack)
