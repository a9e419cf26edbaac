"""alpha x x^T + beta plus in Triton: of the tiles only the lower triangle is computed, the upper one mirrors it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.jit.common import acc_type
from vkernels.newton_schulz import iterate


@triton.jit
def _symmetric_product(x_ptr, plus_ptr, out_ptr, m, n, tiles, alpha, beta,
                       PLUS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
                       INNER: tl.constexpr):  # fmt: skip
    p = tl.program_id(0) % tiles  # tile (i, j) with j <= i is number i (i + 1) / 2 + j
    i = ((tl.sqrt_rn((8 * p + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)  # exact below 2^21 tiles
    j = p - i * (i + 1) // 2
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, INNER)
    left = x_ptr + batch * m * n + row.to(tl.int64)[:, None] * n + k[None, :]
    right = x_ptr + batch * m * n + column.to(tl.int64)[:, None] * n + k[None, :]
    total = tl.zeros((BLOCK, BLOCK), ACC)
    for start in range(0, n, INNER):
        inside = (start + k < n)[None, :]
        x = tl.load(left + start, mask=(row < m)[:, None] & inside, other=0)
        y = tl.load(right + start, mask=(column < m)[:, None] & inside, other=0)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION, out_dtype=ACC)
    total *= alpha
    at = row.to(tl.int64)[:, None] * m + column[None, :]
    inside = (row < m)[:, None] & (column < m)[None, :]
    if PLUS:
        total += beta * tl.load(plus_ptr + batch * m * m + at, mask=inside, other=0).to(ACC)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + batch * m * m + at, out, mask=inside)
    if i != j:
        at = column.to(tl.int64)[:, None] * m + row[None, :]
        inside = (column < m)[:, None] & (row < m)[None, :]
        tl.store(out_ptr + batch * m * m + at, tl.trans(out), mask=inside)


def symmetric_product(x: torch.Tensor, alpha: float, plus: torch.Tensor | None, beta: float) -> torch.Tensor:
    """alpha x x^T + beta plus of x[B, m, n] and a symmetric plus[B, m, m], all contiguous."""
    B, m, n = x.shape
    out = torch.empty(B, m, m, dtype=x.dtype, device=x.device)
    BLOCK = 64 if m <= 512 else 128  # below, few tiles: smaller ones fill more of the device
    side = triton.cdiv(m, BLOCK)
    tiles = side * (side + 1) // 2
    _symmetric_product[(tiles * B,)](
        x, plus, out, m, n, tiles, alpha, beta,
        PLUS=plus is not None, ACC=acc_type(x.dtype), PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee",
        BLOCK=BLOCK, INNER=64 if x.element_size() == 2 else 32, num_warps=8 if BLOCK == 128 else 4, num_stages=4,
    )  # fmt: skip
    return out


def newton_schulz(*args) -> torch.Tensor:
    return iterate(symmetric_product, *args)
