"""AdamW and the sum of squares in Triton: one launch over many tensors, a chunk of one of them per program.

Tensors come as tables of pointers on the device. A whole chunk at pointers of 16 bytes moves in vectors of 16 bytes;
ends of tensors, and views that begin anywhere (FSDP's gradients), take the masked path of the same code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels import adamw, tables
from vkernels.jit.common import acc_type, multiprocessors, tl_type

CHUNK = 4096  # elements a program: 16 for each of 256 threads, over 100 KB in flight for each block


@triton.jit
def _power(base, n):
    """base^n by squaring in the dtype of base (float64: 1 - 0.999 keeps its digits), for n >= 0."""
    result = base * 0 + 1
    while n > 0:
        result = tl.where(n & 1 == 1, result * base, result)
        base = base * base
        n = n >> 1
    return result


@triton.jit
def _words(seed, step, which, base, CHUNK: tl.constexpr):
    """A random word for each element from `base` on; four neighbours share a counter of Philox."""
    group = base // 4 + tl.arange(0, CHUNK // 4)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, which.to(tl.uint32), step.to(tl.uint32))
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [CHUNK])


@triton.jit
def _round(x, bits, TYPE: tl.constexpr):
    """x in TYPE; to bf16 up with a probability of what is cut off, by 16 random bits."""
    if TYPE.is_bf16():
        x = x.to(tl.float32)
        raw = (x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
        x = tl.where(x == x, raw.to(tl.float32, bitcast=True), x)
    return x.to(TYPE)


@triton.jit
def _at(table, which, base, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointer = tl.load(table + which).to(tl.pointer_type(TYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + base


@triton.jit
def _update(p_ptrs, g_ptrs, m_ptrs, v_ptrs, c_ptrs, which, base, numel, step, seed,
            scale, decay, size, root, rest1, beta2, rest2, eps,
            PARAM: tl.constexpr, GRAD: tl.constexpr, AVG: tl.constexpr, SQUARE: tl.constexpr, COPY: tl.constexpr,
            ZERO: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    i = tl.arange(0, CHUNK)
    mask = None if WHOLE else base + i < numel
    at_p, at_g = _at(p_ptrs, which, base, PARAM, WHOLE) + i, _at(g_ptrs, which, base, GRAD, WHOLE) + i
    at_m, at_v = _at(m_ptrs, which, base, AVG, WHOLE) + i, _at(v_ptrs, which, base, SQUARE, WHOLE) + i
    p, m, v = tl.load(at_p, mask).to(ACC), tl.load(at_m, mask).to(ACC), tl.load(at_v, mask).to(ACC)
    g = tl.load(at_g, mask).to(ACC) * scale
    m += (g - m) * rest1
    v = v * beta2 + g * g * rest2
    p = p * decay - size * m / (tl.sqrt(v) / root + eps)
    bits = tl.zeros((CHUNK,), tl.uint32)
    if AVG.is_bf16() or SQUARE.is_bf16():
        bits = _words(seed, step, which, base, CHUNK)
    tl.store(at_p, p.to(PARAM), mask)
    tl.store(at_m, _round(m, bits & 0xFFFF, AVG), mask)
    tl.store(at_v, _round(v, bits >> 16, SQUARE), mask)
    if COPY is not None:
        tl.store(_at(c_ptrs, which, base, COPY, WHOLE) + i, p.to(COPY), mask)
    if ZERO:
        tl.store(at_g, tl.zeros((CHUNK,), GRAD), mask)


@triton.jit
def _adamw(p_ptrs, g_ptrs, m_ptrs, v_ptrs, c_ptrs, numels, chunks, decays, constants,
           step_ptr, lr_ptr, scale_ptr, kept_ptr, seed,
           PARAM: tl.constexpr, GRAD: tl.constexpr, AVG: tl.constexpr, SQUARE: tl.constexpr, COPY: tl.constexpr,
           ZERO: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    which = tl.load(chunks + 2 * tl.program_id(0))
    base = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    numel = tl.load(numels + which)
    kept = True
    if kept_ptr is not None:
        kept = tl.load(kept_ptr) != 0
    if kept:
        step = tl.load(step_ptr).to(tl.int64)
        lr = tl.load(lr_ptr).to(tl.float64)
        beta1, beta2, eps = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
        decay = (1 - lr * tl.load(decays + which)).to(ACC)
        size = (lr / (1 - _power(beta1, step + 1))).to(ACC)
        root = tl.sqrt(1 - _power(beta2, step + 1)).to(ACC)
        scale = tl.full((), 1, ACC)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr).to(ACC)
        where = tl.load(p_ptrs + which) | tl.load(g_ptrs + which) | tl.load(m_ptrs + which) | tl.load(v_ptrs + which)
        if COPY is not None:
            where |= tl.load(c_ptrs + which)
        if (where % 16 == 0) & (base + CHUNK <= numel):
            _update(p_ptrs, g_ptrs, m_ptrs, v_ptrs, c_ptrs, which, base, numel, step, seed,
                    scale, decay, size, root, (1 - beta1).to(ACC), beta2.to(ACC), (1 - beta2).to(ACC), eps.to(ACC),
                    PARAM, GRAD, AVG, SQUARE, COPY, ZERO, ACC, CHUNK, True)  # fmt: skip
        else:
            _update(p_ptrs, g_ptrs, m_ptrs, v_ptrs, c_ptrs, which, base, numel, step, seed,
                    scale, decay, size, root, (1 - beta1).to(ACC), beta2.to(ACC), (1 - beta2).to(ACC), eps.to(ACC),
                    PARAM, GRAD, AVG, SQUARE, COPY, ZERO, ACC, CHUNK, False)  # fmt: skip
    elif ZERO:
        i = tl.arange(0, CHUNK)
        tl.store(_at(g_ptrs, which, base, GRAD, False) + i, tl.zeros((CHUNK,), GRAD), base + i < numel)


@triton.jit
def _squares(tensors, numels, chunks, n_chunks, partial_ptr,
             TYPE: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    i = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), ACC)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        which = tl.load(chunks + 2 * chunk)
        base = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * CHUNK
        numel = tl.load(numels + which)
        if (tl.load(tensors + which) % 16 == 0) & (base + CHUNK <= numel):
            x = tl.load(_at(tensors, which, base, TYPE, True) + i).to(ACC)
        else:
            x = tl.load(_at(tensors, which, base, TYPE, False) + i, base + i < numel, other=0).to(ACC)
        total += x * x
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total.to(tl.float64), 0))


def adamw_step(step, params, grads, avgs, squares, copies, decays, lr, beta1, beta2, eps, scale, kept, zero, seed):
    numels, found = adamw.check_lists(params, grads, avgs, squares, copies)
    device = step.device
    chunks = tables.resident_chunks(device, numels, CHUNK)
    if len(chunks):
        pointers = [tables.resident_numbers(device, p, torch.int64) if p else None for p in found]
        _adamw[(len(chunks),)](
            *pointers, tables.resident_numbers(device, numels, torch.int64), chunks,
            tables.resident_numbers(device, tuple(decays), torch.float64),
            tables.resident_numbers(device, (beta1, beta2, eps), torch.float64), step, lr, scale, kept, seed,
            *[tl_type(x[0].dtype) if x else None for x in (params, grads, avgs, squares, copies)],
            ZERO=zero, ACC=acc_type(params[0].dtype), CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
    step.add_(1 if kept is None else kept.ne(0))


def square_sum(start: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
    device = start.device
    numels = tuple([t.numel() for t in tensors])
    found = tables.pointers("clip_factor", "grads", tensors, numels, device)
    chunks = tables.resident_chunks(device, numels, CHUNK)
    if not len(chunks):
        return start.clone()
    programs = min(len(chunks), 8 * multiprocessors(device))
    partial = torch.empty(programs, dtype=torch.float64, device=device)
    _squares[(programs,)](
        tables.resident_numbers(device, found, torch.int64), tables.resident_numbers(device, numels, torch.int64),
        chunks, len(chunks), partial,
        TYPE=tl_type(tensors[0].dtype), ACC=acc_type(tensors[0].dtype), CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    return start + partial.sum().float()
