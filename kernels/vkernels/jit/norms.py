"""RMSNorm in Triton: a tile of whole rows per program; the gradient of the weight in two stages, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.host import flat_rows
from vkernels.jit.common import acc_type, multiprocessors, row_blocks
from vkernels.registry import accumulate_dtype


@triton.jit
def _rms_norm_forward(x_ptr, w_ptr, y_ptr, rstd_ptr, n_rows, n_cols, x_stride, eps,
                      ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0).to(ACC)
    w = tl.load(w_ptr + col, mask=col < n_cols, other=0).to(ACC)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / n_cols + eps)
    y = x * rstd[:, None] * w[None, :]
    tl.store(y_ptr + row[:, None] * n_cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)


@triton.jit
def _rms_norm_backward(dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, partial_ptr, n_rows, n_cols, dy_stride, x_stride,
                       ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    col = tl.arange(0, COLS)
    w = tl.load(w_ptr + col, mask=col < n_cols, other=0).to(ACC)
    dw = tl.zeros((COLS,), ACC)
    for start in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0).to(ACC)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0).to(ACC)
        rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0).to(ACC)[:, None]
        xhat = x * rstd
        g = dy * w[None, :]
        dx = (g - xhat * (tl.sum(g * xhat, 1) / n_cols)[:, None]) * rstd
        tl.store(dx_ptr + row[:, None] * n_cols + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dw += tl.sum(dy * xhat, 0)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * n_cols + col, dw, mask=col < n_cols)


def rms_norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows = flat_rows(x)
    n, C = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype), device=x.device)
    if n:
        ROWS, COLS = row_blocks(C)
        _rms_norm_forward[(triton.cdiv(n, ROWS),)](
            rows, weight.contiguous(), y, rstd, n, C, rows.stride(0), eps,
            ACC=acc_type(x.dtype), ROWS=ROWS, COLS=COLS, num_warps=_warps(ROWS * COLS),
        )  # fmt: skip
    return y, rstd


def rms_norm_backward(dy, x, weight, rstd) -> tuple[torch.Tensor, torch.Tensor]:
    rows, grads = flat_rows(x), flat_rows(dy)
    n, C = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ROWS, COLS = row_blocks(C)
    programs = min(triton.cdiv(n, ROWS), 4 * multiprocessors(x.device))
    partial = torch.empty(programs, C, dtype=accumulate_dtype(x.dtype), device=x.device)
    if n:
        _rms_norm_backward[(programs,)](
            grads, rows, weight.contiguous(), rstd, dx, partial, n, C, grads.stride(0), rows.stride(0),
            ACC=acc_type(x.dtype), ROWS=ROWS, COLS=COLS, num_warps=_warps(ROWS * COLS),
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def _warps(elements: int) -> int:
    """16 elements a thread: two loads of 16 bytes in flight in bf16, and registers to spare in the backward pass."""
    return min(max(elements // (32 * 16), 1), 16)
