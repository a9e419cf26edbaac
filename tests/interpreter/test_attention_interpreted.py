"""The Triton kernels of packed attention."""

import random

import pytest
import torch

import vkernels
from vkernels.check.attention import CHECKS, lengths_to_cu
from vkernels.jit import attention, attention_tiles
from vkernels.jit.attention_tiles import tiles_on_device

SMALL = [c for c in CHECKS if c.small]


@pytest.mark.parametrize("check", SMALL, ids=lambda c: c.name)
def test_against_float64(check):
    for finding in check.run(torch.device("cpu"), torch.float32):
        assert finding.fine, finding


@pytest.mark.parametrize(
    "check", [pytest.param(c, id=c.name, marks=[pytest.mark.slow][: "any" not in c.name]) for c in SMALL]
)
def test_against_float64_in_bf16(check):
    for finding in check.run(torch.device("cpu"), torch.bfloat16):
        assert finding.fine, finding


def operands(Tq, Tk, Hq, Hk, D, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(T, H, D, generator=g).to(dtype) for T, H in ((Tq, Hq), (Tk, Hk), (Tk, Hk))]


@pytest.mark.parametrize("bounded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients(bounded):
    q, k, v = (x.requires_grad_() for x in operands(7, 9, 2, 1, 4, torch.float64))
    c_q, c_k = lengths_to_cu((2, 5)), lengths_to_cu((3, 6))
    masks = {}
    if bounded:
        masks["kv_lo"] = torch.tensor([0, 1, 3, 0, 8, 4, 5], dtype=torch.int32)
        masks["kv_hi"] = torch.tensor([3, 1, 8, 5, 3, 7, 9], dtype=torch.int32)
    tiles = vkernels.attention_tiles(c_q, c_k, **masks)

    def attend(q, k, v):
        return vkernels.varlen_attention(q, k, v, c_q, c_k, **masks, tiles=tiles)

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("together", [(256, 256, 1024), (2, 2, 2)])
def test_lists_made_on_the_device_and_on_the_host_are_equal(monkeypatch, together):
    """Also of more documents, steps and tiles than are looked at together."""
    for name, number in zip(("DOCUMENTS", "STEPS", "TILES"), together):
        monkeypatch.setattr(attention_tiles, name, number)
    rng = random.Random(0)
    g = torch.Generator().manual_seed(0)
    for trial in range(6):
        of_q = [rng.choice([0, 1, 63, 64, 65, 127, 128, 129, 300]) for _ in range(rng.randint(0, 5))]
        of_k = [rng.choice([n, n, n + 3, 0, 260]) for n in of_q]
        c_q, c_k = lengths_to_cu(of_q), lengths_to_cu(of_k)
        Tq, Tk = sum(of_q), sum(of_k)
        lo = torch.arange(Tq, dtype=torch.int32) - 70 if trial % 3 == 1 else None
        hi = None
        if trial % 4 > 1:
            hi = (
                torch.randint(-3, Tk + 3, (Tq,), generator=g, dtype=torch.int32)
                if trial % 4 == 2
                else c_q[-1:].expand(Tq)
            )
        here = vkernels.attention_tiles(c_q, c_k, kv_lo=lo, kv_hi=hi)
        there = tiles_on_device(Tq, Tk, c_q, c_k, lo, None if hi is None else hi.contiguous())
        assert torch.equal(here[1:], there[1:])
        assert there[:1].numel() == 0 or here[0, 0] == there[0, 0] or Tq + Tk == 0


def test_a_document_does_not_depend_on_its_neighbours():
    """Tiles begin with documents: bit for bit the same alone and packed."""
    q, k, v = (x.requires_grad_() for x in operands(210, 210, 2, 1, 16))
    c = lengths_to_cu((20, 140, 50))
    alone = [x.detach()[20:160].requires_grad_() for x in (q, k, v)]
    o, o_alone = vkernels.varlen_attention(q, k, v, c), vkernels.varlen_attention(*alone, lengths_to_cu((140,)))
    assert torch.equal(o[20:160], o_alone)
    grads, grads_alone = torch.autograd.grad(o.sum(), (q, k, v)), torch.autograd.grad(o_alone.sum(), alone)
    assert all(torch.equal(a[20:160], b) for a, b in zip(grads, grads_alone))


def test_slices_of_a_merged_projection():
    qkv = torch.randn(30, 4 * 16)
    q, k, v = (x.unflatten(1, (-1, 16)) for x in qkv.split([32, 16, 16], dim=1))
    c = lengths_to_cu((30,))
    plain = vkernels.varlen_attention(*(x.contiguous() for x in (q, k, v)), c)
    assert torch.equal(vkernels.varlen_attention(q, k, v, c), plain)


def test_lse_and_rows_without_keys():
    q, k, v = operands(7, 7, 2, 1, 8)
    c, hi = lengths_to_cu((4, 3)), torch.tensor([1, 0, 3, 0, 5, 4, 7], dtype=torch.int32)
    o, lse = vkernels.varlen_attention(q, k, v, c, kv_hi=hi, scale=0.7, return_lse=True)
    vkernels.force("varlen_attention", "torch")
    o_torch, lse_torch = vkernels.varlen_attention(q, k, v, c, kv_hi=hi, scale=0.7, return_lse=True)
    torch.testing.assert_close((o, lse), (o_torch, lse_torch), rtol=1e-5, atol=1e-6)
    assert (o[[1, 3, 5]] == 0).all()


def test_nan_stays_in_its_document():
    q, k, v = operands(40, 40, 1, 1, 8)
    k[20], v[12] = torch.nan, torch.nan
    o = vkernels.varlen_attention(q, k, v, lengths_to_cu((10, 30)))
    assert o[:10].isfinite().all()
    assert o[20:].isnan().all()


def test_a_list_that_does_not_fit_is_refused(monkeypatch):
    q, k, v = operands(40, 40, 1, 1, 8)
    c, hi = lengths_to_cu((10, 30)), torch.full((40,), 40, dtype=torch.int32)
    tiles = vkernels.attention_tiles(c)
    for bad, what in ((tiles[:-1], "expected torch.int32"), (tiles.long(), "int64"),
                      (vkernels.attention_tiles(c, kv_hi=hi), "header"),
                      (vkernels.attention_tiles(lengths_to_cu((10, 29))), "header")):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            vkernels.varlen_attention(q, k, v, c, tiles=bad)
    # On a GPU the header is not read on the host: the kernel sees it, and gives nothing that could pass for a result.
    monkeypatch.setattr(attention, "require_fitting", lambda *args: None)
    assert vkernels.varlen_attention(q, k, v, c, kv_hi=hi, tiles=tiles).isnan().all()
