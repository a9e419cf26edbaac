"""The activations in Triton: one elementwise kernel forward and one backward, the function being a constant of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.activations import halves
from vkernels.host import flat_rows
from vkernels.jit.common import acc_type

TILE = 4096  # elements a program: 16 a thread with 8 warps, two loads of 16 bytes of every operand in bf16
WIDEST_TILE = 1024


@triton.jit
def _share(x, ACT: tl.constexpr):
    """(s, ds / dx) of value = x s, whose derivative is s + x ds / dx. GELU by tanh: (1 + tanh u) / 2 = sigmoid(2 u)."""
    if ACT == "gelu":
        s = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
    elif ACT == "gelu_tanh":
        s, slope = _sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))  # 2 sqrt(2 / pi)
        slope *= 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACT == "quick_gelu":
        s, slope = _sigmoid(1.702 * x)
        slope *= 1.702
    else:
        s, slope = _sigmoid(x)
    return s, slope


@triton.jit
def _sigmoid(x):
    """s and its derivative s (1 - s), without the difference, that has no digits left where s is close to 1."""
    e = tl.exp(-tl.abs(x))
    r = 1 / (1 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@triton.jit
def _activation_forward(gate_ptr, up_ptr, y_ptr, n_rows, n_cols, gate_stride, up_stride,
                        ACT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(n_cols, COLS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < n_rows) & (col < n_cols)
    x = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0).to(ACC)
    s, _ = _share(x, ACT)
    y = x * s
    if up_ptr is not None:
        y *= tl.load(up_ptr + row * up_stride + col, mask=inside, other=0).to(ACC)
    tl.store(y_ptr + row * n_cols + col, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_backward(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n_rows, n_cols, dy_stride, gate_stride,
                         up_stride, d_stride,
                         ACT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(n_cols, COLS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < n_rows) & (col < n_cols)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=inside, other=0).to(ACC)
    x = tl.load(gate_ptr + row * gate_stride + col, mask=inside, other=0).to(ACC)
    s, slope = _share(x, ACT)
    if up_ptr is not None:
        tl.store(dup_ptr + row * d_stride + col, (dy * (x * s)).to(dup_ptr.dtype.element_ty), mask=inside)
        dy *= tl.load(up_ptr + row * up_stride + col, mask=inside, other=0).to(ACC)
    tl.store(dgate_ptr + row * d_stride + col, (dy * (s + x * slope)).to(dgate_ptr.dtype.element_ty), mask=inside)


def gated_forward(gate: torch.Tensor, up: torch.Tensor | None, act: str) -> torch.Tensor:
    gate, up = halves(gate, up)
    return _launch_forward(gate, up, act)


def gated_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, act: str) -> torch.Tensor:
    """-> the gradients of gate and up side by side, [..., 2F]."""
    gate, up = halves(gate, up)
    F = gate.shape[-1]
    both = torch.empty(*gate.shape[:-1], 2 * F, dtype=gate.dtype, device=gate.device)
    _launch_backward(dy, gate, up, both[..., :F], both[..., F:], 2 * F, act)
    return both


def swiglu_forward(gate, up) -> torch.Tensor:
    return gated_forward(gate, up, "silu")


def swiglu_backward(dy, gate, up) -> torch.Tensor:
    return gated_backward(dy, gate, up, "silu")


def quick_gelu_forward(x) -> torch.Tensor:
    return _launch_forward(x, None, "quick_gelu")


def quick_gelu_backward(dy, x) -> torch.Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_backward(dy, x, None, dx, None, x.shape[-1], "quick_gelu")
    return dx


def _launch_forward(gate, up, act: str) -> torch.Tensor:
    g, u = flat_rows(gate), None if up is None else flat_rows(up)
    n, F = g.shape
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        grid, ROWS, COLS = _tiles(n, F)
        _activation_forward[grid](
            g, u, y, n, F, g.stride(0), 0 if u is None else u.stride(0),
            ACT=act, ACC=acc_type(gate.dtype), ROWS=ROWS, COLS=COLS, num_warps=8,
        )  # fmt: skip
    return y


def _launch_backward(dy, gate, up, dgate, dup, d_stride: int, act: str) -> None:
    grads, g, u = flat_rows(dy), flat_rows(gate), None if up is None else flat_rows(up)
    n, F = g.shape
    if g.numel():
        grid, ROWS, COLS = _tiles(n, F)
        _activation_backward[grid](
            grads, g, u, dgate, dup, n, F, grads.stride(0), g.stride(0), 0 if u is None else u.stride(0), d_stride,
            ACT=act, ACC=acc_type(gate.dtype), ROWS=ROWS, COLS=COLS, num_warps=8,
        )  # fmt: skip


def _tiles(rows: int, columns: int) -> tuple[tuple[int], int, int]:
    """(grid, rows, columns) of tiles; neighbours in the grid are neighbours in a row."""
    COLS = min(max(16, triton.next_power_of_2(columns)), WIDEST_TILE)
    ROWS = TILE // COLS
    return (triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLS),), ROWS, COLS
