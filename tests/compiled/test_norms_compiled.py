"""What the norms' kernels compile to."""

import pytest
from sm90 import check, meta

from vkernels.jit import norms


def rms_norm(rows, columns):
    def launch():
        x, w = meta(rows, columns), meta(columns)
        y, rstd = norms.rms_norm_forward(x, w, 1e-6)
        norms.rms_norm_backward(y, x, w, rstd)

    return launch


def add_rms_norm(rows, columns):
    def launch():
        x, w = meta(rows, columns), meta(columns)
        y, stream, rstd = norms.add_rms_norm_forward(x, x, w, 1e-6)
        norms.rms_norm_backward(y, stream, w, rstd, stream)

    return launch


def layer_norm(rows, columns):
    def launch():
        x, w = meta(rows, columns), meta(columns)
        y, mean, rstd = norms.layer_norm_forward(x, w, w, 1e-5)
        norms.layer_norm_backward(y, x, w, mean, rstd)

    return launch


OPS = [rms_norm, add_rms_norm, layer_norm]


@pytest.mark.parametrize("op", OPS)
def test_norm(op):
    check(op.__name__, {"32k x 2048": op(32768, 2048)})


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_norm_of_other_widths(op):
    check(op.__name__, {"heads of 128": op(1 << 18, 128), "16k x 1152": op(16384, 1152), "8k x 4096": op(8192, 4096),
                        "8k x 8192": op(8192, 8192)})  # fmt: skip
