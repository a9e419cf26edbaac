"""Codebooks in training, in Triton: the chosen rows and their gradient, sums per code, moving averages, dead codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.host import flat_rows
from vkernels.jit.common import acc_type, row_blocks
from vkernels.jit.segment_sum import segment_sum
from vkernels.registry import accumulate_dtype
from vkernels.segments import sort_segments


@triton.jit
def _vq_straight_through_forward(x_ptr, codebook_ptr, ids_ptr, codes_ptr, commitment_ptr, n_rows, n_dims, n_codes,
                                 x_stride, codebook_stride, beta,
                                 ACC: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    inside = (row < n_rows)[:, None] & (dim < n_dims)[None, :]
    code = tl.load(ids_ptr + row, mask=row < n_rows, other=-1).to(tl.int64)
    valid = inside & ((code >= 0) & (code < n_codes))[:, None]
    x = tl.load(x_ptr + row[:, None] * x_stride + dim[None, :], mask=valid, other=0).to(ACC)
    e = tl.load(codebook_ptr + code[:, None] * codebook_stride + dim[None, :], mask=valid, other=0).to(ACC)
    tl.store(codes_ptr + row[:, None] * n_dims + dim[None, :], e.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(commitment_ptr + row, tl.sum((x - e) * (x - e), 1) / n_dims * beta, mask=row < n_rows)


@triton.jit
def _vq_straight_through_backward(dcodes_ptr, dcommitment_ptr, x_ptr, codes_ptr, ids_ptr, dx_ptr, n_rows, n_dims,
                                  n_codes, dcodes_stride, dcommitment_stride, x_stride, codes_stride, pull,
                                  ACC: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    inside = (row < n_rows)[:, None] & (dim < n_dims)[None, :]
    code = tl.load(ids_ptr + row, mask=row < n_rows, other=-1)
    chosen = (code >= 0) & (code < n_codes)
    moved = inside & chosen[:, None]  # what is left out may be infinite
    x = tl.load(x_ptr + row[:, None] * x_stride + dim[None, :], mask=moved, other=0).to(ACC)
    e = tl.load(codes_ptr + row[:, None] * codes_stride + dim[None, :], mask=moved, other=0).to(ACC)
    dcodes = tl.load(dcodes_ptr + row[:, None] * dcodes_stride + dim[None, :], mask=inside, other=0).to(ACC)
    weight = tl.load(dcommitment_ptr + row * dcommitment_stride, mask=chosen, other=0).to(ACC) * pull
    dx = dcodes + weight[:, None] * (x - e)
    tl.store(dx_ptr + row[:, None] * n_dims + dim[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _vq_ema_update(size_ptr, total_ptr, embed_ptr, codebook_ptr, sums_ptr, n_codes, n_dims, size_stride, embed_stride,
                   codebook_stride, sums_stride, keep, gain, eps,
                   ROWS: tl.constexpr, DIMS: tl.constexpr):  # fmt: skip
    """The rows of the averages; the sizes are already moved, total is their sum."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    inside = (row < n_codes)[:, None] & (dim < n_dims)[None, :]
    size = tl.load(size_ptr + row * size_stride, mask=row < n_codes, other=0).to(tl.float32)
    total = tl.load(total_ptr).to(tl.float32)
    embed_at = embed_ptr + row[:, None] * embed_stride + dim[None, :]
    embed = tl.load(embed_at, mask=inside, other=0).to(tl.float32) * keep
    embed += tl.load(sums_ptr + row[:, None] * sums_stride + dim[None, :], mask=inside, other=0).to(tl.float32) * gain
    tl.store(embed_at, embed.to(embed_ptr.dtype.element_ty), mask=inside)
    smoothed = (size + eps) / (total + n_codes * eps) * total
    code = embed / tl.where(size > 0, smoothed, 1)[:, None]
    code_at = codebook_ptr + row[:, None] * codebook_stride + dim[None, :]
    tl.store(code_at, code.to(codebook_ptr.dtype.element_ty), mask=inside & (size > 0)[:, None])


