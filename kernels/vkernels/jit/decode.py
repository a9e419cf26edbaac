"""Decode attention in Triton: the columns of a sequence split over programs, their partial results joined in order.

A program serves the query heads of one key head: scores stand as [columns, heads] and sums as [head dim, heads], so
that the long side fills the 64 rows that Hopper's matrix instructions have, and few heads (16 columns) waste little.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vkernels.jit.common import acc_type, multiprocessors
from vkernels.registry import accumulate_dtype

LEAST = 256  # columns of a split; below it, what is written and read again outweighs what runs side by side
MOST = 64  # splits


@triton.jit
def _decode_partial(q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, length_ptr, start_ptr, o_ptr, max_ptr, sum_ptr,
                    q_b, q_h, k_b, k_h, v_b, v_h, kc_b, kc_l, kc_h, vc_b, vc_l, vc_h, length_b, L, Hk, scale,
                    ACC: tl.constexpr, PRECISION: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
                    DIM: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr, STARTS: tl.constexpr):  # fmt: skip
    pair, split = tl.program_id(0), tl.program_id(1)
    b, hk = (pair // Hk).to(tl.int64), (pair % Hk).to(tl.int64)
    length = tl.load(length_ptr + b * length_b).to(tl.int32)
    start = tl.maximum(tl.load(start_ptr + b).to(tl.int32), 0) if STARTS else 0
    head, dim = tl.arange(0, HEADS), tl.arange(0, DIM)
    q_at = q_ptr + b * q_b + (hk * G + head)[None, :] * q_h + dim[:, None]
    q = tl.load(q_at, mask=(dim < D)[:, None] & (head < G)[None, :], other=0)

    # The new key never passes through the cache: the first split takes it from where it came, and alone writes it.
    k_new = tl.load(k_ptr + b * k_b + hk * k_h + dim, mask=dim < D, other=0)
    v_new = tl.load(v_ptr + b * v_b + hk * v_h + dim, mask=dim < D, other=0)
    first = split == 0
    append = (dim < D) & first & (length >= 0) & (length < L)
    at = length.to(tl.int64)
    tl.store(k_cache_ptr + b * kc_b + at * kc_l + hk * kc_h + dim, k_new, mask=append)
    tl.store(v_cache_ptr + b * vc_b + at * vc_l + hk * vc_h + dim, v_new, mask=append)
    peak = tl.where(first, tl.sum(q.to(ACC) * k_new.to(ACC)[:, None], 0) * scale, -float("inf"))
    total = tl.where(first, tl.full((HEADS,), 1, ACC), 0)
    acc = tl.where(first, v_new.to(ACC)[:, None] + tl.zeros((DIM, HEADS), ACC), 0)

    span = tl.cdiv(tl.cdiv(tl.maximum(length - start, 0), SPLITS), COLS) * COLS
    begin = start + split * span
    end = tl.minimum(tl.minimum(begin + span, length), L)
    for c in range(begin, end, COLS):
        col = c + tl.arange(0, COLS)
        row = col.to(tl.int64)[:, None]
        inside = (col < end)[:, None] & (dim < D)[None, :]
        k = tl.load(k_cache_ptr + b * kc_b + row * kc_l + hk * kc_h + dim[None, :], mask=inside, other=0)
        v = tl.load(v_cache_ptr + b * vc_b + row * vc_l + hk * vc_h + dim[None, :], mask=inside, other=0)
        s = tl.dot(k, q, input_precision=PRECISION, out_dtype=ACC) * scale
        s = tl.where((col < end)[:, None], s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 0))
        p = tl.exp2(s - higher[None, :])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * shrink[None, :], input_precision=PRECISION, out_dtype=ACC)
        peak = higher

    inside = (dim < D)[:, None] & (head < G)[None, :]
    if SPLITS == 1:
        o_at = o_ptr + (pair.to(tl.int64) * G + head)[None, :] * D + dim[:, None]
        tl.store(o_at, (acc / total[None, :]).to(o_ptr.dtype.element_ty), mask=inside)
    else:
        out = (pair.to(tl.int64) * G + head) * SPLITS + split
        tl.store(o_ptr + out[None, :] * D + dim[:, None], acc, mask=inside)
        tl.store(max_ptr + out, peak, mask=head < G)
        tl.store(sum_ptr + out, total, mask=head < G)


@triton.jit
def _decode_join(part_ptr, max_ptr, sum_ptr, o_ptr, D,
                 ACC: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dim, split = tl.arange(0, DIM), tl.arange(0, ROWS)
    peak = tl.load(max_ptr + row * SPLITS + split, mask=split < SPLITS, other=-float("inf"))
    total = tl.load(sum_ptr + row * SPLITS + split, mask=split < SPLITS, other=0)
    inside = (split < SPLITS)[:, None] & (dim < D)[None, :]
    part = tl.load(part_ptr + (row * SPLITS + split)[:, None] * D + dim[None, :], mask=inside, other=0)
    weight = tl.exp2(peak - tl.max(peak, 0))  # the first split holds a key: its maximum is finite
    o = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(o_ptr + row * D + dim, o.to(o_ptr.dtype.element_ty), mask=dim < D)


def decode_attention(q, k, v, k_cache, v_cache, length, start, scale) -> torch.Tensor:
    B, Hq, D = q.shape
    L, Hk = k_cache.shape[1:3]
    G, DIM = Hq // Hk, max(16, triton.next_power_of_2(D))
    o = torch.empty((B, Hq, D), dtype=q.dtype, device=q.device)
    if not B:
        return o
    splits = _splits(B * Hk, L, multiprocessors(q.device))
    part, peak, total = o, None, None
    if splits > 1:
        options = {"dtype": accumulate_dtype(q.dtype), "device": q.device}
        part = torch.empty(B, Hq, splits, D, **options)
        peak, total = torch.empty(B, Hq, splits, **options), torch.empty(B, Hq, splits, **options)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    ACC, (COLS, stages) = acc_type(q.dtype), _tiles(DIM, q.element_size())
    _decode_partial[(B * Hk, splits)](
        q, k, v, k_cache, v_cache, length, start if start is None else start.contiguous(), part, peak, total,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        length.stride(0) if length.dim() else 0, L, Hk, scale * math.log2(math.e),
        ACC=ACC, PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee", G=G,
        HEADS=max(16, triton.next_power_of_2(G)), D=D, DIM=DIM, COLS=COLS, SPLITS=splits,
        STARTS=start is not None, num_warps=4, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _decode_join[(B * Hq,)](part, peak, total, o, D, ACC=ACC, DIM=DIM, SPLITS=splits,
                                ROWS=triton.next_power_of_2(splits), num_warps=4)  # fmt: skip
    return o


def _splits(pairs: int, columns: int, multiprocessors: int) -> int:
    """Into how many parts each sequence is cut: a function of sizes that the host knows, so that graphs can replay.

    At least two programs fit on a multiprocessor; four rounds of two keep the last round from leaving many idle. A
    power of two: the kernels are compiled for at most 7 of them, however the number of sequences changes.
    """
    wanted = triton.cdiv(8 * multiprocessors, pairs)
    most = max(1, min(wanted, triton.cdiv(columns, LEAST), MOST))
    return 1 << (most.bit_length() - 1)


def _tiles(dim: int, item: int) -> tuple[int, int]:
    """(columns of a tile, tiles of keys and values in flight): up to three of 64 columns, in 144 KB of shared memory.

    float32 products split each key in two parts in registers: 64 columns of 128 dims would spill 664 bytes.
    """
    columns = 64 if item == 2 or dim <= 64 else 32
    return columns, max(1, min(3, (144 << 10) // (2 * columns * dim * item)))
