"""What the norms' kernels compile to."""

from sm90 import check, meta

from vkernels.jit import norms


def rms_norm(rows, columns):
    def launch():
        x, w = meta(rows, columns), meta(columns)
        y, rstd = norms.rms_norm_forward(x, w, 1e-6)
        norms.rms_norm_backward(y, x, w, rstd)

    return launch


def test_rms_norm():
    check("rms_norm", {"32k x 2048": rms_norm(32768, 2048), "heads of 128": rms_norm(1 << 18, 128),
                       "8k x 8192": rms_norm(8192, 8192)})  # fmt: skip
