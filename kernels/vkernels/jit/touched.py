"""Gradients and AdamW of the touched rows of a table, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels.jit.common import multiprocessors
from vkernels.jit.segment_sum import segment_sum_compact
from vkernels.registry import accumulate_dtype
from vkernels.segments import Segments


def embed_touched(dy, ids, base, size, *order) -> torch.Tensor:
    segments = Segments(*order)
    out = torch.empty(segments.rows.shape[0], dy.shape[1], dtype=accumulate_dtype(dy.dtype), device=dy.device)
    segment_sum_compact(dy, segments, out)
    return out


@triton.jit
def _lazy_adamw(param_ptr, exp_avg_ptr, exp_avg_sq_ptr, rows_ptr, grads_ptr, count_ptr, scalars_ptr, n_cols,
                beta1, beta2, eps, weight_decay, COLS: tl.constexpr):  # fmt: skip
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    there = col < n_cols
    correction1 = tl.load(scalars_ptr)
    correction2 = tl.load(scalars_ptr + 1)
    lr = tl.load(scalars_ptr + 2)
    scale = tl.load(scalars_ptr + 3)
    for number in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        at = tl.load(rows_ptr + number).to(tl.int64) * n_cols + col
        source = tl.cast(number, tl.int64) * n_cols + col
        g = tl.load(grads_ptr + source, mask=there, other=0).to(tl.float32) * scale
        p = tl.load(param_ptr + at, mask=there, other=0)
        m = beta1 * tl.load(exp_avg_ptr + at, mask=there, other=0) + (1 - beta1) * g
        v = beta2 * tl.load(exp_avg_sq_ptr + at, mask=there, other=0) + (1 - beta2) * g * g
        p = p * (1 - lr * weight_decay) - lr / correction1 * m / (tl.sqrt(v) / correction2 + eps)
        tl.store(param_ptr + at, p, mask=there)
        tl.store(exp_avg_ptr + at, m, mask=there)
        tl.store(exp_avg_sq_ptr + at, v, mask=there)


def lazy_adamw_rows(param, exp_avg, exp_avg_sq, rows, grads, count, scalars, beta1, beta2, eps, weight_decay) -> None:
    C = param.shape[1]
    if rows.shape[0] == 0 or C == 0:
        return
    COLS = min(max(16, triton.next_power_of_2(C)), 1024)  # 4 warps: 2 loads of 16 bytes a thread and array
    grid = min(rows.shape[0], 8 * multiprocessors(param.device)), triton.cdiv(C, COLS)
    _lazy_adamw[grid](
        param, exp_avg, exp_avg_sq, rows, grads.contiguous(), count, scalars, C, beta1, beta2, eps, weight_decay,
        COLS=COLS, num_warps=4,
    )  # fmt: skip
