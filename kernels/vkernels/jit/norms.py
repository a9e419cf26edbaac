"""The norms in Triton: a tile of whole rows per program; gradients of the parameters in two stages, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.host import flat_rows
from vkernels.jit.common import acc_type, multiprocessors, row_blocks
from vkernels.registry import accumulate_dtype


@triton.jit
def _rms_norm_forward(x_ptr, residual_ptr, w_ptr, y_ptr, stream_ptr, rstd_ptr, n_rows, n_cols, x_stride, r_stride, eps,
                      ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    out = row[:, None] * n_cols + col[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0).to(ACC)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row[:, None] * r_stride + col[None, :], mask=inside, other=0).to(ACC)
        stream = x.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + out, stream, mask=inside)
        x = stream.to(ACC)  # the backward pass sees the rounded stream
    w = tl.load(w_ptr + col, mask=col < n_cols, other=0).to(ACC)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / n_cols + eps)
    tl.store(y_ptr + out, (x * rstd[:, None] * w[None, :]).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)


@triton.jit
def _rms_norm_backward(dy_ptr, x_ptr, w_ptr, rstd_ptr, dstream_ptr, dx_ptr, dw_ptr,
                       n_rows, n_cols, dy_stride, x_stride, ds_stride,
                       ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    col = tl.arange(0, COLS)
    w = tl.load(w_ptr + col, mask=col < n_cols, other=0).to(ACC)
    dw = tl.zeros((ROWS, COLS), ACC)  # summed over its rows at the end: in the loop that would cost barriers
    for start in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0).to(ACC)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0).to(ACC)
        rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0).to(ACC)[:, None]
        xhat = x * rstd
        g = dy * w[None, :]
        dx = (g - xhat * (tl.sum(g * xhat, 1) / n_cols)[:, None]) * rstd
        if dstream_ptr is not None:
            dx += tl.load(dstream_ptr + row[:, None] * ds_stride + col[None, :], mask=inside, other=0).to(ACC)
        tl.store(dx_ptr + row[:, None] * n_cols + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dw += dy * xhat
    tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * n_cols + col, tl.sum(dw, 0), mask=col < n_cols)


@triton.jit
def _layer_norm_forward(x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, n_rows, n_cols, x_stride, eps,
                        ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0).to(ACC)
    w = tl.load(w_ptr + col, mask=col < n_cols, other=0).to(ACC)
    b = tl.load(b_ptr + col, mask=col < n_cols, other=0).to(ACC)
    mean = tl.sum(x, 1) / n_cols
    x = tl.where(inside, x - mean[:, None], 0)  # centred first: E[x^2] - mean^2 would cancel
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / n_cols + eps)
    y = x * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(y_ptr + row[:, None] * n_cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < n_rows)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)


@triton.jit
def _layer_norm_backward(dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr,
                         n_rows, n_cols, dy_stride, x_stride,
                         ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    col = tl.arange(0, COLS)
    w = tl.load(w_ptr + col, mask=col < n_cols, other=0).to(ACC)
    dw = tl.zeros((ROWS, COLS), ACC)  # summed over its rows at the end: in the loop that would cost barriers
    db = tl.zeros((ROWS, COLS), ACC)
    for start in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0).to(ACC)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=inside, other=0).to(ACC)
        mean = tl.load(mean_ptr + row, mask=row < n_rows, other=0).to(ACC)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0).to(ACC)[:, None]
        xhat = (x - mean) * rstd  # not 0 outside the row, but only ever multiplied by dy, which is
        g = dy * w[None, :]
        dx = (g - (tl.sum(g, 1) / n_cols)[:, None] - xhat * (tl.sum(g * xhat, 1) / n_cols)[:, None]) * rstd
        tl.store(dx_ptr + row[:, None] * n_cols + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dw += dy * xhat
        db += dy
    out = tl.program_id(0).to(tl.int64) * n_cols + col
    tl.store(dw_ptr + out, tl.sum(dw, 0), mask=col < n_cols)
    tl.store(db_ptr + out, tl.sum(db, 0), mask=col < n_cols)


def rms_norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    y, rstd = _empty(x), _statistic(x)
    _launch_rms_forward(x, None, weight, y, None, rstd, eps)
    return y, rstd


def add_rms_norm_forward(x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, stream, rstd = _empty(x), _empty(x), _statistic(x)
    _launch_rms_forward(x, residual, weight, y, stream, rstd, eps)
    return y, stream, rstd


def _launch_rms_forward(x, residual, weight, y, stream, rstd, eps) -> None:
    rows = flat_rows(x)
    others = None if residual is None else flat_rows(residual)
    n, C = rows.shape
    if n:
        ROWS, COLS = row_blocks(C)
        _rms_norm_forward[(triton.cdiv(n, ROWS),)](
            rows, others, weight.contiguous(), y, stream, rstd, n, C, rows.stride(0), _stride(others), eps,
            ACC=acc_type(x.dtype), ROWS=ROWS, COLS=COLS, num_warps=_warps(ROWS * COLS),
        )  # fmt: skip


def rms_norm_backward(dy, x, weight, rstd, dstream=None) -> tuple[torch.Tensor, torch.Tensor]:
    rows, grads = flat_rows(x), flat_rows(dy)
    others = None if dstream is None else flat_rows(dstream)
    n, C = rows.shape
    dx = _empty(x)
    ROWS, COLS, programs = _backward_grid(x, n, C)
    (dw,) = _partial_sums(1, programs, x, C)
    if n:
        _rms_norm_backward[(programs,)](
            grads, rows, weight.contiguous(), rstd, others, dx, dw,
            n, C, grads.stride(0), rows.stride(0), _stride(others),
            ACC=acc_type(x.dtype), ROWS=ROWS, COLS=COLS, num_warps=_warps(ROWS * COLS),
        )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype)


def layer_norm_forward(x, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = flat_rows(x)
    n, C = rows.shape
    y, mean, rstd = _empty(x), _statistic(x), _statistic(x)
    if n:
        ROWS, COLS = row_blocks(C)
        _layer_norm_forward[(triton.cdiv(n, ROWS),)](
            rows, weight.contiguous(), bias.contiguous(), y, mean, rstd, n, C, rows.stride(0), eps,
            ACC=acc_type(x.dtype), ROWS=ROWS, COLS=COLS, num_warps=_warps(ROWS * COLS),
        )  # fmt: skip
    return y, mean, rstd


def layer_norm_backward(dy, x, weight, mean, rstd) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, grads = flat_rows(x), flat_rows(dy)
    n, C = rows.shape
    dx = _empty(x)
    ROWS, COLS, programs = _backward_grid(x, n, C)
    dw, db = _partial_sums(2, programs, x, C)
    if n:
        _layer_norm_backward[(programs,)](
            grads, rows, weight.contiguous(), mean, rstd, dx, dw, db, n, C, grads.stride(0), rows.stride(0),
            ACC=acc_type(x.dtype), ROWS=ROWS, COLS=COLS, num_warps=_warps(ROWS * COLS),
        )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(weight.dtype)


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _statistic(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype), device=x.device)


def _stride(rows: torch.Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _backward_grid(x: torch.Tensor, n: int, C: int) -> tuple[int, int, int]:
    """(rows, columns) of a tile, and programs that each walk over many tiles, adding up gradients of the parameters.

    At about 100 registers a thread, 16 warps fit a multiprocessor. Rows up to 2048 give them to four programs, of which
    one's loads hide behind another's sums.
    """
    ROWS, COLS = row_blocks(C, 2048)
    return ROWS, COLS, min(triton.cdiv(n, ROWS), 16 // _warps(ROWS * COLS) * multiprocessors(x.device))


def _partial_sums(parameters: int, programs: int, x: torch.Tensor, C: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(programs, C, dtype=accumulate_dtype(x.dtype), device=x.device) for _ in range(parameters))


def _warps(elements: int) -> int:
    """16 elements a thread: two loads of 16 bytes in flight of every operand in bf16."""
    return min(max(elements // (32 * 16), 1), 16)
