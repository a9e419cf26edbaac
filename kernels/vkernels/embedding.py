"""Token embedding over a vocabulary of ranges, each with a table of its own; tables are never joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from vkernels import _host
from vkernels.host import to_numpy
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


def embed(
    ids: torch.Tensor, tables: Sequence[torch.Tensor], bases: Sequence[int], *, sizes: Sequence[int]
) -> torch.Tensor:
    """ids int[T] -> [T, C]: an id in [base, base + size) reads row id - base of that range's table [rows, C].

    Ids in no range (-1 at slot rows) give a zero row and no gradient. All tables share C and dtype.
    """
    if not len(tables) == len(bases) == len(sizes) or not tables:
        found = f"{len(tables)} tables, {len(bases)} bases, {len(sizes)} sizes"
        raise ValueError(f"embed: {found}; expected as many of each, and at least one")
    return _op(ids, list(tables), list(bases), list(sizes))


def _forward(ids, tables, bases, sizes):
    out = None
    for table, base, size in zip(tables, bases, sizes):
        local = ids - base
        rows = table.index_select(0, local.clamp(0, size - 1))
        inside = ((local >= 0) & (local < size)).unsqueeze(-1)
        out = torch.where(inside, rows, 0 if out is None else out)
    return out.to(tables[0].dtype)


def _backward(dy, ids, bases, sizes, rows):
    grads = []
    for base, size, n in zip(bases, sizes, rows):
        if n == 0:
            grads.append(dy.new_empty(0, dy.shape[1]))
            continue
        local = ids - base
        # One more row takes what is outside the range: no selection whose shape depends on the data.
        local = torch.where((local >= 0) & (local < size), local, n)
        grad = torch.zeros(n + 1, dy.shape[1], dtype=accumulate_dtype(dy.dtype), device=dy.device)
        grads.append(grad.index_add_(0, local, dy.to(grad.dtype))[:n].to(dy.dtype, copy=True))
    return grads


def _cpu_forward(ids, tables, bases, sizes):
    out = torch.empty(ids.shape[0], tables[0].shape[1], dtype=tables[0].dtype)
    as_bytes = [to_numpy(t.detach().contiguous().view(torch.uint8)) for t in tables]
    _host.gather_rows(to_numpy(ids.long().contiguous()), as_bytes, bases, sizes, to_numpy(out.view(torch.uint8)))
    return out


def _cpu_backward(dy, ids, bases, sizes, rows):
    acc = accumulate_dtype(dy.dtype)
    dy_, ids_ = to_numpy(dy.to(acc).contiguous()), to_numpy(ids.long().contiguous())
    grads = [torch.zeros(n, dy.shape[1], dtype=acc) for n in rows]
    for grad, base, size in zip(grads, bases, sizes):
        if len(grad) == 0:
            continue
        _host.add_rows(dy_, ids_, base, size, to_numpy(grad), torch.get_num_threads())
    return [g.to(dy.dtype) for g in grads]


_op = define(
    "embed",
    "(Tensor ids, Tensor[] tables, int[] bases, int[] sizes) -> Tensor",
    fake=lambda ids, tables, bases, sizes: tables[0].new_empty(ids.shape[0], tables[0].shape[1]),
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    torch=Backend(_forward, _backward, anywhere),
)
_backward_op = define_backward(
    "embed",
    "(Tensor dy, Tensor ids, int[] bases, int[] sizes, int[] rows) -> Tensor[]",
    fake=lambda dy, ids, bases, sizes, rows: [dy.new_empty(n, dy.shape[1]) for n in rows],
)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, bases, sizes, *tables):
        ctx.save_for_backward(ids)
        # A frozen table is worth no work: it asks for a gradient of no rows.
        ctx.layout = bases, sizes, [t.shape[0] if t.requires_grad else 0 for t in tables]
        with below_autograd():
            return _op(ids, list(tables), bases, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        grads = _backward_op(dy, *ctx.saved_tensors, *ctx.layout)
        return None, None, None, *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[3:]))


define_autograd("embed", _Embed, pack=lambda ids, tables, bases, sizes: (ids, bases, sizes, *tables))
