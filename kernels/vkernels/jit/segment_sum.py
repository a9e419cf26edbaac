"""Sums of rows by destination in Triton, without atomics.

The rows come sorted, in pieces of bounded length; a second pass joins the pieces of long segments in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vkernels.jit.common import acc_type, multiprocessors
from vkernels.registry import accumulate_dtype
from vkernels.segments import Segments, most_partial_sums


@triton.jit
def _record(table_ptr, number, count):
    """(begin, end, destination, to) of a piece, and nothing to do beyond the last one."""
    at, there = table_ptr + 4 * number, number < count
    begin = tl.load(at, mask=there, other=0)
    end = tl.load(at + 1, mask=there, other=0)
    row = tl.load(at + 2, mask=there, other=0)
    to = tl.load(at + 3, mask=there, other=0)
    return begin, end, row, to


@triton.jit
def _segment_sum(values_ptr, order_ptr, pieces_ptr, count_ptr, partial_ptr, outs, starts, sizes,
                 n_values, n_cols, values_stride,
                 ACC: tl.constexpr, SORTED: tl.constexpr, COMPACT: tl.constexpr, ROWS: tl.constexpr,
                 COLS: tl.constexpr):  # fmt: skip
    """One piece at a time: its rows of values[order % n_values] (values[begin:end] if not SORTED), summed.

    The sum goes to the out that has its destination, or to its row of partial. In no out: it is not made.
    """
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    count = tl.load(count_ptr)
    begin, end, row, to = _record(pieces_ptr, tl.program_id(0), count)
    for piece in range(tl.program_id(0), count, tl.num_programs(0)):
        # On its way while this one is added: most pieces are one row, and would else wait for three loads in a chain.
        following = _record(pieces_ptr, piece + tl.num_programs(0), count)
        wanted = False
        for i in tl.static_range(len(outs)):
            wanted = wanted | ((row >= starts[i]) & (row < starts[i] + sizes[i]))
        if wanted:
            sums = tl.zeros((ROWS, COLS), ACC)
            for first in range(begin, end, ROWS):
                at = first + tl.arange(0, ROWS)
                source = tl.load(order_ptr + at, mask=at < end, other=0) % n_values if SORTED else at
                inside = (at < end)[:, None] & (col < n_cols)[None, :]
                from_ptr = values_ptr + source.to(tl.int64)[:, None] * values_stride + col[None, :]
                sums += tl.load(from_ptr, mask=inside, other=0).to(ACC)
            total = tl.sum(sums, 0)
            if to >= 0:
                tl.store(partial_ptr + to.to(tl.int64) * n_cols + col, total, mask=col < n_cols)
            else:
                for i in tl.static_range(len(outs)):
                    if (row >= starts[i]) & (row < starts[i] + sizes[i]):
                        out_row = ~to if COMPACT else row - starts[i]
                        to_ptr = outs[i] + out_row.to(tl.int64) * n_cols + col
                        tl.store(to_ptr, total.to(outs[i].dtype.element_ty), mask=col < n_cols)
        begin, end, row, to = following


def segment_sum(
    values: torch.Tensor, segments: Segments, outs: Sequence[torch.Tensor], starts: Sequence[int] = (0,)
) -> None:
    """Write outs[i][r] = the sum of the rows of values[N, C] whose destination is starts[i] + r, in float32.

    outs: [rows, C], contiguous, of any float dtypes; destinations in none of them cost nothing, rows that no value goes
    to stay as they are. Entry e of the segments is the row e % N of values. Bitwise repeatable: a sum depends on its
    own rows and their order only.
    """
    _launch(values, segments, outs, starts, [o.shape[0] for o in outs], compact=False)


def segment_sum_compact(values: torch.Tensor, segments: Segments, out: torch.Tensor) -> None:
    """Write out[u] = the sum of the segment u, for every segment in use; out: [U, C], contiguous."""
    _launch(values, segments, [out], [0], [2**31 - 1], compact=True)


def _launch(values, segments, outs, starts, sizes, *, compact):
    (n, C), entries = values.shape, segments.order.shape[0]
    if n == 0 or C == 0 or entries == 0 or not segments.pieces.shape[0] or not sum(sizes):
        return
    if values.stride(1) != 1:
        values = values.contiguous()
    acc = accumulate_dtype(values.dtype)
    partial = torch.empty(most_partial_sums(entries), C, dtype=acc, device=values.device)
    order, pieces, joins, _, counts = segments
    where = tuple(outs), tuple(starts), tuple(sizes)
    for source, table, count, sort in ((values, pieces, counts, True), (partial, joins, counts[1:], False)):
        if table.shape[0] == 0:
            continue
        ROWS, COLS, warps = tile(C) if sort else (32, 128, 4)
        programs = min(table.shape[0], max(32 // warps, 1) * multiprocessors(values.device))
        _segment_sum[(programs, triton.cdiv(C, COLS))](
            source, order, table, count, partial, *where, n, C, source.stride(0),
            ACC=acc_type(values.dtype), SORTED=sort, COMPACT=compact, ROWS=ROWS, COLS=COLS, num_warps=warps,
        )  # fmt: skip


def tile(columns: int) -> tuple[int, int, int]:
    """(rows, columns, warps): 32 elements a thread; whole rows up to 2048 columns, so that a piece is begun once."""
    COLS = min(max(16, triton.next_power_of_2(columns)), 2048)
    warps = min(max(COLS // 256, 1), 8)
    return 1024 * warps // COLS, COLS, warps
