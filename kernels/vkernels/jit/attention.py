"""Packed attention in Triton, forward: one program per tile of queries and head, the longest tiles first.

The tiles come from a work list (`vkernels.tiles` tells its layout). The GPU hands programs to free multiprocessors in
order, which is longest-first scheduling without a counter. Keys that every row of a tile sees are taken without a mask.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vkernels.host import dense_heads
from vkernels.jit.attention_tiles import tiles_on_device
from vkernels.jit.common import acc_type
from vkernels.registry import accumulate_dtype
from vkernels.tiles import BLOCK_Q, kind_of, require_fitting

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))

# (BLOCK_M, BLOCK_N, warps, stages) by kernel and bytes of an element, for head sizes up to the number before it: what
# compiles for sm_90 without spills inside the loops, but for float32 beyond 64, where three products in tf32 take all
# registers in every tile that was tried. BLOCK_M queries, BLOCK_N keys.
CONFIGS = {
    ("forward", 2): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 3)},
    ("forward", 4): {64: (128, 64, 8, 2), 128: (128, 32, 8, 2)},
    ("dq", 2): {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("dq", 4): {64: (128, 32, 8, 2), 128: (64, 32, 4, 2)},
    ("dkdv", 2): {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
    ("dkdv", 4): {64: (32, 128, 8, 2), 128: (32, 64, 4, 2)},
}


@triton.jit
def query_tile(tiles_ptr, index, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, HAS_HI: tl.constexpr):
    """Tile `index` of the list, cut to BLOCK_M rows: (q0, q1, kv_lo, full_lo, full_hi, kv_hi, shift)."""
    PARTS: tl.constexpr = BLOCK_Q // BLOCK_M
    tile = tiles_ptr + (1 + index // PARTS) * 8
    q0 = tl.load(tile) + index % PARTS * BLOCK_M
    q1 = tl.minimum(tl.load(tile + 1), q0 + BLOCK_M)
    kv_lo, full_lo = tl.load(tile + 2), tl.load(tile + 3)
    full_hi, kv_hi, shift = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    if PARTS > 1 and not HAS_HI:  # the last row sees the most
        kv_hi = tl.minimum(kv_hi, tl.maximum(q1 - 1 + shift, kv_lo))
        full_hi = tl.minimum(full_hi, kv_hi)
    return q0, q1, kv_lo, full_lo, full_hi, kv_hi, shift


@triton.jit
def blocks_of(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """Of the blocks that begin at lo: how many lie before the full ones, how many are full, how many are not."""
    before = tl.cdiv(full_lo - lo, BLOCK)
    full = tl.maximum((full_hi - lo) // BLOCK - before, 0)
    return before, full, tl.cdiv(hi - lo, BLOCK) - full


@triton.jit
def row_bounds(rows, inside, kv_lo_ptr, kv_hi_ptr, shift, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr):
    """The keys [lo, hi) of every row; lo counts with kv_lo only: no key before the row's document is ever looked at."""
    lo = tl.load(kv_lo_ptr + rows, mask=inside, other=0) if HAS_LO else rows
    hi = tl.load(kv_hi_ptr + rows, mask=inside, other=0) if HAS_HI else rows + shift
    return lo, hi


@triton.jit
def sees(key, lo, hi, HAS_LO: tl.constexpr):
    return (key < hi) & (key >= lo) if HAS_LO else key < hi


