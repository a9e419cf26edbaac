"""What the kernels of vector, finite scalar and lookup-free quantisation compile to."""

import pytest
import torch
from sm90 import check, meta

from vkernels.jit import fsq, vq, vq_codebook

F32, I32 = torch.float32, torch.int32


def nearest(n, k, d, dtype=F32, exact=True):
    return lambda: vq.vq_nearest(meta(n, d, dtype=dtype), meta(k, d, dtype=dtype), exact)


def training_step():
    x, codebook, ids = meta(65536, 32, dtype=F32), meta(16384, 32, dtype=F32), meta(65536, dtype=I32)
    codes, commitment = vq_codebook.vq_straight_through(x, codebook, ids, 0.25)
    vq_codebook.vq_straight_through_backward(codes, commitment, x, codes, ids, 16384, 0.25)
    size, sums = meta(16384, dtype=F32), meta(16384, 32, dtype=F32)
    vq_codebook.vq_ema_update(size, sums, codebook, size, sums, 0.99, 1e-5)
    available = torch.empty((), dtype=torch.int64, device="meta")
    vq_codebook.vq_reset_codes(size, sums, codebook, meta(16384, dtype=torch.bool), x, available)


def finite_scalar():
    z = meta(65536, 6, dtype=F32)
    codes, ids = fsq.fsq_quantize(z, [8, 8, 8, 5, 5, 5])
    fsq.fsq_quantize_backward(codes, z, [8, 8, 8, 5, 5, 5])
    fsq.fsq_dequantize(ids, [8, 8, 8, 5, 5, 5])
    fsq.lfq_quantize(meta(65536, 18), 1.0)


def test_nearest():
    check("vq_nearest", {"64k, 16k codes of 32": nearest(65536, 16384, 32)})


@pytest.mark.slow
def test_nearest_of_every_shape():
    cases = {
        "64k, 16k codes of 8": nearest(65536, 16384, 8),
        "64k, 16k codes of 32, bf16": nearest(65536, 16384, 32, torch.bfloat16),
        "64k, 16k codes of 32, fast": nearest(65536, 16384, 32, exact=False),
        "64k, 256k codes of 64": nearest(65536, 262144, 64),
        "64k, 256k codes of 64, fast": nearest(65536, 262144, 64, exact=False),
        "64k, 16k codes of 128": nearest(65536, 16384, 128),
        "64k, 16k codes of 256": nearest(65536, 16384, 256),
        "64k, 256k codes of 256, fast": nearest(65536, 262144, 256, exact=False),
        "1 row, 256k codes of 32": nearest(1, 262144, 32),
        "4k, 16 codes of 8": nearest(4096, 16, 8),
    }
    check("vq_nearest", cases)


def test_codebook_in_training():
    check("vq_codebook", {"64k, 16k codes of 32": training_step})


def test_finite_scalar():
    check("fsq", {"64k": finite_scalar})
