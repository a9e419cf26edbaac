"""Finite scalar and lookup-free quantisation in Triton: one pass over tiles of whole rows, one digit a channel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.fsq import channels
from vkernels.host import flat_rows
from vkernels.jit.common import acc_type, row_blocks
from vkernels.registry import accumulate_dtype

ELEMENTS = 1024  # of a tile: 8 a thread


@triton.jit
def _expm1(x):
    """(exp(x) - 1, exp(x)) of x in [-50, 0], each to about 1e-7 of itself in float32.

    tl.exp is the hardware's approximation, off by 2e-7 and as much again from the product with log2(e), and its
    difference to 1 would lose the rest near 0.
    """
    if x.dtype == tl.float64:  # gradient checks in the interpreter
        e = tl.exp(x)
        return e - 1, e
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693359375 + n * 2.12194440e-4  # ln 2 in two parts: n times the first is exact
    p = 1.0 / 5040 + r * (1.0 / 40320)
    p = 1.0 / 720 + r * p
    p = 1.0 / 120 + r * p
    p = 1.0 / 24 + r * p
    p = 1.0 / 6 + r * p
    p = r + r * r * (0.5 + r * p)
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    scaled = power * p
    return scaled + (power - 1), scaled + power


@triton.jit
def _divide(a, b):
    if a.dtype == tl.float64:
        return a / b
    return tl.div_rn(a, b)


@triton.jit
def _tanh(x):
    """(tanh(x), its slope 1 - tanh^2), each to about 2e-7 of itself in float32."""
    m, e = _expm1(-2 * tl.minimum(tl.abs(x), 20))
    t = _divide(-m, 2 + m)
    return tl.where(x < 0, -t, t), _divide(4 * e, (2 + m) * (2 + m))


@triton.jit
def _fsq_quantize(z_ptr, half_ptr, offset_ptr, shift_ptr, width_ptr, basis_ptr, codes_ptr, ids_ptr, n_rows, n_cols,
                  z_stride,
                  ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    real = col < n_cols
    inside = (row < n_rows)[:, None] & real[None, :]
    half = tl.load(half_ptr + col, mask=real, other=0)[None, :]
    offset = tl.load(offset_ptr + col, mask=real, other=0)[None, :]
    shift = tl.load(shift_ptr + col, mask=real, other=0)[None, :]
    width = tl.load(width_ptr + col, mask=real, other=1)[None, :]
    basis = tl.load(basis_ptr + col, mask=real, other=0)[None, :]
    z = tl.load(z_ptr + row[:, None] * z_stride + col[None, :], mask=inside, other=0).to(ACC)
    t, _ = _tanh(tl.where(z == z, z, 0) + shift)
    y = t * half - offset
    below = tl.floor(y)
    rest = y - below  # exact; round half to even:
    up = (rest > 0.5) | ((rest == 0.5) & ((below.to(tl.int32) & 1) == 1))
    q = below + tl.where(up, 1.0, 0.0)
    code = tl.where(z == z, _divide(q, width), z)  # NaN stays to be seen
    tl.store(codes_ptr + row[:, None] * n_cols + col[None, :], code.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(ids_ptr + row, tl.sum((q + width).to(tl.int32) * basis, 1), mask=row < n_rows)


@triton.jit
def _fsq_quantize_backward(dcodes_ptr, z_ptr, half_ptr, shift_ptr, width_ptr, dz_ptr, n_rows, n_cols, dcodes_stride,
                           z_stride,
                           ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    real = col < n_cols
    inside = (row < n_rows)[:, None] & real[None, :]
    half = tl.load(half_ptr + col, mask=real, other=0)
    shift = tl.load(shift_ptr + col, mask=real, other=0)
    width = tl.load(width_ptr + col, mask=real, other=1)
    z = tl.load(z_ptr + row[:, None] * z_stride + col[None, :], mask=inside, other=0).to(ACC)
    dcodes = tl.load(dcodes_ptr + row[:, None] * dcodes_stride + col[None, :], mask=inside, other=0).to(ACC)
    _, slope = _tanh(z + shift[None, :])
    dz = dcodes * slope * (half / width)[None, :]
    tl.store(dz_ptr + row[:, None] * n_cols + col[None, :], dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _fsq_dequantize(ids_ptr, levels_ptr, basis_ptr, codes_ptr, n_rows, n_cols,
                    ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    real = col < n_cols
    levels = tl.load(levels_ptr + col, mask=real, other=2)
    basis = tl.load(basis_ptr + col, mask=real, other=1)
    ids = tl.load(ids_ptr + row, mask=row < n_rows, other=0).to(tl.int32)
    half = levels // 2
    digit = (ids[:, None] // basis[None, :]) % levels[None, :] - half[None, :]
    code = _divide(digit.to(tl.float32), half[None, :].to(tl.float32))
    inside = (row < n_rows)[:, None] & real[None, :]
    tl.store(codes_ptr + row[:, None] * n_cols + col[None, :], code, mask=inside)


@triton.jit
def _lfq_signs(z_ptr, codes_ptr, ids_ptr, n_rows, n_cols, z_stride, scale,
               ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    z = tl.load(z_ptr + row[:, None] * z_stride + col[None, :], mask=inside, other=0).to(tl.float32)
    bit = z > 0
    code = tl.where(z == z, tl.where(bit, scale, -scale), z)
    tl.store(codes_ptr + row[:, None] * n_cols + col[None, :], code.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(ids_ptr + row, tl.sum(bit.to(tl.int32) << col[None, :], 1), mask=row < n_rows)


def fsq_quantize(z, levels):
    rows = flat_rows(z)
    n, d = rows.shape
    codes = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    ids = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    if n:
        c = channels(tuple(levels), accumulate_dtype(z.dtype), z.device)
        ROWS, COLS = row_blocks(d, ELEMENTS)
        _fsq_quantize[(triton.cdiv(n, ROWS),)](
            rows, c.half, c.offset, c.shift, c.width, c.basis, codes, ids, n, d, rows.stride(0),
            ACC=acc_type(z.dtype), ROWS=ROWS, COLS=COLS, num_warps=4,
        )  # fmt: skip
    return codes, ids


def fsq_quantize_backward(dcodes, z, levels):
    rows, grads = flat_rows(z), flat_rows(dcodes)
    n, d = rows.shape
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if n:
        c = channels(tuple(levels), accumulate_dtype(z.dtype), z.device)
        ROWS, COLS = row_blocks(d, ELEMENTS)
        _fsq_quantize_backward[(triton.cdiv(n, ROWS),)](
            grads, rows, c.half, c.shift, c.width, dz, n, d, grads.stride(0), rows.stride(0),
            ACC=acc_type(z.dtype), ROWS=ROWS, COLS=COLS, num_warps=4,
        )  # fmt: skip
    return dz


def fsq_dequantize(ids, levels):
    n, d = ids.numel(), len(levels)
    codes = torch.empty(*ids.shape, d, dtype=torch.float32, device=ids.device)
    if n:
        c = channels(tuple(levels), torch.float32, ids.device)
        ROWS, COLS = row_blocks(d, ELEMENTS)
        _fsq_dequantize[(triton.cdiv(n, ROWS),)](
            ids.contiguous(), c.levels, c.basis, codes, n, d, ROWS=ROWS, COLS=COLS, num_warps=4
        )
    return codes


def lfq_quantize(z, scale):
    rows = flat_rows(z)
    n, d = rows.shape
    codes = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    ids = torch.empty(z.shape[:-1], dtype=torch.int32, device=z.device)
    if n:
        ROWS, COLS = row_blocks(d, ELEMENTS)
        _lfq_signs[(triton.cdiv(n, ROWS),)](
            rows, codes, ids, n, d, rows.stride(0), scale, ROWS=ROWS, COLS=COLS, num_warps=4
        )
    return codes, ids
