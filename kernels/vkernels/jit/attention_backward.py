"""Packed attention in Triton, backward: one kernel for the gradient of the queries, one for those of keys and values.

Each output element is summed by one program in one order: no atomics, the same bits every time. The first kernel also
leaves delta = sum(do * out) of every row for the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.host import dense_heads
from vkernels.jit.attention import (
    LOG2E,
    blocks_of,
    config,
    load_rows,
    padded,
    precision,
    query_tile,
    query_tiles,
    row_bounds,
    sees,
    work,
)
from vkernels.jit.common import acc_type
from vkernels.tiles import BLOCK_K, BLOCK_Q


@triton.jit
def _dq_step(dq, q, do, lse, delta, lo, hi, k_base, v_base, k_stride, v_stride, start, kv_hi, scale,
             HAS_LO: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
             MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    k = load_rows(k_base, start, kv_hi, k_stride, BLOCK_N, D, BLOCK_D, MASKED)
    v = load_rows(v_base, start, kv_hi, v_stride, BLOCK_N, D, BLOCK_D, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)
        p = tl.where(sees(key[None, :], lo[:, None], hi[:, None], HAS_LO), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _attention_dq(do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, kv_lo_ptr, kv_hi_ptr, dq_ptr, delta_ptr,
                  do_stride, q_stride, k_stride, v_stride, Tq, scale,
                  Hq: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr,
                  ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    head, index = tl.program_id(0) % Hq, tl.program_id(0) // Hq
    q0, q1, kv_lo, full_lo, full_hi, kv_hi, shift = query_tile(tiles_ptr, index, BLOCK_M, BLOCK_Q, HAS_HI)
    if q1 <= q0:
        return
    rows = q0 + tl.arange(0, BLOCK_M)
    inside = rows < q1
    lo, hi = row_bounds(rows, inside, kv_lo_ptr, kv_hi_ptr, shift, HAS_LO, HAS_HI)
    hi = tl.minimum(hi, kv_hi)
    at = head.to(tl.int64) * Tq + rows
    do = load_rows(do_ptr + head * D, q0, q1, do_stride, BLOCK_M, D, BLOCK_D, True)
    out = load_rows(out_ptr + head * D, q0, q1, Hq * D, BLOCK_M, D, BLOCK_D, True)
    delta = tl.sum(do.to(ACC) * out.to(ACC), 1)
    tl.store(delta_ptr + at, delta, mask=inside)
    lse = tl.load(lse_ptr + at, mask=inside, other=0)
    lse = tl.where(lse == float("-inf"), 0.0, lse) * LOG2E  # a row without keys: its p are masked
    q = load_rows(q_ptr + head * D, q0, q1, q_stride, BLOCK_M, D, BLOCK_D, True)
    k_base, v_base = k_ptr + head // (Hq // Hk) * D, v_ptr + head // (Hq // Hk) * D
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    before, full, masked = blocks_of(kv_lo, full_lo, full_hi, kv_hi, BLOCK_N)
    for i in tl.range(0, masked):
        start = kv_lo + (i + tl.where(i < before, 0, full)) * BLOCK_N
        dq = _dq_step(dq, q, do, lse, delta, lo, hi, k_base, v_base, k_stride, v_stride, start, kv_hi, scale * LOG2E,
                      HAS_LO, ACC, D, BLOCK_N, BLOCK_D, True, PRECISION)  # fmt: skip
    for i in tl.range(0, full):
        start = kv_lo + (i + before) * BLOCK_N
        dq = _dq_step(dq, q, do, lse, delta, lo, hi, k_base, v_base, k_stride, v_stride, start, kv_hi, scale * LOG2E,
                      HAS_LO, ACC, D, BLOCK_N, BLOCK_D, False, PRECISION)  # fmt: skip
    col = tl.arange(0, BLOCK_D)
    dq_rows = dq_ptr + (rows.to(tl.int64) * Hq + head)[:, None] * D + col[None, :]
    tl.store(dq_rows, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (col < D)[None, :])


@triton.jit
def _dkdv_step(dk, dv, k, v, key, q_base, do_base, lse_base, delta_base, kv_lo_ptr, kv_hi_ptr, q_stride, do_stride,
               start, q_hi, shift, scale,
               ACC: tl.constexpr, D: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores are held as [keys, queries]. A row from q_hi on is zero in q, do, lse and delta, and so adds nothing."""
    q = load_rows(q_base, start, q_hi, q_stride, BLOCK_M, D, BLOCK_D, MASKED)
    do = load_rows(do_base, start, q_hi, do_stride, BLOCK_M, D, BLOCK_D, MASKED)
    rows = start + tl.arange(0, BLOCK_M)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC)
    lse = tl.load(lse_base + rows, mask=rows < q_hi, other=0) if MASKED else tl.load(lse_base + rows)
    if MASKED:
        lse = tl.where(lse == float("-inf"), 0.0, lse)
    p = tl.exp2(s * scale - (lse * LOG2E)[None, :])
    if MASKED:
        lo, hi = row_bounds(rows, rows < q_hi, kv_lo_ptr, kv_hi_ptr, shift, HAS_LO, HAS_HI)
        p = tl.where(sees(key[:, None], lo[None, :], hi[None, :], HAS_LO), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=ACC)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
    # Loaded where it is needed: it would take registers while the most are in use.
    delta = tl.load(delta_base + rows, mask=rows < q_hi, other=0) if MASKED else tl.load(delta_base + rows)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=ACC), dv


