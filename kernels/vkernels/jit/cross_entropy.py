"""The pass over a chunk's logits in Triton: a row per program at a time, scored and turned into its gradient in place.

In bf16 a row of float32 logits is read twice and its gradient written once, 10 bytes an element; the second reading
starts at the row's end, which the L2 cache still holds (132 rows of 152k are 80 MB, the cache has 50 to 60).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vkernels import cross_entropy, logprob
from vkernels.head import Chunk, Terms
from vkernels.jit.common import acc_type, multiprocessors, row_blocks

_LONG = 8192  # columns at a time: 16 elements a thread of 16 warps, four loads of 16 bytes in flight
_LOWEST = tl.constexpr(-1e38)  # below all logits, and finite: -inf - -inf is NaN


@triton.jit
def _shaped(x, softcap, inverse_temperature, CAP: tl.constexpr):
    """-> the logits as they are scored, -inf where they are -inf; the soft-cap's tanh."""
    t = x
    if CAP:
        t = 2 * tl.sigmoid(x * (2 / softcap)) - 1
        x = tl.where(x > float("-inf"), t * softcap, x)
    return x * inverse_temperature, t


@triton.jit(do_not_specialize=["n_rows"])
def _score_rows(logits_ptr, dlogits_ptr, target_ptr, first_ptr, last_ptr, factor_ptr, entropy_factor_ptr,
                loss_ptr, correct_ptr, entropy_ptr, n_rows, n_cols, stride, d_stride,
                z_loss, smoothing, softcap, temperature,
                ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GRADIENTS: tl.constexpr,
                RESTRICTED: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr, CORRECT: tl.constexpr,
                ENTROPY: tl.constexpr):  # fmt: skip
    tl.static_assert(not (SMOOTH and ENTROPY), "they share an accumulator")
    lane = tl.arange(0, COLS)[None, :]
    inverse = 1 / temperature
    for start_row in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row = (start_row + tl.arange(0, ROWS)).to(tl.int64)
        real = row < n_rows
        row_ptr = logits_ptr + row[:, None] * stride
        target = tl.load(target_ptr + row, mask=real, other=-1)
        if RESTRICTED:
            first = tl.load(first_ptr + row, mask=real, other=0)[:, None]
            last = tl.load(last_ptr + row, mask=real, other=0)[:, None]
        label = tl.load(logits_ptr + row * stride + target, mask=target >= 0, other=float("-inf")).to(ACC)
        label, _ = _shaped(label, softcap, inverse, CAP)

        top = tl.full((ROWS, COLS), _LOWEST, ACC)
        total = tl.zeros((ROWS, COLS), ACC)
        weighted = tl.zeros((ROWS, COLS), ACC)
        visible = tl.zeros((ROWS, COLS), ACC)
        beaten = tl.zeros((ROWS, COLS), tl.int32)
        for start in range(0, n_cols, COLS):
            col = start + lane
            inside = real[:, None] & (col < n_cols)
            x = tl.load(row_ptr + col, mask=inside, other=float("-inf")).to(ACC)
            if RESTRICTED:
                x = tl.where((col >= first) & (col < last), x, float("-inf"))
            x, t = _shaped(x, softcap, inverse, CAP)
            higher = tl.maximum(top, x)
            shrink, e = tl.exp(top - higher), tl.exp(x - higher)
            total = total * shrink + e
            if ENTROPY:
                weighted = weighted * shrink + e * tl.where(x > float("-inf"), x, 0)
            if SMOOTH:
                visible += tl.where(x > float("-inf"), 1, 0)
                weighted += tl.where(x > float("-inf"), x, 0)
            if CORRECT:
                beaten |= ((x > label[:, None]) | ((x == label[:, None]) & (col < target[:, None]))).to(tl.int32)
            top = higher
        highest = tl.where(real, tl.max(top, 1), 0)
        shrink = tl.exp(top - highest[:, None])
        total = tl.where(real, tl.sum(total * shrink, 1), 1)
        lse = highest + tl.log(total)

        loss = (1 - smoothing) * (lse - label) + z_loss * lse * lse
        if SMOOTH:
            among = tl.where(real, tl.sum(visible, 1), 1)
            loss += smoothing * (lse - tl.sum(weighted, 1) / among)
        tl.store(loss_ptr + row, loss, mask=real)
        if CORRECT:
            tl.store(correct_ptr + row, ((tl.max(beaten, 1) == 0) & (target >= 0)).to(ACC), mask=real)
        if ENTROPY:
            entropy = lse - tl.sum(weighted * shrink, 1) / total
            tl.store(entropy_ptr + row, entropy, mask=real)

        if GRADIENTS:
            factor = tl.load(factor_ptr + row, mask=real, other=0).to(ACC) * inverse
            likely = factor * (1 + 2 * z_loss * lse)
            for back in range(0, n_cols, COLS):
                col = (tl.cdiv(n_cols, COLS) - 1) * COLS - back + lane
                inside = real[:, None] & (col < n_cols)
                x = tl.load(row_ptr + col, mask=inside, other=float("-inf")).to(ACC)
                if RESTRICTED:
                    x = tl.where((col >= first) & (col < last), x, float("-inf"))
                x, t = _shaped(x, softcap, inverse, CAP)
                p = tl.exp(x - lse[:, None])
                g = p * likely[:, None] - tl.where(col == target[:, None], (factor * (1 - smoothing))[:, None], 0)
                if SMOOTH:
                    g -= tl.where(x > float("-inf"), (factor * smoothing / among)[:, None], 0)
                if ENTROPY:
                    of_entropy = tl.load(entropy_factor_ptr + row, mask=real, other=0).to(ACC) * inverse
                    surprise = tl.where(x > float("-inf"), lse[:, None] - x, 0)
                    g += p * (surprise - entropy[:, None]) * of_entropy[:, None]
                if CAP:
                    g *= 1 - t * t
                # The gradients lie at the end of the logits' own memory: over what every thread has read by now.
                tl.debug_barrier()
                to_ptr = dlogits_ptr + row[:, None] * d_stride + col
                tl.store(to_ptr, g.to(dlogits_ptr.dtype.element_ty), mask=inside)


