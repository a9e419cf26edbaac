"""What packed attention's kernels compile to."""

import pytest
import torch
from sm90 import check, launches, meta

from vkernels.jit import attention, attention_backward
from vkernels.tiles import WIDTH, counts

T, S = 32768, 64


def attend(Hq, Hk, D, dtype=torch.bfloat16, *, lo=False, hi=False, listed=True, documents=S):
    """Forward and backward of a packed batch of 32k tokens."""

    def launch():
        q, k = meta(T, Hq, D, dtype=dtype), meta(T, Hk, D, dtype=dtype)
        cu = meta(documents + 1, dtype=torch.int32)
        kv_lo, kv_hi = (meta(T, dtype=torch.int32) if given else None for given in (lo, hi))
        tiles = meta(1 + sum(counts(T, T, documents)), WIDTH, dtype=torch.int32) if listed else None
        rest = cu, cu, T, T, kv_lo, kv_hi, D**-0.5, tiles
        out, lse = attention.forward(q, k, k, *rest)
        attention_backward.backward(out, q, k, k, out, lse, *rest)

    return launch


CAUSAL = {"D 64": attend(32, 8, 64), "D 128": attend(16, 8, 128)}


def test_varlen_attention():
    check("varlen_attention", CAUSAL)


def test_the_loops_copy_ahead():
    for launch in CAUSAL.values():
        with launches() as kernels:
            launch()
        assert all("async_copy_global_to_local" in kernel.asm["ttgir"] for _, kernel in kernels)


@pytest.mark.slow
def test_varlen_attention_otherwise():
    check("varlen_attention", {"D 128, image blocks": attend(16, 8, 128, hi=True),
                               "D 64, intervals": attend(32, 8, 64, lo=True, hi=True),
                               "D 80": attend(16, 16, 80), "D 256": attend(8, 4, 256),
                               "D 128, float16, no list": attend(16, 8, 128, torch.float16, listed=False),
                               "D 64, float32": attend(8, 8, 64, torch.float32)})  # fmt: skip


@pytest.mark.slow
def test_another_number_of_documents_compiles_nothing_anew():
    """1, 63 and 64 documents: Triton would specialise 1 and multiples of 16, and so would the number of tiles."""
    found = []
    for documents in (1, 63, 64):
        with launches() as kernels:
            attend(2, 1, 16, documents=documents, listed=False)()
        found.append({(name, kernel.hash) for name, kernel in kernels})
    assert len(found[0]) == 6
    assert found[0] == found[1] == found[2]
