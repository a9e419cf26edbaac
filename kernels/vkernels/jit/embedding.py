"""Token embedding in Triton: every output row is read from all its tables, projected where asked, and written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vkernels.jit.common import acc_type
from vkernels.jit.segment_sum import segment_sum, tile
from vkernels.segments import Segments, destinations, sort_segments


@triton.jit
def _embed(out_ptr, ids, tables, bases, sizes, code_ids, codebooks, code_bases, code_sizes, weights, biases,
           n_rows, n_cols,
           ACC: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
           DEPTH: tl.constexpr, WIDTHS: tl.constexpr):  # fmt: skip
    """out[t] = sum_i tables[i][ids[i][t] - bases[i]] + sum_j (codebooks[j][...] weights[j]^T + biases[j]), if in range.

    All tables [., n_cols], codebooks [., WIDTHS[j]] and weights [n_cols, WIDTHS[j]] are contiguous.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    there = col < n_cols
    total = tl.zeros((ROWS, COLS), ACC)
    for i in tl.static_range(len(tables)):
        local = tl.load(ids[i] + row, mask=row < n_rows, other=-1).to(tl.int64) - bases[i]
        inside = (row < n_rows) & (local >= 0) & (local < sizes[i])
        from_ptr = tables[i] + local[:, None] * n_cols + col[None, :]
        total += tl.load(from_ptr, mask=inside[:, None] & there[None, :], other=0).to(ACC)
    for j in tl.static_range(len(codebooks)):
        local = tl.load(code_ids[j] + row, mask=row < n_rows, other=-1).to(tl.int64) - code_bases[j]
        inside = (row < n_rows) & (local >= 0) & (local < code_sizes[j])
        if tl.max(inside.to(tl.int32), 0) > 0:  # codes come in runs: most tiles of text have none
            for start in range(0, WIDTHS[j], DEPTH):
                d = start + tl.arange(0, DEPTH)
                code_ptr = codebooks[j] + local[:, None] * WIDTHS[j] + d[None, :]
                codes = tl.load(code_ptr, mask=inside[:, None] & (d < WIDTHS[j])[None, :], other=0)
                weight_ptr = weights[j] + col.to(tl.int64)[None, :] * WIDTHS[j] + d[:, None]
                w = tl.load(weight_ptr, mask=there[None, :] & (d < WIDTHS[j])[:, None], other=0)
                total = tl.dot(codes, w, total, input_precision=PRECISION, out_dtype=ACC)
            if biases[j] is not None:
                bias = tl.load(biases[j] + col, mask=there, other=0).to(ACC)
                total += tl.where(inside[:, None], bias[None, :], 0)
    out = out_ptr + row[:, None] * n_cols + col[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(row < n_rows)[:, None] & there[None, :])


def embed_forward(ids, tables, bases, sizes, indices, which, slots, weights, biases, order) -> torch.Tensor:
    C = tables[0].shape[1] if weights[0] is None else weights[0].shape[0]
    out = torch.empty(ids.shape[0], C, dtype=tables[0].dtype, device=ids.device)
    if out.numel() == 0:
        return out
    vectors = [v.contiguous() for v in (ids, *indices)]
    used = [i for i, size in enumerate(sizes) if size]
    plain, coded = [i for i in used if weights[i] is None], [i for i in used if weights[i] is not None]

    def of(lookups: Sequence[int], *lists: Sequence) -> list[tuple]:
        return [tuple(vectors[which[i]] for i in lookups), *(tuple(_dense(x[i]) for i in lookups) for x in lists)]

    widths = tuple(tables[i].shape[1] for i in coded)
    # A tile of wgmma where there are matrices to multiply, whole rows where there are none.
    ROWS, COLS, warps = (64, 128, 4) if coded else tile(C)
    _embed[(triton.cdiv(out.shape[0], ROWS), triton.cdiv(C, COLS))](
        out, *of(plain, tables, bases, sizes), *of(coded, tables, bases, sizes),
        *of(coded, weights, biases)[1:], *out.shape,
        ACC=acc_type(out.dtype), PRECISION="ieee" if out.dtype == torch.float64 else "tf32x3", ROWS=ROWS, COLS=COLS,
        DEPTH=min(max(16, triton.next_power_of_2(max(widths, default=16))), 64), WIDTHS=widths, num_warps=warps,
    )  # fmt: skip
    return out


def _dense(x):
    return x.contiguous() if isinstance(x, torch.Tensor) else x


def embed_backward(dy, ids, bases, sizes, indices, which, rows, order) -> list[torch.Tensor]:
    grads = [torch.zeros(n, dy.shape[1], dtype=dy.dtype, device=dy.device) for n in rows]
    asked = [i for i, n in enumerate(rows) if n and sizes[i]]
    if not asked:
        return grads
    if order:
        segments, starts = Segments(*order), [sum(sizes[:i]) for i in asked]
    else:  # sorted here, without what is not asked for
        vectors, some = (ids, *indices), [sizes[i] for i in asked]
        used = sorted({which[i] for i in asked})
        places = [used.index(which[i]) for i in asked]
        keys = destinations([vectors[v] for v in used], places, [bases[i] for i in asked], some)
        segments, starts = sort_segments(keys, sum(some)), [sum(some[:k]) for k in range(len(some))]
    segment_sum(dy, segments, [grads[i][: sizes[i]] for i in asked], starts)
    return grads