@triton.jit
def load_rows(base, start, end, stride, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """Rows [start, start + BLOCK) as [BLOCK, BLOCK_D]; zeros from row `end` (where MASKED) and column D on."""
    row, col = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = base + (start.to(tl.int64) + row)[:, None] * stride + col[None, :]
    if MASKED:
        return tl.load(at, mask=(start + row < end)[:, None] & (col < D)[None, :], other=0)
    if D != BLOCK_D:
        return tl.load(at, mask=(col < D)[None, :], other=0)
    return tl.load(at)


@triton.jit
def _step(acc, total, top, q, lo, hi, k_base, v_base, k_stride, v_stride, start, kv_hi, scale,
          HAS_LO: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
          MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds keys [start, start + BLOCK_N). top: the largest score so far, base 2; total: the sum of 2^(score - top)."""
    k = load_rows(k_base, start, kv_hi, k_stride, BLOCK_N, D, BLOCK_D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)
        s = tl.where(sees(key[None, :], lo[:, None], hi[:, None], HAS_LO), s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * scale)
    base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new  # a row may have seen nothing yet
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(top - base)
    v = load_rows(v_base, start, kv_hi, v_stride, BLOCK_N, D, BLOCK_D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    return acc, total * shrink + tl.sum(p, 1), new


@triton.jit
def _attention_forward(q_ptr, k_ptr, v_ptr, tiles_ptr, kv_lo_ptr, kv_hi_ptr, out_ptr, lse_ptr,
                       q_stride, k_stride, v_stride, Tq, scale,
                       Hq: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr,
                       HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
                       BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_D: tl.constexpr):  # fmt: skip
    head, index = tl.program_id(0) % Hq, tl.program_id(0) // Hq
    q0, q1, kv_lo, full_lo, full_hi, kv_hi, shift = query_tile(tiles_ptr, index, BLOCK_M, BLOCK_Q, HAS_HI)
    if q1 <= q0:
        return
    rows = q0 + tl.arange(0, BLOCK_M)
    lo, hi = row_bounds(rows, rows < q1, kv_lo_ptr, kv_hi_ptr, shift, HAS_LO, HAS_HI)
    hi = tl.minimum(hi, kv_hi)
    q = load_rows(q_ptr + head * D, q0, q1, q_stride, BLOCK_M, D, BLOCK_D, True)
    k_base, v_base = k_ptr + head // (Hq // Hk) * D, v_ptr + head // (Hq // Hk) * D
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    top = tl.full((BLOCK_M,), float("-inf"), ACC)
    scale = scale * LOG2E
    before, full, masked = blocks_of(kv_lo, full_lo, full_hi, kv_hi, BLOCK_N)
    for i in tl.range(0, masked):
        start = kv_lo + (i + tl.where(i < before, 0, full)) * BLOCK_N
        acc, total, top = _step(acc, total, top, q, lo, hi, k_base, v_base, k_stride, v_stride, start, kv_hi, scale,
                                HAS_LO, ACC, D, BLOCK_N, BLOCK_D, True, PRECISION)  # fmt: skip
    for i in tl.range(0, full):
        start = kv_lo + (i + before) * BLOCK_N
        acc, total, top = _step(acc, total, top, q, lo, hi, k_base, v_base, k_stride, v_stride, start, kv_hi, scale,
                                HAS_LO, ACC, D, BLOCK_N, BLOCK_D, False, PRECISION)  # fmt: skip
    if tl.load(tiles_ptr) != KIND:  # a list for another kind of call: nobody should take the result for right
        total = total + float("nan")
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    acc = acc * (1 / total)[:, None]
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(total)) * LN2)
    col = tl.arange(0, BLOCK_D)
    inside = (rows < q1)[:, None] & (col < D)[None, :]
    out = out_ptr + (rows.to(tl.int64) * Hq + head)[:, None] * D + col[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + head.to(tl.int64) * Tq + rows, lse, mask=rows < q1)


def forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    Tq, Hq, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(Hq, Tq, dtype=accumulate_dtype(q.dtype), device=q.device)
    if out.numel() == 0:
        return out, lse
    q, k, v = dense_heads(q), dense_heads(k), dense_heads(v)
    tiles, kv_lo, kv_hi = work(Tq, k.shape[0], cu_q, cu_k, kv_lo, kv_hi, tiles)
    BLOCK_M, BLOCK_N, warps, stages = config("forward", q.dtype, D)
    _attention_forward[(query_tiles(Tq, cu_q) * (BLOCK_Q // BLOCK_M) * Hq,)](
        q, k, v, tiles, kv_lo, kv_hi, out, lse, q.stride(0), k.stride(0), v.stride(0), Tq, scale,
        Hq=Hq, Hk=k.shape[1], D=D, KIND=kind_of(kv_lo, kv_hi), HAS_LO=kv_lo is not None, HAS_HI=kv_hi is not None,
        ACC=acc_type(q.dtype), PRECISION=precision(q.dtype), BLOCK_Q=BLOCK_Q, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        BLOCK_D=padded(D), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def work(Tq, Tk, cu_q, cu_k, kv_lo, kv_hi, tiles):
    """-> (tiles, kv_lo, kv_hi) as the kernels take them; a list is made on the device where none is given."""
    kv_lo, kv_hi = (None if x is None else x.to(torch.int32).contiguous() for x in (kv_lo, kv_hi))
    if tiles is None:
        tiles = tiles_on_device(Tq, Tk, cu_q, cu_k, kv_lo, kv_hi)
    else:
        require_fitting(tiles, cu_q.device, Tq, Tk, cu_q.numel() - 1, kind_of(kv_lo, kv_hi))
    return tiles, kv_lo, kv_hi


def query_tiles(Tq, cu_q) -> int:
    return Tq // BLOCK_Q + cu_q.numel() - 1


def padded(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def precision(dtype: torch.dtype) -> str:
    """float32 products keep float32's accuracy: three of them in tf32."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def config(kernel: str, dtype: torch.dtype, D: int) -> tuple[int, int, int, int]:
    table = CONFIGS[kernel, 2 if dtype.itemsize == 2 else 4]
    return next(table[limit] for limit in table if limit >= D)
