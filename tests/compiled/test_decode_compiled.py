"""What the kernels of decode attention compile to."""

import pytest
import torch
from sm90 import check, meta

from vkernels.jit import decode


def step(B, Hq, Hk, D, L, start=True):
    def launch():
        caches = meta(B, L, Hk, D), meta(B, L, Hk, D)
        columns = meta(B, dtype=torch.int32), meta(B, dtype=torch.int32)
        length, start_of = columns if start else (meta(dtype=torch.int32), None)
        decode.decode_attention(meta(B, Hq, D), meta(B, Hk, D), meta(B, Hk, D), *caches, length, start_of, D**-0.5)

    return launch


def test_decode_attention():
    check("decode_attention", {"64 x 16:8 heads of 128": step(64, 16, 8, 128, 4096),
                               "64 x 16:2 heads of 64": step(64, 16, 2, 64, 4096)})  # fmt: skip


@pytest.mark.slow
def test_decode_attention_at_other_sizes():
    check("decode_attention", {"8 x 28:4 heads of 80, one length": step(8, 28, 4, 80, 8192, start=False),
                               "8 x 12:12 heads of 256": step(8, 12, 12, 256, 2048),
                               "1000 x 16:8 heads of 128, no splits": step(1000, 16, 8, 128, 512),
                               "2 x 64:1 heads of 128": step(2, 64, 1, 128, 32768)})  # fmt: skip
