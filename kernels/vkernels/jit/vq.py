"""The nearest code in Triton: matrix products over a streamed codebook keep a few candidates a row, float64 decides.

The matrix units multiply float16 parts. A float32 value times a power of two is hi + lo to 22 bits (a bfloat16 or
float16 value is hi alone), so hi.hi + hi.lo + lo.hi errs by less than 3 * 2^-22 |x| |e|, like a float32 product, at
half the cost of tf32x3. What is maximised is x.e - |e|^2 / 2; the norm is three more float16 columns of the codebook,
multiplied by the scale of the row, so that the main loop has nothing to do but products and maxima.

A slot is GROUP neighbouring codes, a group SLOTS neighbouring slots. Of a group only the two best slots of each row are
looked at: one maximum per score, and a search for their places once per GROUP scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vkernels.jit.common import multiprocessors

KEEP = 4  # slots of a row that float64 looks at, if they come near the best
ENDS = 16  # columns that the norm takes where it has its own block: the least that the matrix units multiply
SMALLEST_EXPONENT = tl.constexpr(-60)  # of a codebook's largest element; below it all is as good as 0


class Plan(NamedTuple):
    """How rows and codes are stored for the main loop, and how it is cut."""

    x_parts: int
    e_parts: int
    blocks: int  # of D columns side by side: of all products if they are packed, else 1
    dims: int  # columns of a part
    packed: bool  # into one part, with the norm: D = 8 takes 27 columns, two steps of the matrix units instead of four
    rows: int  # of x, to a program
    slots: int  # codes to a step of its loop
    group: int
    warps: int
    stages: int


@triton.jit
def _exponent(x):
    """floor(log2(x)) of a positive normal float32; -127 of 0, 128 of infinity and NaN."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _power_of_two(exponent):
    """2^exponent as float32, 0 below 2^-126."""
    return (tl.maximum(exponent + 127, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _codebook_exponent(largest_ptr):
    return tl.maximum(_exponent(tl.load(largest_ptr).to(tl.float32)), SMALLEST_EXPONENT)


@triton.jit
def _hi_lo(x):
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def _three(column, a, b, c):
    """[rows, columns]: a, b, c in the columns 0, 1, 2, zero in all others."""
    rest = tl.where((column == 2)[None, :], c[:, None], 0.0)
    rest = tl.where((column == 1)[None, :], b[:, None], rest)
    return tl.where((column == 0)[None, :], a[:, None], rest).to(tl.float16)


@triton.jit
def _store_parts(parts_ptr, ends_ptr, row, n_places, values, n_dims, a, b, c,
                 PARTS: tl.constexpr, LOW: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr, DIMS: tl.constexpr,
                 ENDS: tl.constexpr):  # fmt: skip
    """The float16 parts of values[rows, DIMS]; packed, the block LOW is the lo part, the others are hi."""
    dim = tl.arange(0, DIMS)
    to_ptr = parts_ptr + row[:, None] * DIMS + dim[None, :]
    hi, lo = _hi_lo(values)
    if PACKED:
        end = dim - BLOCKS * n_dims
        packed = tl.where((dim // n_dims == LOW)[None, :], lo, hi)
        tl.store(to_ptr, tl.where((end >= 0)[None, :], _three(end, a, b, c), packed))
    else:
        tl.store(to_ptr, hi)
        if PARTS == 2:
            tl.store(to_ptr + n_places.to(tl.int64) * DIMS, lo)
        end = tl.arange(0, ENDS)
        tl.store(ends_ptr + row[:, None] * ENDS + end[None, :], _three(end, a, b, c))


@triton.jit
def _vq_split_codes(codebook_ptr, largest_ptr, parts_ptr, ends_ptr, n_codes, n_places, n_dims, log_dims, stride,
                    PARTS: tl.constexpr, LOW: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr,
                    SLOTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
                    ENDS: tl.constexpr):  # fmt: skip
    """The codebook as the main loop reads it, the j-th codes of a group's slots together: scaled by a power of two to a
    largest element in [2^14, 2^15), half norms to less than 2^15, which is infinite for the padding."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile, column = place // SLOTS, place % SLOTS
    code = ((tile // GROUP) * SLOTS + column) * GROUP + tile % GROUP
    dim = tl.arange(0, DIMS)
    block = dim // n_dims
    inside = (code < n_codes)[:, None] & (block < BLOCKS)[None, :]
    e = tl.load(codebook_ptr + code[:, None] * stride + (dim % n_dims)[None, :], mask=inside, other=0).to(tl.float32)
    e *= _power_of_two(14 - _codebook_exponent(largest_ptr))
    square = tl.sum(tl.where((block == 0)[None, :], e * e, 0), 1)  # less than D 2^30
    norm = -0.5 * square * _power_of_two(-14 - log_dims)
    first = norm.to(tl.float16).to(tl.float32)
    second = (norm - first).to(tl.float16).to(tl.float32)
    third = norm - first - second
    first = tl.where(code < n_codes, first, float("-inf"))
    _store_parts(parts_ptr, ends_ptr, place, n_places, e, n_dims, first, second, third, PARTS, LOW, BLOCKS, PACKED,
                 DIMS, ENDS)  # fmt: skip


@triton.jit
def _vq_split_rows(x_ptr, largest_ptr, parts_ptr, ends_ptr, n_rows, n_places, n_dims, log_dims, stride,
                   PARTS: tl.constexpr, LOW: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr,
                   ROWS: tl.constexpr, DIMS: tl.constexpr, ENDS: tl.constexpr):  # fmt: skip
    """Each row scaled by a power of two to a largest element below 2^15, and so that the norms' scale is, too."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    inside = (row < n_rows)[:, None] & (dim // n_dims < BLOCKS)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + (dim % n_dims)[None, :], mask=inside, other=0).to(tl.float32)
    of_codes = _codebook_exponent(largest_ptr) + log_dims
    exponent = tl.maximum(_exponent(tl.max(tl.abs(x), 1)), of_codes - 1)
    x *= _power_of_two(14 - exponent)[:, None]
    # 2^-24 is the least float16. Norms that ask for less are nothing beside the products, but 0 * infinity were NaN.
    scale = _power_of_two(tl.maximum(14 + of_codes - exponent, -24))
    _store_parts(parts_ptr, ends_ptr, row, n_places, x, n_dims, scale, scale, scale, PARTS, LOW, BLOCKS, PACKED, DIMS,
                 ENDS)  # fmt: skip


@triton.jit
def _scores(x_hi, x_lo, x_ends, e_ptr, e_ends_ptr, tile, n_places,
            X_PARTS: tl.constexpr, E_PARTS: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
            DIMS: tl.constexpr, ENDS: tl.constexpr):  # fmt: skip
    """x.e - |e|^2 / 2 of the codes of a tile, times the row's scale; the small products first."""
    first = tl.cast(tile, tl.int64) * SLOTS
    column = tl.arange(0, SLOTS)
    from_ptr = e_ptr + first * DIMS + column[:, None] * DIMS + tl.arange(0, DIMS)[None, :]
    e_hi = tl.load(from_ptr)
    scores = tl.zeros((ROWS, SLOTS), tl.float32)
    if not PACKED:
        if E_PARTS == 2:
            scores = tl.dot(x_hi, tl.trans(tl.load(from_ptr + n_places.to(tl.int64) * DIMS)), scores)
        if X_PARTS == 2:
            scores = tl.dot(x_lo, tl.trans(e_hi), scores)
        e_ends = tl.load(e_ends_ptr + first * ENDS + column[:, None] * ENDS + tl.arange(0, ENDS)[None, :])
        scores = tl.dot(x_ends, tl.trans(e_ends), scores)
    return tl.dot(x_hi, tl.trans(e_hi), scores)


@triton.jit
def _insert(value, slot, best, best_slot, second, second_slot):
    """The two best of three, the earlier one first among equals."""
    wins, follows = value > best, value > second
    second_slot = tl.where(wins, best_slot, tl.where(follows, slot, second_slot))
    second = tl.where(wins, best, tl.where(follows, value, second))
    return tl.where(wins, value, best), tl.where(wins, slot, best_slot), second, second_slot


@triton.jit
def _vq_best_slots(x_ptr, x_ends_ptr, e_ptr, e_ends_ptr, values_ptr, slots_ptr, n_rows, x_places, e_places, n_groups,
                   span,
                   X_PARTS: tl.constexpr, E_PARTS: tl.constexpr, PACKED: tl.constexpr, LOOKS: tl.constexpr,
                   ROWS: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr, DIMS: tl.constexpr, ENDS: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """The two best slots of ROWS rows among `span` groups of codes, with the scores of their best codes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    from_ptr = x_ptr + row[:, None] * DIMS + tl.arange(0, DIMS)[None, :]
    x_hi = tl.load(from_ptr)
    x_lo = x_hi
    if X_PARTS == 2 and not PACKED:
        x_lo = tl.load(from_ptr + x_places.to(tl.int64) * DIMS)
    x_ends = x_hi
    if not PACKED:
        x_ends = tl.load(x_ends_ptr + row[:, None] * ENDS + tl.arange(0, ENDS)[None, :])

    column = tl.arange(0, SLOTS)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    second = best
    best_slot = tl.zeros((ROWS,), tl.int32)
    second_slot = best_slot
    top = tl.full((ROWS, SLOTS), float("-inf"), tl.float32)
    first = tl.program_id(1) * span
    for tile in tl.range(first * GROUP, min(first + span, n_groups) * GROUP, num_stages=STAGES):
        scores = _scores(x_hi, x_lo, x_ends, e_ptr, e_ends_ptr, tile, e_places,
                         X_PARTS, E_PARTS, PACKED, ROWS, SLOTS, DIMS, ENDS)  # fmt: skip
        top = tl.maximum(top, scores)  # which passes NaN over
        if tile % GROUP == GROUP - 1:
            for _ in tl.static_range(LOOKS):
                value, place = tl.max(top, 1, return_indices=True, return_indices_tie_break_left=True)
                slot = (tile // GROUP) * SLOTS + place
                best, best_slot, second, second_slot = _insert(value, slot, best, best_slot, second, second_slot)
                top = tl.where(column[None, :] == place[:, None], float("-inf"), top)
            top = tl.full((ROWS, SLOTS), float("-inf"), tl.float32)

    at = row * (2 * tl.num_programs(1)) + 2 * tl.program_id(1)
    tl.store(values_ptr + at, best, mask=row < n_rows)
    tl.store(values_ptr + at + 1, second, mask=row < n_rows)
    tl.store(slots_ptr + at, best_slot, mask=row < n_rows)
    tl.store(slots_ptr + at + 1, second_slot, mask=row < n_rows)


@triton.jit
def _vq_decide(x_ptr, codebook_ptr, values_ptr, slots_ptr, ids_ptr, n_rows, n_codes, n_dims, x_stride, stride,
               n_candidates, margin,
               ROWS: tl.constexpr, CANDIDATES: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr,
               DIMS: tl.constexpr):  # fmt: skip
    """The nearest code by float64 distances among the KEEP best slots, as far as they come within `margin` of the best.

    Of equal distances the lowest code; of equal scores the lowest slots. A row of NaN gets code 0.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    candidate = tl.arange(0, CANDIDATES)
    within = (row < n_rows)[:, None] & (dim < n_dims)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + dim[None, :], mask=within, other=0).to(tl.float64)
    there = (row < n_rows)[:, None] & (candidate < n_candidates)[None, :]
    at = row[:, None] * n_candidates + candidate[None, :]
    values = tl.load(values_ptr + at, mask=there, other=float("-inf"))
    slots = tl.load(slots_ptr + at, mask=there, other=0)
    least = tl.max(values, 1) - margin
    nearest = tl.full((ROWS,), float("inf"), tl.float64)
    ids = tl.zeros((ROWS,), tl.int32)
    for _ in tl.static_range(KEEP):
        top = tl.max(values, 1)
        slot = tl.min(tl.where(values == top[:, None], slots, 2**31 - 1), 1)
        values = tl.where((values == top[:, None]) & (slots == slot[:, None]), float("-inf"), values)
        near = (top >= least) & (top > float("-inf"))
        for j in range(GROUP):
            code = slot * GROUP + j
            valid = near & (code < n_codes)
            e_ptr = codebook_ptr + code.to(tl.int64)[:, None] * stride + dim[None, :]
            e = tl.load(e_ptr, mask=valid[:, None] & (dim < n_dims)[None, :], other=0).to(tl.float64)
            distance = tl.where(valid, tl.sum((x - e) * (x - e), 1), float("inf"))
            wins = (distance < nearest) | ((distance == nearest) & (code < ids))
            ids = tl.where(wins, code, ids)
            nearest = tl.where(wins, distance, nearest)
    tl.store(ids_ptr + row, ids, mask=row < n_rows)


def vq_nearest(x: torch.Tensor, codebook: torch.Tensor, exact: bool = True) -> torch.Tensor:
    """x[N, D], codebook[K, D] -> int32[N]; nothing of the size N * K is made, about 4 D + 32 bytes a row and a code."""
    x, codebook = _narrow(x), _narrow(codebook)
    (n, D), K, device = x.shape, codebook.shape[0], x.device
    ids = torch.empty(n, dtype=torch.int32, device=device)
    if n == 0:
        return ids
    plan = _plan(n, K, D, *(2 if exact and t.dtype == torch.float32 else 1 for t in (x, codebook)))
    blocks, groups = triton.cdiv(n, plan.rows), triton.cdiv(K, plan.slots * plan.group)
    places, padded = blocks * plan.rows, groups * plan.slots * plan.group
    largest = torch.linalg.vector_norm(codebook, float("inf"))
    log_dims = (D - 1).bit_length()
    x_parts, x_ends = _room(places, plan.x_parts, plan, device)
    e_parts, e_ends = _room(padded, plan.e_parts, plan, device)
    layout = {"PACKED": plan.packed, "DIMS": plan.dims, "ENDS": ENDS}
    ROWS = min(64, 4096 // plan.dims)
    _vq_split_rows[(places // ROWS,)](
        x, largest, x_parts, x_ends, n, places, D, log_dims, x.stride(0), PARTS=plan.x_parts,
        LOW=0 if plan.x_parts == 2 else -1, BLOCKS=plan.blocks, ROWS=ROWS, **layout, num_warps=4,
    )  # fmt: skip
    _vq_split_codes[(padded // ROWS,)](
        codebook, largest, e_parts, e_ends, K, padded, D, log_dims, codebook.stride(0), PARTS=plan.e_parts,
        LOW=plan.x_parts - 1 if plan.e_parts == 2 else -1, BLOCKS=plan.blocks, SLOTS=plan.slots, GROUP=plan.group,
        ROWS=ROWS, **layout, num_warps=4,
    )  # fmt: skip

    # About two programs a multiprocessor, each with as many groups as any other, or less.
    span = triton.cdiv(groups, min(groups, triton.cdiv(2 * multiprocessors(device), blocks)))
    splits = triton.cdiv(groups, span)
    values = torch.empty(n, 2 * splits, dtype=torch.float32, device=device)
    slots = torch.empty(n, 2 * splits, dtype=torch.int32, device=device)
    _vq_best_slots[(blocks, splits)](
        x_parts, x_ends, e_parts, e_ends, values, slots, n, places, padded, groups, span, X_PARTS=plan.x_parts,
        E_PARTS=plan.e_parts, LOOKS=2 if exact else 1, ROWS=plan.rows, SLOTS=plan.slots, GROUP=plan.group,
        STAGES=plan.stages, **layout, num_warps=plan.warps,
    )  # fmt: skip

    # Scaled elements are below 2^15: two scores err by less than 2^30 D times twice the relative error of a product.
    margin = 2.0**30 * D * (2.0**-19 if exact else 2.0**-9)
    CANDIDATES, DIMS = triton.next_power_of_2(2 * splits), max(16, triton.next_power_of_2(D))
    ROWS = max(1, 1024 // max(CANDIDATES, DIMS))
    _vq_decide[(triton.cdiv(n, ROWS),)](
        x, codebook, values, slots, ids, n, K, D, x.stride(0), codebook.stride(0), 2 * splits, margin,
        ROWS=ROWS, CANDIDATES=CANDIDATES, KEEP=min(KEEP, CANDIDATES), GROUP=plan.group, DIMS=DIMS, num_warps=4,
    )  # fmt: skip
    return ids


def _narrow(t: torch.Tensor) -> torch.Tensor:
    """[n, D] in at most 32 bits an element, a row's elements side by side."""
    t = t.detach().float() if t.dtype == torch.float64 else t.detach()
    return t if t.stride(1) == 1 else t.contiguous()


def _room(rows: int, parts: int, plan: Plan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of so many rows or codes, and for the blocks of their ends."""
    shape = (1 if plan.packed else parts, rows, plan.dims)
    ends = (0 if plan.packed else rows, ENDS)
    return (torch.empty(s, dtype=torch.float16, device=device) for s in (shape, ends))


def _plan(n: int, codes: int, dim: int, x_parts: int, e_parts: int) -> Plan:
    """Shared memory holds the parts of `rows` rows and of `stages` times `slots` codes; all else fits registers."""
    products = x_parts + e_parts - 1
    packed = products * dim + 3 <= 32
    dims = max(16, triton.next_power_of_2(products * dim + 3 if packed else dim))
    wide = dims if packed else dims * max(x_parts, e_parts)
    rows = 64 if n <= 64 or wide > 256 else 128
    slots = 64 if codes <= 64 or wide > 256 else 128
    # The search for places costs 12 instructions a score, over GROUP; float64 looks at KEEP * GROUP codes at most. At
    # least 8 groups, which programs can share.
    group = 16 if dim <= 32 else 8
    while group > 1 and codes < 8 * slots * group:
        group //= 2
    stages = 3 if wide <= 128 else 2
    return Plan(x_parts, e_parts, products if packed else 1, dims, packed, rows, slots, group, rows // 16, stages)
