"""Rotary embedding in Triton, alone and after an RMSNorm of every head. A row is one head of one token.

A launch takes q and k together: its first programs have tiles of q's rows, the others of k's. Rows are counted in 32
bits (2^31 heads of 64 in bf16 are 256 GiB), elements in 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.jit.common import acc_type, multiprocessors
from vkernels.registry import accumulate_dtype


@triton.jit
def _halves(ptr, row, t_stride, h_stride, D: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr):
    """Pointers to the first half of the heads `row`; the other half lies D // 2 elements on."""
    token, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
    return ptr + (token * t_stride + head * h_stride)[:, None] + tl.arange(0, HALF)[None, :]


@triton.jit
def _angles(cos_ptr, sin_ptr, row, inside, ACC: tl.constexpr, D: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr):
    at = (row // H).to(tl.int64)[:, None] * (D // 2) + tl.arange(0, HALF)[None, :]
    c = tl.load(cos_ptr + at, mask=inside, other=0).to(ACC)
    s = tl.load(sin_ptr + at, mask=inside, other=0).to(ACC)
    return c, s


@triton.jit
def _rope_rows(x_ptr, y_ptr, cos_ptr, sin_ptr, tile, tokens, t_stride, h_stride,
               INVERSE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
               ROWS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = (row < tokens * H)[:, None] & (tl.arange(0, HALF) < D // 2)[None, :]
    x = _halves(x_ptr, row, t_stride, h_stride, D, H, HALF)
    y = _halves(y_ptr, row, H * D, D, D, H, HALF)
    c, s = _angles(cos_ptr, sin_ptr, row, inside, ACC, D, H, HALF)
    if INVERSE:
        s = -s
    a = tl.load(x, mask=inside, other=0).to(ACC)
    b = tl.load(x + D // 2, mask=inside, other=0).to(ACC)
    tl.store(y, (a * c - b * s).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y + D // 2, (b * c + a * s).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope(q_ptr, k_ptr, yq_ptr, yk_ptr, cos_ptr, sin_ptr, tokens, qt_stride, qh_stride, kt_stride, kh_stride, q_tiles,
          INVERSE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr,
          ROWS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    if tile < q_tiles:
        _rope_rows(q_ptr, yq_ptr, cos_ptr, sin_ptr, tile, tokens, qt_stride, qh_stride, INVERSE, ACC, D, HQ, ROWS, HALF)
    else:
        _rope_rows(k_ptr, yk_ptr, cos_ptr, sin_ptr, tile - q_tiles, tokens, kt_stride, kh_stride,
                   INVERSE, ACC, D, HK, ROWS, HALF)  # fmt: skip


@triton.jit
def _norm_rope_rows(x_ptr, y_ptr, w_ptr, cos_ptr, sin_ptr, rstd_ptr, tile, tokens, t_stride, h_stride, eps,
                    ACC: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
                    ROWS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    row = tile * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, HALF)
    inside = (row < tokens * H)[:, None] & (d < D // 2)[None, :]
    x = _halves(x_ptr, row, t_stride, h_stride, D, H, HALF)
    y = _halves(y_ptr, row, H * D, D, D, H, HALF)
    c, s = _angles(cos_ptr, sin_ptr, row, inside, ACC, D, H, HALF)
    a = tl.load(x, mask=inside, other=0).to(ACC)
    b = tl.load(x + D // 2, mask=inside, other=0).to(ACC)
    rstd = 1 / tl.sqrt(tl.sum(a * a + b * b, 1) / D + eps)
    a = a * rstd[:, None] * tl.load(w_ptr + d, mask=d < D // 2, other=0).to(ACC)[None, :]
    b = b * rstd[:, None] * tl.load(w_ptr + D // 2 + d, mask=d < D // 2, other=0).to(ACC)[None, :]
    tl.store(y, (a * c - b * s).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y + D // 2, (b * c + a * s).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < tokens * H)


@triton.jit
def _norm_rope_forward(q_ptr, k_ptr, yq_ptr, yk_ptr, wq_ptr, wk_ptr, cos_ptr, sin_ptr, rq_ptr, rk_ptr,
                       tokens, qt_stride, qh_stride, kt_stride, kh_stride, q_tiles, eps,
                       ACC: tl.constexpr, D: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr,
                       ROWS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    if tile < q_tiles:
        _norm_rope_rows(q_ptr, yq_ptr, wq_ptr, cos_ptr, sin_ptr, rq_ptr, tile, tokens, qt_stride, qh_stride, eps,
                        ACC, D, HQ, ROWS, HALF)  # fmt: skip
    else:
        _norm_rope_rows(k_ptr, yk_ptr, wk_ptr, cos_ptr, sin_ptr, rk_ptr, tile - q_tiles, tokens, kt_stride, kh_stride,
                        eps, ACC, D, HK, ROWS, HALF)  # fmt: skip


@triton.jit
def _norm_rope_backward_rows(dy_ptr, x_ptr, w_ptr, cos_ptr, sin_ptr, rstd_ptr, dx_ptr, dw_ptr, program, programs,
                             tokens, gt_stride, gh_stride, t_stride, h_stride,
                             ACC: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
                             ROWS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    d = tl.arange(0, HALF)
    wa = tl.load(w_ptr + d, mask=d < D // 2, other=0).to(ACC)
    wb = tl.load(w_ptr + D // 2 + d, mask=d < D // 2, other=0).to(ACC)
    dwa = tl.zeros((ROWS, HALF), ACC)  # summed over its rows at the end: in the loop that would cost barriers
    dwb = tl.zeros((ROWS, HALF), ACC)
    for start in range(program * ROWS, tokens * H, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < tokens * H)[:, None] & (d < D // 2)[None, :]
        x = _halves(x_ptr, row, t_stride, h_stride, D, H, HALF)
        dy = _halves(dy_ptr, row, gt_stride, gh_stride, D, H, HALF)
        dx = _halves(dx_ptr, row, H * D, D, D, H, HALF)
        c, s = _angles(cos_ptr, sin_ptr, row, inside, ACC, D, H, HALF)
        ga = tl.load(dy, mask=inside, other=0).to(ACC)
        gb = tl.load(dy + D // 2, mask=inside, other=0).to(ACC)
        na = ga * c + gb * s  # turned back: the gradient of what the norm gave
        nb = gb * c - ga * s
        rstd = tl.load(rstd_ptr + row, mask=row < tokens * H, other=0).to(ACC)[:, None]
        a = tl.load(x, mask=inside, other=0).to(ACC) * rstd
        b = tl.load(x + D // 2, mask=inside, other=0).to(ACC) * rstd
        dwa += na * a
        dwb += nb * b
        na *= wa[None, :]
        nb *= wb[None, :]
        mean = (tl.sum(na * a + nb * b, 1) / D)[:, None]
        tl.store(dx, ((na - a * mean) * rstd).to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dx + D // 2, ((nb - b * mean) * rstd).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + program * D + d, tl.sum(dwa, 0), mask=d < D // 2)
    tl.store(dw_ptr + program * D + D // 2 + d, tl.sum(dwb, 0), mask=d < D // 2)


@triton.jit
def _norm_rope_backward(gq_ptr, gk_ptr, q_ptr, k_ptr, wq_ptr, wk_ptr, cos_ptr, sin_ptr, rq_ptr, rk_ptr,
                        dq_ptr, dk_ptr, dwq_ptr, dwk_ptr, tokens,
                        gqt_stride, gqh_stride, gkt_stride, gkh_stride, qt_stride, qh_stride, kt_stride, kh_stride,
                        q_programs,
                        ACC: tl.constexpr, D: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr,
                        ROWS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        _norm_rope_backward_rows(gq_ptr, q_ptr, wq_ptr, cos_ptr, sin_ptr, rq_ptr, dq_ptr, dwq_ptr,
                                 program, q_programs, tokens, gqt_stride, gqh_stride, qt_stride, qh_stride,
                                 ACC, D, HQ, ROWS, HALF)  # fmt: skip
    else:
        _norm_rope_backward_rows(gk_ptr, k_ptr, wk_ptr, cos_ptr, sin_ptr, rk_ptr, dk_ptr, dwk_ptr,
                                 program - q_programs, tl.num_programs(0) - q_programs, tokens,
                                 gkt_stride, gkh_stride, kt_stride, kh_stride, ACC, D, HK, ROWS, HALF)  # fmt: skip


def rope(q, k, cos, sin, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = _dense_rows(q), _dense_rows(k)
    T, Hq, D = q.shape
    Hk = k.shape[1]
    yq, yk = _empty(q), _empty(k)
    if T:
        ROWS, HALF = _tile(D)
        q_tiles = triton.cdiv(T * Hq, ROWS)
        _rope[(q_tiles + triton.cdiv(T * Hk, ROWS),)](
            q, k, yq, yk, cos.contiguous(), sin.contiguous(), T, *q.stride()[:2], *k.stride()[:2], q_tiles,
            INVERSE=inverse, ACC=acc_type(q.dtype), D=D, HQ=Hq, HK=Hk, ROWS=ROWS, HALF=HALF,
            num_warps=_warps(ROWS, HALF),
        )  # fmt: skip
    return yq, yk


def qk_norm_rope_forward(q, k, q_weight, k_weight, cos, sin, eps) -> tuple[torch.Tensor, ...]:
    """-> rotated q and k, rstd of q's and k's heads."""
    q, k = _dense_rows(q), _dense_rows(k)
    T, Hq, D = q.shape
    Hk = k.shape[1]
    yq, yk = _empty(q), _empty(k)
    q_rstd, k_rstd = (torch.empty(T, H, dtype=accumulate_dtype(q.dtype), device=q.device) for H in (Hq, Hk))
    if T:
        ROWS, HALF = _tile(D)
        q_tiles = triton.cdiv(T * Hq, ROWS)
        _norm_rope_forward[(q_tiles + triton.cdiv(T * Hk, ROWS),)](
            q, k, yq, yk, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(),
            q_rstd, k_rstd, T, *q.stride()[:2], *k.stride()[:2], q_tiles, eps,
            ACC=acc_type(q.dtype), D=D, HQ=Hq, HK=Hk, ROWS=ROWS, HALF=HALF, num_warps=_warps(ROWS, HALF),
        )  # fmt: skip
    return yq, yk, q_rstd, k_rstd


def qk_norm_rope_backward(dq, dk, q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd) -> tuple[torch.Tensor, ...]:
    """-> gradients of q, k, q_weight, k_weight."""
    gq, gk, q, k = map(_dense_rows, (dq, dk, q, k))
    T, Hq, D = q.shape
    Hk = k.shape[1]
    dq, dk = _empty(q), _empty(k)
    ROWS, HALF = _tile(D, 1024)  # so that four programs share a multiprocessor, as the norms have it
    q_programs, k_programs = _share(triton.cdiv(T * Hq, ROWS), triton.cdiv(T * Hk, ROWS), 4 * multiprocessors(q.device))
    dwq, dwk = (torch.empty(n, D, dtype=accumulate_dtype(q.dtype), device=q.device) for n in (q_programs, k_programs))
    if T:
        _norm_rope_backward[(q_programs + k_programs,)](
            gq, gk, q, k, q_weight.contiguous(), k_weight.contiguous(), cos.contiguous(), sin.contiguous(),
            q_rstd, k_rstd, dq, dk, dwq, dwk, T,
            *gq.stride()[:2], *gk.stride()[:2], *q.stride()[:2], *k.stride()[:2], q_programs,
            ACC=acc_type(q.dtype), D=D, HQ=Hq, HK=Hk, ROWS=ROWS, HALF=HALF, num_warps=_warps(ROWS, HALF),
        )  # fmt: skip
    return dq, dk, dwq.sum(0).to(q_weight.dtype), dwk.sum(0).to(k_weight.dtype)


def _share(q_tiles: int, k_tiles: int, programs: int) -> tuple[int, int]:
    """How many of the programs walk over q's tiles and how many over k's; none where there are no tiles."""
    if q_tiles + k_tiles <= programs:
        return q_tiles, k_tiles
    q_programs = min(max(programs * q_tiles // (q_tiles + k_tiles), 1), programs - 1)
    return q_programs, programs - q_programs


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _tile(D: int, pairs: int = 2048) -> tuple[int, int]:
    """(rows, half a row) of a tile of about so many pairs, both powers of two."""
    HALF = max(16, triton.next_power_of_2(D // 2))
    return max(1, pairs // HALF), HALF


def _warps(ROWS: int, HALF: int) -> int:
    """8 pairs a thread: a load of 16 bytes of either half in bf16."""
    return min(max(ROWS * HALF // (32 * 8), 1), 16)
