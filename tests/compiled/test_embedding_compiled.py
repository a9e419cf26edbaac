"""What the embedding's kernels compile to."""

import pytest
import torch
from sm90 import check, launches, meta

from vkernels.jit import embedding, touched
from vkernels.segments import empty_segments

TOKENS, BASES, SIZES, ROWS = 32768, [0, 151672], [151672, 64000], [151680, 64000]
IDS = meta(TOKENS, dtype=torch.int32)


def forward(C, code_dim=0, dtype=torch.bfloat16):
    """Text and visual tables; code_dim > 0: the visual one is a codebook with a projection and a bias."""
    tables = [meta(ROWS[0], C, dtype=dtype), meta(ROWS[1], code_dim or C, dtype=dtype)]
    weights = [None, meta(C, code_dim, dtype=dtype) if code_dim else None]
    biases = [None, meta(C, dtype=dtype) if code_dim else None]
    return lambda: embedding.embed_forward(IDS, tables, BASES, SIZES, [], [0, 0], 0, weights, biases, [])


def with_terms(C):
    """Positions, modalities and float32 slots beside the two tables."""
    rows = 4096, 2, 1024
    tables = [*(meta(n, C) for n in (*ROWS, *rows[:2])), meta(rows[2], C, dtype=torch.float32)]
    none = [None] * 5
    return lambda: embedding.embed_forward(
        IDS, tables, [*BASES, 0, 0, 0], [*SIZES, *rows], [IDS] * 3, [0, 0, 1, 2, 3], 1, none, none, []
    )


def backward(C, dtype=torch.bfloat16):
    order = empty_segments(TOKENS, sum(SIZES), "meta")
    return lambda: embedding.embed_backward(meta(TOKENS, C, dtype=dtype), IDS, BASES, SIZES, [], [0, 0], ROWS, order)


def touched_rows(C):
    """Their gradients from bf16, then lazy AdamW."""
    order = empty_segments(TOKENS, SIZES[0], "meta")
    one = meta(1, dtype=torch.int32), meta(4, dtype=torch.float32)

    def launch():
        grads = touched.embed_touched(meta(TOKENS, C), IDS, 0, SIZES[0], *order)
        state = [meta(ROWS[0], C, dtype=torch.float32) for _ in range(3)]
        touched.lazy_adamw_rows(*state, order.rows, grads, *one, 0.9, 0.95, 1e-8, 0.1)

    return launch


def test_embed():
    check("embed", {"2 tables, 2048": forward(2048), "codes of 8, 2048": forward(2048, 8),
                    "backward, 2048": backward(2048)})  # fmt: skip


@pytest.mark.slow
def test_other_widths():
    check("embed", {"2 tables, 4096": forward(4096), "terms, 4096": with_terms(4096),
                    "codes of 64, 2048": forward(2048, 64), "codes of 256, 4096": forward(4096, 256),
                    "codes of 32 in float32": forward(2048, 32, torch.float32),
                    "backward, 4096": backward(4096), "backward, codes of 16": backward(16),
                    "backward in float32": backward(2048, torch.float32),
                    "touched rows, 2048": touched_rows(2048)})  # fmt: skip


@pytest.mark.parametrize("case", [forward(2048), backward(2048)], ids=["forward", "backward"])
def test_rows_are_read_and_written_16_bytes_at_a_time(case):
    with launches() as kernels:
        case()
    ptx = kernels[0][1].asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert "ld.global.b16" not in ptx