@triton.jit
def _keys_of(tile, part, BLOCK_N: tl.constexpr):
    """Volatile, so that a second call reads again."""
    k0 = tl.load(tile, volatile=True) + part * BLOCK_N
    return k0, tl.minimum(tl.load(tile + 1, volatile=True), k0 + BLOCK_N)


@triton.jit(do_not_specialize=["NQ"])
def _attention_dkdv(do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, tiles_ptr, kv_lo_ptr, kv_hi_ptr, dk_ptr, dv_ptr,
                    do_stride, q_stride, k_stride, v_stride, Tq, NQ, scale,
                    Hq: tl.constexpr, Hk: tl.constexpr, D: tl.constexpr, HAS_LO: tl.constexpr, HAS_HI: tl.constexpr,
                    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    PARTS: tl.constexpr = BLOCK_K // BLOCK_N
    GROUP: tl.constexpr = Hq // Hk
    head, index = tl.program_id(0) % Hk, tl.program_id(0) // Hk
    tile = tiles_ptr + (1 + NQ + index // PARTS) * 8
    k0, k1 = _keys_of(tile, index % PARTS, BLOCK_N)
    if k1 <= k0:
        return
    q_lo, full_lo, full_hi = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    q_hi, shift = tl.load(tile + 5), tl.load(tile + 6)
    key = k0 + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + head * D, k0, k1, k_stride, BLOCK_N, D, BLOCK_D, True)
    v = load_rows(v_ptr + head * D, k0, k1, v_stride, BLOCK_N, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    before, full, masked = blocks_of(q_lo, full_lo, full_hi, q_hi, BLOCK_M)
    for i in tl.range(0, masked * GROUP):  # the query heads of the group, one after the other
        h = head * GROUP + i // masked
        j = i % masked
        start = q_lo + (j + tl.where(j < before, 0, full)) * BLOCK_M
        at = h.to(tl.int64) * Tq
        dk, dv = _dkdv_step(dk, dv, k, v, key, q_ptr + h * D, do_ptr + h * D, lse_ptr + at, delta_ptr + at, kv_lo_ptr,
                            kv_hi_ptr, q_stride, do_stride, start, q_hi, shift, scale * LOG2E,
                            ACC, D, HAS_LO, HAS_HI, BLOCK_M, BLOCK_D, True, PRECISION)  # fmt: skip
    for i in tl.range(0, full * GROUP):
        h = head * GROUP + i // full
        start = q_lo + (before + i % full) * BLOCK_M
        at = h.to(tl.int64) * Tq
        dk, dv = _dkdv_step(dk, dv, k, v, key, q_ptr + h * D, do_ptr + h * D, lse_ptr + at, delta_ptr + at, kv_lo_ptr,
                            kv_hi_ptr, q_stride, do_stride, start, q_hi, shift, scale * LOG2E,
                            ACC, D, HAS_LO, HAS_HI, BLOCK_M, BLOCK_D, False, PRECISION)  # fmt: skip
    # Read once more: held over the loops, they would spill registers.
    k0, k1 = _keys_of(tile, index % PARTS, BLOCK_N)
    key = k0 + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    inside = (key < k1)[:, None] & (col < D)[None, :]
    at = (key.to(tl.int64) * Hk + head)[:, None] * D + col[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    Tq, Hq, D = q.shape
    Tk, Hk, _ = k.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(Hq, Tq, dtype=lse.dtype, device=q.device)
    do, q, k, v = (dense_heads(x) for x in (do, q, k, v))
    out, lse = out.contiguous(), lse.contiguous()
    tiles, kv_lo, kv_hi = work(Tq, Tk, cu_q, cu_k, kv_lo, kv_hi, tiles)
    NQ = query_tiles(Tq, cu_q)
    common = {
        "Hq": Hq, "Hk": Hk, "D": D, "HAS_LO": kv_lo is not None, "HAS_HI": kv_hi is not None,
        "ACC": acc_type(q.dtype), "PRECISION": precision(q.dtype), "BLOCK_D": padded(D),
    }  # fmt: skip
    strides = do.stride(0), q.stride(0), k.stride(0), v.stride(0), Tq
    if dq.numel():
        BLOCK_M, BLOCK_N, warps, stages = config("dq", q.dtype, D)
        _attention_dq[(NQ * (BLOCK_Q // BLOCK_M) * Hq,)](
            do, q, k, v, out, lse, tiles, kv_lo, kv_hi, dq, delta, *strides, scale, **common,
            BLOCK_Q=BLOCK_Q, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if dk.numel():
        BLOCK_M, BLOCK_N, warps, stages = config("dkdv", q.dtype, D)
        NK = tiles.shape[0] - 1 - NQ
        _attention_dkdv[(NK * (BLOCK_K // BLOCK_N) * Hk,)](
            do, q, k, v, lse, delta, tiles, kv_lo, kv_hi, dk, dv, *strides, NQ, scale, **common,
            BLOCK_K=BLOCK_K, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk, dv