def score_rows(c: Chunk, terms: Terms, dtype: torch.dtype | None) -> torch.Tensor | None:
    """The row pass, see vkernels.head."""
    t, width = c.logits.shape  # a multiple of 8, so that all loads are of 16 bytes
    # The last `width` places of a row in the gradients' dtype: gradient k covers logits from (width + k) / 2 >= k on.
    dlogits = c.logits if dtype is None else c.logits.view(dtype)[:, -width:]
    ROWS, COLS = row_blocks(min(width, _LONG))
    none = c.loss
    _score_rows[(min(triton.cdiv(t, ROWS), _programs(c)),)](
        c.logits, dlogits, c.target, *(none if x is None else x for x in (c.first, c.last, c.factor, c.entropy_factor)),
        c.loss, *(none if x is None else x for x in (c.correct, c.entropy)),
        t, width, c.logits.stride(0), dlogits.stride(0),
        float(terms.z_loss), float(terms.label_smoothing), float(terms.softcap), float(terms.temperature),
        ACC=acc_type(c.loss.dtype), ROWS=ROWS, COLS=COLS, GRADIENTS=dtype is not None, RESTRICTED=c.first is not None,
        SMOOTH=terms.label_smoothing > 0, CAP=terms.softcap > 0, CORRECT=c.correct is not None,
        ENTROPY=c.entropy is not None, num_warps=ROWS * COLS // 512, maxnreg=128,
    )  # fmt: skip
    return None if dtype is None else dlogits


def _programs(c: Chunk) -> int:
    """16 warps on each multiprocessor for long rows, so that few of them compete for the cache; for short ones more."""
    return multiprocessors(c.logits.device) * (1 if c.logits.shape[1] > 65536 else 4)


def cross_entropy_forward(*args):
    return cross_entropy.forward(score_rows, *args)


def cross_entropy_backward(*args):
    return cross_entropy.backward(score_rows, *args)


def logprob_forward(*args):
    return logprob.forward(score_rows, *args)


def logprob_backward(*args):
    return logprob.backward(score_rows, *args)
