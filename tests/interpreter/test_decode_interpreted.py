"""The Triton kernels of decode attention."""

import pytest
import torch

import vkernels
from vkernels import oracle
from vkernels.check.decode import CHECKS
from vkernels.jit import decode

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(check, dtype):
    for finding in check.run(CPU, dtype):
        assert finding.fine, finding


def problem(B, Hq, Hk, D, L, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, Hq, D).to(dtype), torch.randn(B, Hk, D).to(dtype), torch.randn(B, Hk, D).to(dtype)
    return q, k, v, torch.randn(B, L, Hk, D).to(dtype), torch.randn(B, L, Hk, D).to(dtype)


@pytest.mark.parametrize("splits", [1, 2, 13])
def test_any_number_of_splits_gives_the_same(splits, monkeypatch):
    """Also more splits than tiles: those without a column count for nothing."""
    monkeypatch.setattr(decode, "_splits", lambda *sizes: splits)
    q, k, v, *caches = problem(3, 4, 2, 16, 330)
    length, start = torch.tensor([329, 0, 200], dtype=torch.int32), torch.tensor([3, 0, 199], dtype=torch.int32)
    expected, *_ = oracle.decode_attention(q, k, v, *caches, length, start)
    found = vkernels.decode_attention(q, k, v, *caches, length, start=start)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_long_caches_are_split():
    assert decode._splits(pairs=8, columns=4096, multiprocessors=132) == 16
    assert decode._splits(pairs=8, columns=1 << 20, multiprocessors=132) == 64
    assert decode._splits(pairs=512, columns=4096, multiprocessors=132) == 2
    assert decode._splits(pairs=5000, columns=4096, multiprocessors=132) == 1
    assert decode._splits(pairs=1, columns=1, multiprocessors=132) == 1


def test_columns_outside_do_not_matter_and_stay():
    q, k, v, *caches = problem(2, 2, 1, 16, 150, torch.float32)
    length, start = torch.tensor([100, 64]), torch.tensor([70, 64])
    for cache in caches:
        for b in range(2):
            cache[b, : start[b]] = cache[b, length[b] :] = torch.nan
    expected, *new = oracle.decode_attention(q, k, v, *caches, length, start)
    found = vkernels.decode_attention(q, k, v, *caches, length, start=start)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    for cache, other in zip(caches, new):
        torch.testing.assert_close(cache.double(), other, atol=0, rtol=0, equal_nan=True)


def test_a_column_outside_the_cache_is_not_written():
    q, k, v, *caches = problem(3, 1, 1, 16, 70, torch.float32)
    padded = [torch.cat([c, torch.full_like(c, 7.0)], 1) for c in caches]  # what lies behind each row's last column
    before = [p.clone() for p in padded]
    views = [p[:, :70] for p in padded]
    vkernels.decode_attention(q, k, v, *views, torch.tensor([70, -1, 99]))
    assert all(torch.equal(a, b) for a, b in zip(padded, before))


def test_slices_of_merged_tensors():
    torch.manual_seed(0)
    qkv = torch.randn(3, (4 + 2 + 2) * 16)
    q, k, v = (x.unflatten(1, (-1, 16)) for x in qkv.split([64, 32, 32], dim=1))
    caches = torch.randn(3, 90, 2, 2, 16).unbind(2)
    length = torch.tensor(80, dtype=torch.int32)
    expected, *_ = oracle.decode_attention(q, k, v, *caches, length, scale=0.3)
    found = vkernels.decode_attention(q, k, v, *caches, length, scale=0.3)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
