"""Token embedding over a vocabulary of ranges, each with a table of its own, and the terms that are added to it.

A call is a sum of lookups: (index vector, table, base, size). The tables of the vocabulary share the vector `ids`;
terms (positions, modalities) and slots bring their own. Tables are never joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from vkernels import _host
from vkernels.arguments import require_floats, require_indices, require_separate
from vkernels.host import to_numpy
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
from vkernels.segments import Segments, order_segments

Projection = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


class Slot(NamedTuple):
    """Continuous rows [N, C] for the tokens index int[N], which must differ; an index outside [0, T) is padding.

    role: "replace" takes the place of what the token's id gives, "add" is added to it.
    """

    rows: torch.Tensor
    index: torch.Tensor
    role: str = "replace"


def embed(
    ids: torch.Tensor,
    tables: Sequence[torch.Tensor],
    bases: Sequence[int],
    *,
    sizes: Sequence[int],
    order: Sequence[torch.Tensor] | None = None,
    projections: Sequence[Projection] | None = None,
    terms: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    slots: Sequence[Slot] = (),
) -> torch.Tensor:
    """ids int[T] -> [T, C]: an id in [base, base + size) reads row id - base of that range's table [rows, C].

    Ids in no range (-1 at slot rows) give a zero row and no gradient. All tables share C and dtype.

    projections: for each table None, or weight [C, D], or (weight [C, D], bias [C]) of a codebook [rows, D] whose rows
    it turns into rows of C. The product is made per token: it costs 2 T C D operations and no table of [rows, C].
    terms: (index int[T], table [rows, C]) added to every row, such as positions and modalities; an index outside
    [0, rows) adds nothing. slots: rows from elsewhere, see `Slot`.
    order: the tensors of `embed_order` of the same arguments, for a backward pass that does not sort; made for ids that
    are in no range where a slot replaces them. The sums of the backward pass are in float32 and bitwise repeatable.

    ValueError where the arguments do not fit together.
    """
    projections = [None] * len(tables) if projections is None else list(projections)
    weights = [p[0] if isinstance(p, tuple) else p for p in projections]
    biases = [p[1] if isinstance(p, tuple) else None for p in projections]
    slots = [Slot(*s) for s in slots]
    order = None if order is None else Segments(*order)
    _check_tables(tables, bases, sizes, weights, biases)
    _check_additions(ids, _columns(tables, weights), tables[0].dtype, terms, slots, order)
    inverse = [_inverse(s.index, ids.shape[0]) for s in slots]
    for slot, number in zip(slots, inverse):
        if slot.role == "replace":
            ids = torch.where(number < 0, ids, -1)
    more = [*terms, *((number, slot.rows) for slot, number in zip(slots, inverse))]
    none = [None] * len(more)
    return _op(
        ids,
        [*tables, *(table for _, table in more)],
        [*bases, *(0 for _ in more)],
        [*sizes, *(table.shape[0] for _, table in more)],
        [index for index, _ in more],
        [0] * len(tables) + list(range(1, len(more) + 1)),
        len(slots),
        [*weights, *none],
        [*biases, *none],
        list(order or ()),
    )


def embed_order(
    ids: torch.Tensor,
    bases: Sequence[int],
    sizes: Sequence[int],
    *,
    terms: Sequence[tuple[torch.Tensor, int]] = (),
) -> Segments:
    """The tables that `embed`'s backward pass needs, made on the host: int[T] on the CPU -> `Segments` on the CPU.

    terms: (index int[T], rows of the table) in `embed`'s order. Destinations are numbered range after range, then term
    after term. The shapes follow from T, the sizes and the number of terms alone.
    """
    vectors = [ids, *(index for index, _ in terms)]
    require_indices("embed_order", ids=vectors)
    require_separate("embed_order", bases, sizes)
    if any(v.dim() != 1 or v.shape != ids.shape or v.device.type != "cpu" for v in vectors):
        raise ValueError(f"embed_order: found {[(*v.shape, str(v.device)) for v in vectors]}; expected [T] on the CPU")
    which = [0] * len(bases) + list(range(1, len(vectors)))
    return order_segments(
        vectors, which, [*bases, *(0 for _ in terms)], [int(n) for n in (*sizes, *(rows for _, rows in terms))]
    )


def _check_tables(tables, bases, sizes, weights, biases) -> None:
    if not len(tables) == len(bases) == len(sizes) == len(weights) or not tables:
        found = f"{len(tables)} tables, {len(bases)} bases, {len(sizes)} sizes, {len(weights)} projections"
        raise ValueError(f"embed: {found}; expected as many of each, and at least one")
    require_floats("embed", tables=tables)
    C, dtype = _columns(tables, weights), tables[0].dtype
    for i, (table, size, weight, bias) in enumerate(zip(tables, sizes, weights, biases)):
        width = C if weight is None else weight.shape[-1]
        if table.dtype != dtype or table.dim() != 2 or table.shape[1] != width or not 0 <= size <= table.shape[0]:
            found, expected = f"{table.dtype}{list(table.shape)}", f"{dtype}[rows >= {size}, {width}]"
            raise ValueError(f"embed: table {i} is {found}; expected {expected}")
        for kind, x, shape in (("projection", weight, (C, width)), ("bias", bias, (C,))):
            if x is not None and (x.dtype != dtype or x.shape != shape):
                raise ValueError(f"embed: {kind} {i} is {x.dtype}{list(x.shape)}; expected {dtype}{list(shape)}")
    require_separate("embed", bases, sizes)


def _check_additions(ids, C, dtype, terms, slots, order) -> None:
    require_indices("embed", ids=ids)
    if ids.dim() != 1:
        raise ValueError(f"embed: ids {list(ids.shape)}, expected [T]; flatten a batch first")
    for i, (index, table) in enumerate(terms):
        if index.shape != ids.shape or table.dim() != 2 or table.shape[1] != C or table.dtype != dtype:
            found = f"index {list(index.shape)}, table {table.dtype}{list(table.shape)}"
            raise ValueError(f"embed: term {i} has {found}; expected {list(ids.shape)} and {dtype}[rows, {C}]")
    for i, (rows, index, role) in enumerate(slots):
        if role not in ("replace", "add"):
            raise ValueError(f"embed: slot {i} has the role {role!r}; expected replace or add")
        if rows.dim() != 2 or rows.shape[1] != C or index.shape != rows.shape[:1]:
            found = f"rows {list(rows.shape)}, index {list(index.shape)}"
            raise ValueError(f"embed: slot {i} has {found}; expected [N, {C}] and [N]")
    if order is not None and order.order.shape[0] != ids.shape[0] * (1 + len(terms)):
        found = f"an order of {order.order.shape[0]} entries for {ids.shape[0]} ids and {len(terms)} terms"
        raise ValueError(f"embed: {found}; expected embed_order of the same ids and terms")


def _columns(tables, weights) -> int:
    return tables[0].shape[-1] if weights[0] is None else weights[0].shape[0]


def _inverse(index: torch.Tensor, length: int) -> torch.Tensor:
    """index int[N] -> int32[length], the number n with index[n] == t, else -1."""
    found = torch.full((length + 1,), -1, dtype=torch.int32, device=index.device)
    place = torch.where((index >= 0) & (index < length), index, length).long()
    number = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
    return found.index_put((place,), number)[:length]


def _sum_of_lookups(gather, ids, tables, bases, sizes, indices, which, weights, biases):
    """The forward pass of a backend that has `gather(index, tables, bases, sizes)` -> [T, D], zeros out of range."""
    acc, parts = accumulate_dtype(tables[0].dtype), []
    for v, index in enumerate((ids, *indices)):
        mine = [i for i, w in enumerate(which) if w == v]
        plain = [i for i in mine if weights[i] is None]
        if plain:
            parts.append(gather(index, *([x[i] for i in plain] for x in (tables, bases, sizes))))
        for i in mine:
            if weights[i] is None:
                continue
            codes = gather(index, [tables[i]], [bases[i]], [sizes[i]])
            rows = F.linear(codes.to(acc), weights[i].to(acc))
            if biases[i] is not None:
                rows += _inside(index, bases[i], sizes[i]).unsqueeze(1) * biases[i].to(acc)
            parts.append(rows)
    total = parts[0] if len(parts) == 1 else parts[0].to(acc, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(tables[0].dtype)


def _inside(index, base, size):
    return (index >= base) & (index < base + size)


def _gather_torch(index, tables, bases, sizes):
    out = tables[0].new_zeros(index.shape[0], tables[0].shape[1])
    for table, base, size in zip(tables, bases, sizes):
        if size:
            rows = table.index_select(0, (index - base).clamp(0, size - 1))
            out = torch.where(_inside(index, base, size).unsqueeze(1), rows, out)
    return out


def _gather_cpu(index, tables, bases, sizes):
    out = torch.empty(index.shape[0], tables[0].shape[1], dtype=tables[0].dtype)
    as_bytes = [to_numpy(t.detach().contiguous().view(torch.uint8)) for t in tables]
    _host.gather_rows(to_numpy(index.long().contiguous()), as_bytes, bases, sizes, to_numpy(out.view(torch.uint8)))
    return out


def _forward(ids, tables, bases, sizes, indices, which, slots, weights, biases, order):
    return _sum_of_lookups(_gather_torch, ids, tables, bases, sizes, indices, which, weights, biases)


def _cpu_forward(ids, tables, bases, sizes, indices, which, slots, weights, biases, order):
    return _sum_of_lookups(_gather_cpu, ids, tables, bases, sizes, indices, which, weights, biases)


def _backward(dy, ids, bases, sizes, indices, which, rows, order):
    grads, acc = [], accumulate_dtype(dy.dtype)
    for base, size, w, n in zip(bases, sizes, which, rows):
        if n == 0:
            grads.append(dy.new_empty(0, dy.shape[1]))
            continue
        index = (ids, *indices)[w]
        # One more row takes what is outside the range: no selection whose shape depends on the data.
        local = torch.where(_inside(index, base, size), index - base, n)
        # It sorts on a GPU, where index_add_ would add in any order.
        grad = torch.ops.aten.embedding_dense_backward(dy.to(acc), local, n + 1, n, False)
        grads.append(grad[:n].to(dy.dtype, copy=True))
    return grads


def _cpu_backward(dy, ids, bases, sizes, indices, which, rows, order):
    acc = accumulate_dtype(dy.dtype)
    values = to_numpy(dy.to(acc).contiguous())
    vectors = [to_numpy(v.long().contiguous()) for v in (ids, *indices)]
    grads = [torch.zeros(n, dy.shape[1], dtype=acc) for n in rows]
    for grad, base, size, w in zip(grads, bases, sizes, which):
        if len(grad):
            _host.add_rows(values, vectors[w], base, size, to_numpy(grad), torch.get_num_threads())
    return [g.to(dy.dtype) for g in grads]


def _fake_forward(ids, tables, bases, sizes, indices, which, slots, weights, biases, order):
    return tables[0].new_empty(ids.shape[0], _columns(tables, weights))


_op = define(
    "embed",
    "(Tensor ids, Tensor[] tables, int[] bases, SymInt[] sizes, Tensor[] indices, int[] which, int slots,"
    " Tensor?[] weights, Tensor?[] biases, Tensor[] order) -> Tensor",
    fake=_fake_forward,
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    triton=jit("embedding", "embed_forward", "embed_backward"),
    torch=Backend(_forward, _backward, anywhere),
)
_backward_op = define_backward(
    "embed",
    "(Tensor dy, Tensor ids, int[] bases, SymInt[] sizes, Tensor[] indices, int[] which, SymInt[] rows,"
    " Tensor[] order)"
    " -> Tensor[]",
    fake=lambda dy, ids, bases, sizes, indices, which, rows, order: [dy.new_empty(n, dy.shape[1]) for n in rows],
)


def _gather(index, table, base, size):
    """The plain op: rows of one table."""
    return _op(index, [table], [base], [size], [], [0], 0, [None], [None], [])


class _Call(NamedTuple):
    """What a call of the op has besides tensors, and how many of those there are of each kind."""

    bases: list[int]
    sizes: list[int]
    which: list[int]
    slots: int
    indices: int
    order: int

    def split(self, tensors: Sequence) -> tuple[list, ...]:
        """indices, order, tables, weights, biases."""
        counts, found, at = (self.indices, self.order, *[len(self.bases)] * 3), [], 0
        for n in counts:
            found.append(list(tensors[at : at + n]))
            at += n
        return tuple(found)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, ids, *tensors):
        indices, order, tables, weights, biases = call.split(tensors)
        ctx.call, ctx.rows = call, [t.shape[0] for t in tables]
        codebooks = [None if w is None else t for t, w in zip(tables, weights)]
        ctx.save_for_backward(ids, *indices, *order, *codebooks, *weights, *biases)
        with below_autograd():
            return _op(ids, tables, call.bases, call.sizes, indices, call.which, call.slots, weights, biases, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        call, (ids, *saved) = ctx.call, ctx.saved_tensors
        indices, order, codebooks, weights, biases = call.split(saved)
        _, _, *wanted = call.split(ctx.needs_input_grad[2:])
        first_slot = len(call.bases) - call.slots

        def summed(values, chosen):
            """The sums of the values by row of the chosen tables; a table that is not chosen is worth no work."""
            rows = [n if i in chosen else 0 for i, n in enumerate(ctx.rows)]
            return _backward_op(values, ids, call.bases, call.sizes, indices, call.which, rows, order)

        grads = [[None] * len(call.bases) for _ in range(3)]
        plain = [i for i in range(first_slot) if wanted[0][i] and weights[i] is None]
        if plain:
            sums = summed(dy, plain)
            for i in plain:
                grads[0][i] = sums[i]
        for i, weight in enumerate(weights):
            index = (ids, *indices)[call.which[i]]
            if i >= first_slot and wanted[0][i]:
                grads[0][i] = _gather(_inverse(index, ctx.rows[i]), dy, 0, dy.shape[0])
            if weight is not None and wanted[0][i]:
                grads[0][i] = summed(dy @ weight, [i])[i]
            if weight is not None and (wanted[1][i] or wanted[2][i]):
                grads[1][i], grads[2][i] = _projection_grads(
                    dy, index, codebooks[i], call.bases[i], call.sizes[i], biases[i]
                )
        return None, None, *(None for _ in (*indices, *order)), *grads[0], *grads[1], *grads[2]


def _projection_grads(dy, index, codebook, base, size, bias):
    """The gradients of weight and bias in one product: the bias belongs to a code of ones."""
    codes = _gather(index, codebook, base, size)
    if bias is None:
        return dy.t() @ codes, None
    joined = dy.t() @ torch.cat([codes, _inside(index, base, size).unsqueeze(1).to(codes)], 1)
    return joined[:, :-1], joined[:, -1]


def _pack(ids, tables, bases, sizes, indices, which, slots, weights, biases, order):
    call = _Call(bases, sizes, which, slots, len(indices), len(order))
    return call, ids, *indices, *order, *tables, *weights, *biases


define_autograd("embed", _Embed, pack=_pack)
