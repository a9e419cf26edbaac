"""The Triton kernels of finite scalar and lookup-free quantisation."""

import math

import pytest
import torch

import vkernels
from vkernels import oracle
from vkernels.check.fsq import CHECKS, COSMOS, away_from_ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(check, dtype):
    if dtype in check.dtypes:
        for finding in check.run(torch.device("cpu"), dtype):
            assert finding.fine, finding


@pytest.mark.parametrize("L", [2, 5, 8, 16])
def test_ids_flip_only_near_ties(L):
    """Densely over the line, and one float beside every tie."""
    half, offset = (L - 1) * (1 + 1e-3) / 2, 0.5 * (L % 2 == 0)
    ties = torch.arange(-(L // 2), L // 2, dtype=torch.float64) + 0.5
    ties = torch.atanh(((ties + offset) / half).clamp(-1 + 1e-12, 1 - 1e-12)) - math.atanh(offset / half)
    near = [(ties * (1 + s)).float() for s in (-1e-5, -3e-6, 3e-6, 1e-5)]
    z = torch.cat([torch.linspace(-6, 6, 4001), *near]).unsqueeze(1)
    z = z[away_from_ties(z, [L])]
    assert len(z) > 4000
    assert torch.equal(vkernels.fsq_quantize(z, [L])[1].long(), oracle.fsq_quantize(z, [L])[1])


def test_tanh_is_as_exact_as_float32_allows():
    """Its slope, seen through the gradient, relative to itself also far out; 2^-22 is two units in the last place."""
    z = torch.cat([torch.linspace(-19, 19, 4001), torch.logspace(-30, 0, 200)]).unsqueeze(1).requires_grad_()
    codes, _ = vkernels.fsq_quantize(z, [3])
    (grad,) = torch.autograd.grad(codes.sum(), z)
    x = z.detach().double()
    true = 1.001 / torch.cosh(x).square()
    # cosh multiplies an error of the argument (2^-24 of it) by up to 2 |x|.
    assert ((grad - true).abs() <= true * (2.0**-21 + 2.0**-22 * x.abs())).all()


def test_gradients():
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    dcodes = torch.randn(5, 6, dtype=torch.float64)
    mine, true = (
        torch.autograd.grad(op(z, COSMOS)[0], z, dcodes)[0] for op in (vkernels.fsq_quantize, oracle.fsq_quantize)
    )
    torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    (passed,) = torch.autograd.grad(vkernels.lfq_quantize(z)[0], z, dcodes)
    assert torch.equal(passed, dcodes)


def test_extremes_and_nan():
    z = torch.tensor([[-1e30] * 6, [1e30] * 6, [float("inf")] * 6, [0.0] * 6, [float("nan")] * 6], requires_grad=True)
    codes, ids = vkernels.fsq_quantize(z, COSMOS)
    assert ids[:3].tolist() == [0, 63999, 63999]
    assert 0 <= ids[4] < 64000
    assert codes[4].isnan().all()
    codes[:4].sum().backward()
    assert z.grad[:4].isfinite().all()
    signs, bits = vkernels.lfq_quantize(z.detach(), scale=0.25)
    assert bits.tolist() == [0, 63, 63, 0, 0]
    assert signs[4].isnan().all()


def test_strided():
    torch.manual_seed(0)
    z = torch.randn(6, 40).T
    for op in (lambda z: vkernels.fsq_quantize(z, COSMOS), vkernels.lfq_quantize):
        for a, b in zip(op(z), op(z.contiguous())):
            assert torch.equal(a, b)
    ids = torch.arange(0, 64000, 1000, dtype=torch.int32)[::3]
    assert torch.equal(vkernels.fsq_dequantize(ids, COSMOS), oracle.fsq_dequantize(ids, COSMOS).float())
