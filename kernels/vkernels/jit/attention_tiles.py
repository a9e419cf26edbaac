"""The work list of packed attention made on a GPU: what `vkernels.attention_tiles` makes, for calls that bring none.

Three launches over tiles: what each tile of queries sees, by whom each tile of keys is seen, and the order of lengths.
Nothing is asked of the device; the counts of tiles are upper bounds that the host knows. Counts of documents and tiles
differ from batch to batch: kernels are not compiled anew for those that are 1 or divisible by 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.tiles import BLOCK_K, BLOCK_Q, STEP, WIDTH, counts, kind_of

DOCUMENTS, STEPS, TILES = 256, 256, 1024  # how many of each are looked at together
NONE = 2**31 - 1


@triton.jit
def _document_of(tile, cu_ptr, S, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    """(document of a tile, number of tiles before the document); document S for a tile beyond the last one."""
    index = tl.arange(0, DOCUMENTS)
    total, before, document = tile * 0, tile * 0, tile * 0
    for first in range(0, S, DOCUMENTS):
        s = first + index
        begin = tl.load(cu_ptr + s, mask=s < S, other=0)
        tiles = tl.cdiv(tl.load(cu_ptr + s + 1, mask=s < S, other=0) - begin, BLOCK)
        upto = total + tl.cumsum(tiles, 0)
        past = (upto <= tile) & (s < S)
        document += tl.sum(past.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(past, upto, 0), 0))
        total += tl.sum(tiles, 0)
    return document, before


@triton.jit
def _tiles_before(document, cu_ptr, BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr):
    index = tl.arange(0, DOCUMENTS)
    total = document * 0
    for first in range(0, document, DOCUMENTS):
        s = first + index
        begin = tl.load(cu_ptr + s, mask=s < document, other=0)
        end = tl.load(cu_ptr + s + 1, mask=s < document, other=0)
        total += tl.sum(tl.cdiv(end - begin, BLOCK), 0)
    return total


@triton.jit
def _store(row, a, b, c, d, e, f, g):
    tl.store(row, a)
    tl.store(row + 1, b)
    tl.store(row + 2, c)
    tl.store(row + 3, d)
    tl.store(row + 4, e)
    tl.store(row + 5, f)
    tl.store(row + 6, g)
    tl.store(row + 7, 0)


@triton.jit(do_not_specialize=["S"])
def _query_tiles(cu_q_ptr, cu_k_ptr, kv_lo_ptr, kv_hi_ptr, tiles_ptr, seen_ptr, S,
                 HAS_LO: tl.constexpr, HAS_HI: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
                 DOCUMENTS: tl.constexpr, NONE: tl.constexpr):  # fmt: skip
    """One tile per program; seen[tile, step of it] = (lo, hi, full_lo, full_hi), as the host's `Seen`."""
    tile = tl.program_id(0)
    row = tiles_ptr + tile * 8
    document, before = _document_of(tile, cu_q_ptr, S, BLOCK, DOCUMENTS)
    if document >= S:
        _store(row, 0, 0, 0, 0, 0, 0, 0)
        return
    q_begin, q_end = tl.load(cu_q_ptr + document), tl.load(cu_q_ptr + document + 1)
    k_begin, k_end = tl.load(cu_k_ptr + document), tl.load(cu_k_ptr + document + 1)
    q0 = q_begin + (tile - before) * BLOCK
    shift = k_end - q_end + 1
    step = tl.arange(0, BLOCK // STEP)
    rows = q0 + step[:, None] * STEP + tl.arange(0, STEP)[None, :]
    inside = rows < q_end
    lo = rows * 0 + k_begin
    hi = rows + shift
    if HAS_LO:
        lo = tl.maximum(lo, tl.load(kv_lo_ptr + rows, mask=inside, other=0))
    if HAS_HI:
        hi = tl.minimum(k_end, tl.load(kv_hi_ptr + rows, mask=inside, other=0))
    sees = inside & (lo < hi)
    seen_lo = tl.min(tl.where(sees, lo, NONE), 1)
    seen_hi = tl.max(tl.where(sees, hi, -NONE), 1)
    full_lo = tl.max(tl.where(inside, lo, -NONE), 1)
    full_hi = tl.min(tl.where(inside, hi, NONE), 1)
    seen = seen_ptr + (tile * (BLOCK // STEP) + step) * 4
    tl.store(seen, seen_lo)
    tl.store(seen + 1, seen_hi)
    tl.store(seen + 2, full_lo)
    tl.store(seen + 3, full_hi)
    kv_lo, kv_hi = tl.min(seen_lo, 0), tl.max(seen_hi, 0)
    nothing = kv_lo == NONE
    kv_lo, kv_hi = tl.where(nothing, k_begin, kv_lo), tl.where(nothing, k_begin, kv_hi)
    lo_of_all, hi_of_all = tl.max(full_lo, 0), tl.min(full_hi, 0)
    none = hi_of_all <= lo_of_all
    _store(row, q0, tl.minimum(q0 + BLOCK, q_end), kv_lo, tl.where(none, kv_lo, lo_of_all),
           tl.where(none, kv_lo, hi_of_all), kv_hi, shift)  # fmt: skip


@triton.jit(do_not_specialize=["S"])
def _key_tiles(cu_q_ptr, cu_k_ptr, tiles_ptr, seen_ptr, S,
               BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
               DOCUMENTS: tl.constexpr, NONE: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    row = tiles_ptr + tile * 8
    document, before = _document_of(tile, cu_k_ptr, S, BLOCK, DOCUMENTS)
    if document >= S:
        _store(row, 0, 0, 0, 0, 0, 0, 0)
        return
    q_begin, q_end = tl.load(cu_q_ptr + document), tl.load(cu_q_ptr + document + 1)
    k_begin, k_end = tl.load(cu_k_ptr + document), tl.load(cu_k_ptr + document + 1)
    k0 = k_begin + (tile - before) * BLOCK
    k1 = tl.minimum(k0 + BLOCK, k_end)
    seen = seen_ptr + _tiles_before(document, cu_q_ptr, BLOCK_Q, DOCUMENTS) * (BLOCK_Q // STEP) * 4
    count = tl.cdiv(q_end - q_begin, STEP)
    first, last, full = tile * 0 + NONE, tile * 0 - 1, tile * 0
    full_first, full_last = tile * 0 + NONE, tile * 0 - 1
    for begin in range(0, count, STEPS):
        s = begin + tl.arange(0, STEPS)
        here = s < count
        lo = tl.load(seen + s * 4, mask=here, other=NONE)
        hi = tl.load(seen + s * 4 + 1, mask=here, other=0)
        full_lo = tl.load(seen + s * 4 + 2, mask=here, other=0)
        full_hi = tl.load(seen + s * 4 + 3, mask=here, other=0)
        met = here & (lo < k1) & (hi > k0)
        whole = met & (q_begin + (s + 1) * STEP <= q_end) & (full_lo <= k0) & (full_hi >= k1)
        first = tl.minimum(first, tl.min(tl.where(met, s, NONE), 0))
        last = tl.maximum(last, tl.max(tl.where(met, s, -1), 0))
        full_first = tl.minimum(full_first, tl.min(tl.where(whole, s, NONE), 0))
        full_last = tl.maximum(full_last, tl.max(tl.where(whole, s, -1), 0))
        full += tl.sum(whole.to(tl.int32), 0)
    first = tl.where(last < 0, 0, first)
    none = (full == 0) | (full != full_last - full_first + 1)
    full_first, full_last = tl.where(none, first, full_first), tl.where(none, first - 1, full_last)
    _store(row, k0, k1, tl.minimum(q_begin + first * STEP, q_end), tl.minimum(q_begin + full_first * STEP, q_end),
           tl.minimum(q_begin + (full_last + 1) * STEP, q_end), tl.minimum(q_begin + (last + 1) * STEP, q_end),
           k_end - q_end + 1)  # fmt: skip


@triton.jit(do_not_specialize=["NQ", "NK"])
def _longest_first(found_ptr, tiles_ptr, NQ, NK, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Moves tile i of its part behind the longer ones and the equal ones before it; program 0 writes the header."""
    i = tl.program_id(0)
    field = tl.arange(0, 8)
    if i == 0:
        tl.store(tiles_ptr + field, KIND)
    part = tl.where(i < NQ, 0, NQ)
    end = tl.where(i < NQ, NQ, NQ + NK)
    length = tl.load(found_ptr + i * 8 + 5) - tl.load(found_ptr + i * 8 + 2)
    rank = i * 0
    for first in range(part, end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        here = j < end
        other = tl.load(found_ptr + j * 8 + 5, mask=here, other=0) - tl.load(found_ptr + j * 8 + 2, mask=here, other=0)
        rank += tl.sum((here & ((other > length) | ((other == length) & (j < i)))).to(tl.int32), 0)
    tl.store(tiles_ptr + (1 + part + rank) * 8 + field, tl.load(found_ptr + i * 8 + field))


def tiles_on_device(Tq: int, Tk: int, cu_q, cu_k, kv_lo, kv_hi) -> torch.Tensor:
    S = cu_q.numel() - 1
    NQ, NK = counts(Tq, Tk, S)
    cu_q, cu_k = cu_q.to(torch.int32).contiguous(), cu_k.to(torch.int32).contiguous()
    new = {"dtype": torch.int32, "device": cu_q.device}
    found, seen = torch.empty(NQ + NK, WIDTH, **new), torch.empty(NQ, BLOCK_Q // STEP, 4, **new)
    tiles = torch.empty(1 + NQ + NK, WIDTH, **new)
    if NQ:
        _query_tiles[(NQ,)](
            cu_q, cu_k, kv_lo, kv_hi, found, seen, S, HAS_LO=kv_lo is not None, HAS_HI=kv_hi is not None,
            BLOCK=BLOCK_Q, STEP=STEP, DOCUMENTS=DOCUMENTS, NONE=NONE, num_warps=4,
        )  # fmt: skip
    if NK:
        _key_tiles[(NK,)](
            cu_q, cu_k, found[NQ:], seen, S, BLOCK_Q=BLOCK_Q, BLOCK=BLOCK_K, STEP=STEP, STEPS=STEPS,
            DOCUMENTS=DOCUMENTS, NONE=NONE, num_warps=4,
        )  # fmt: skip
    if NQ + NK:
        _longest_first[(NQ + NK,)](found, tiles, NQ, NK, KIND=kind_of(kv_lo, kv_hi), BLOCK=TILES, num_warps=4)
    return tiles
