"""What the rotary kernels compile to."""

import pytest
import torch
from sm90 import check, meta

from vkernels.jit import rotary


def heads(T, Hq, Hk, D):
    """q and k as slices of a merged projection, cos, sin."""
    q, k, _ = meta(T, Hq + 2 * Hk, D).split((Hq, Hk, Hk), 1)
    return q, k, meta(T, D // 2, dtype=torch.float32), meta(T, D // 2, dtype=torch.float32)


def rope(*shape):
    return lambda: rotary.rope(*heads(*shape), False)


def qk_norm_rope(T, Hq, Hk, D):
    def launch():
        q, k, cos, sin = heads(T, Hq, Hk, D)
        w = meta(D)
        yq, yk, q_rstd, k_rstd = rotary.qk_norm_rope_forward(q, k, w, w, cos, sin, 1e-6)
        rotary.qk_norm_rope_backward(yq, yk, q, k, w, w, cos, sin, q_rstd, k_rstd)

    return launch


OPS = [rope, qk_norm_rope]


@pytest.mark.parametrize("op", OPS)
def test_rotary(op):
    check(op.__name__, {"16 + 8 heads of 128": op(32768, 16, 8, 128)})


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_rotary_of_other_heads(op):
    check(op.__name__, {"14 + 2 heads of 64": op(32768, 14, 2, 64), "16 + 16 heads of 80": op(16384, 16, 16, 80),
                        "8 + 4 heads of 256": op(8192, 8, 4, 256)})  # fmt: skip