@triton.jit
def _vq_reset_codes(size_ptr, share_ptr, embed_ptr, codebook_ptr, dead_ptr, turns_ptr, rows_ptr, available_ptr, n_codes,
                    n_dims, n_fresh, size_stride, embed_stride, codebook_stride, rows_stride,
                    ROWS: tl.constexpr, DIMS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIMS)
    dead = tl.load(dead_ptr + row, mask=row < n_codes, other=0) != 0
    turn = tl.load(turns_ptr + row, mask=dead, other=1) - 1
    reset = dead & (turn < tl.minimum(tl.load(available_ptr).to(tl.int64), n_fresh))
    inside = reset[:, None] & (dim < n_dims)[None, :]
    fresh = tl.load(rows_ptr + turn[:, None] * rows_stride + dim[None, :], mask=inside, other=0).to(tl.float32)
    share = tl.load(share_ptr).to(tl.float32)
    code_at = codebook_ptr + row[:, None] * codebook_stride + dim[None, :]
    embed_at = embed_ptr + row[:, None] * embed_stride + dim[None, :]
    tl.store(code_at, fresh.to(codebook_ptr.dtype.element_ty), mask=inside)
    tl.store(embed_at, (fresh * share).to(embed_ptr.dtype.element_ty), mask=inside)
    tl.store(size_ptr + row * size_stride, tl.zeros((ROWS,), tl.float32) + share, mask=reset)


def vq_straight_through(x, codebook, ids, beta):
    x, codebook, ids = flat_rows(x), flat_rows(codebook), ids.contiguous()
    n, D = x.shape
    codes = torch.empty(n, D, dtype=x.dtype, device=x.device)
    commitment = torch.empty(n, dtype=accumulate_dtype(x.dtype), device=x.device)
    if n:
        ROWS, DIMS = row_blocks(D, 2048)
        _vq_straight_through_forward[(triton.cdiv(n, ROWS),)](
            x, codebook, ids, codes, commitment, n, D, codebook.shape[0], x.stride(0), codebook.stride(0), beta,
            ACC=acc_type(x.dtype), ROWS=ROWS, DIMS=DIMS, num_warps=4,
        )  # fmt: skip
    return codes, commitment


def vq_straight_through_backward(dcodes, dcommitment, x, codes, ids, num_codes, beta):
    dcodes, x, codes = flat_rows(dcodes), flat_rows(x), flat_rows(codes)
    n, D = x.shape
    dx = torch.empty(n, D, dtype=x.dtype, device=x.device)
    if n:
        ROWS, DIMS = row_blocks(D, 2048)
        _vq_straight_through_backward[(triton.cdiv(n, ROWS),)](
            dcodes, dcommitment, x, codes, ids.contiguous(), dx, n, D, num_codes,
            dcodes.stride(0), dcommitment.stride(0), x.stride(0), codes.stride(0), 2 * beta / max(D, 1),
            ACC=acc_type(x.dtype), ROWS=ROWS, DIMS=DIMS, num_warps=4,
        )  # fmt: skip
    return dx


def vq_code_sums(x, ids, num_codes):
    """Counts by integer atomics, whose order does not show; sums over the rows sorted by code."""
    sums = torch.zeros(num_codes, x.shape[1], dtype=torch.float32, device=x.device)
    counts = torch.zeros(num_codes + 1, dtype=torch.int32, device=x.device)
    inside = torch.where((ids >= 0) & (ids < num_codes), ids, num_codes)
    counts.index_add_(0, inside, torch.ones_like(inside, dtype=torch.int32))
    segment_sum(flat_rows(x.detach()), sort_segments(ids, num_codes), [sums])
    return counts[:num_codes].float(), sums


def vq_ema_update(cluster_size, embed_sum, codebook, counts, sums, decay, eps):
    cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
    (K, D), sums = codebook.shape, flat_rows(sums)
    if K == 0:
        return
    ROWS, DIMS = row_blocks(D, 2048)
    _vq_ema_update[(triton.cdiv(K, ROWS),)](
        cluster_size, cluster_size.sum(), embed_sum, codebook, sums, K, D, cluster_size.stride(0),
        embed_sum.stride(0), codebook.stride(0), sums.stride(0), decay, 1 - decay, eps,
        ROWS=ROWS, DIMS=DIMS, num_warps=4,
    )  # fmt: skip


def vq_reset_codes(cluster_size, embed_sum, codebook, dead, rows, available):
    (K, D), rows, dead = codebook.shape, flat_rows(rows), dead.contiguous()
    turns = dead.cumsum(0)
    if K == 0:
        return turns.sum()
    ROWS, DIMS = row_blocks(D, 2048)
    _vq_reset_codes[(triton.cdiv(K, ROWS),)](
        cluster_size, cluster_size.mean(), embed_sum, codebook, dead, turns, rows, available, K, D, rows.shape[0],
        cluster_size.stride(0), embed_sum.stride(0), codebook.stride(0), rows.stride(0),
        ROWS=ROWS, DIMS=DIMS, num_warps=4,
    )  # fmt: skip
    return torch.minimum(turns[-1], available.clamp(0, rows.shape[0]).long())
