"""Finite scalar quantisation against its definition in float64."""

import math

import pytest
import torch
from op_check import compiles, judge

import vkernels
from vkernels import oracle
from vkernels.check.fsq import CHECKS, away_from_ties

COSMOS = [8, 8, 8, 5, 5, 5]
LEVELS = [COSMOS, [2], [3, 2], [7, 5, 5, 5, 5], [16, 9]]


@pytest.mark.parametrize("levels", LEVELS)
def test_every_index_round_trips(backend, levels):
    ids = torch.arange(math.prod(levels), dtype=torch.int32)
    codes = vkernels.fsq_dequantize(ids, levels)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, oracle.fsq_dequantize(ids, levels).float())
    assert len(torch.unique(codes, dim=0)) == len(ids)
    # The z whose bounded value is the code: what an encoder would have to say for it.
    half = torch.tensor([(L - 1) * (1 + 1e-3) / 2 for L in levels], dtype=torch.float64)
    offset = torch.tensor([0.5 if L % 2 == 0 else 0.0 for L in levels], dtype=torch.float64)
    q = (codes.double() * torch.tensor([L // 2 for L in levels])).round()
    z = torch.atanh((q + offset) / half) - torch.atanh(offset / half)
    again, back = vkernels.fsq_quantize(z.float(), levels)
    assert torch.equal(back, ids)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("shape", [(0,), (1,), (4, 3), (2, 5, 7)])
def test_codes_and_ids(backend, shape):
    torch.manual_seed(0)
    z = torch.randn(*shape, 6) * 2
    codes, ids = vkernels.fsq_quantize(z, COSMOS)
    true_codes, true_ids = oracle.fsq_quantize(z, COSMOS)
    assert torch.equal(ids.long(), true_ids)
    assert ids.dtype == torch.int32
    torch.testing.assert_close(codes.double(), true_codes, rtol=0, atol=1e-15)


def test_bf16_codes_are_exact(backend):
    torch.manual_seed(0)
    z = (torch.randn(200, 6) * 2).bfloat16()
    codes, ids = vkernels.fsq_quantize(z, COSMOS)
    wide, wide_ids = vkernels.fsq_quantize(z.float(), COSMOS)
    assert codes.dtype == torch.bfloat16
    assert torch.equal(codes.float(), wide)
    assert torch.equal(ids, wide_ids)


def test_halves_go_to_the_even_level(backend):
    """z = -shift makes y exactly -0.5 where the number of levels is even: that is level 0, not -1."""
    shift = [math.atanh(0.5 / ((L - 1) * 1.001 / 2)) if L % 2 == 0 else 0.0 for L in COSMOS]
    codes, ids = vkernels.fsq_quantize(-torch.tensor([shift]), COSMOS)
    assert codes.abs().tolist() == [[0.0] * 6]
    assert ids.tolist() == [sum((L // 2) * math.prod(COSMOS[:i]) for i, L in enumerate(COSMOS))]


def test_extremes_reach_the_outer_levels(backend):
    z = torch.tensor([[-50.0] * 6, [50.0] * 6, [0.0] * 6])
    codes, ids = vkernels.fsq_quantize(z, COSMOS)
    assert ids.tolist() == [0, 63999, sum((L // 2) * math.prod(COSMOS[:i]) for i, L in enumerate(COSMOS))]
    assert codes[0].tolist() == [-1] * 6
    assert codes[1].tolist() == [0.75] * 3 + [1] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_gradient(backend, dtype):
    torch.manual_seed(0)

    def eager(z):
        half, offset, shift, width = (
            torch.tensor([f(L) for L in COSMOS]).to(dtype)
            for f in (
                lambda L: (L - 1) * 1.001 / 2,
                lambda L: 0.5 * (L % 2 == 0),
                lambda L: math.atanh(0.5 * (L % 2 == 0) / ((L - 1) * 1.001 / 2)),
                lambda L: L // 2,
            )
        )
        y = torch.tanh(z + shift) * half - offset
        return (y + (y.round() - y).detach()) / width

    z = torch.randn(50, 6).to(dtype).float()
    away = (oracle.fsq_quantize(z, COSMOS)[0] - oracle.fsq_quantize(z + 1e-6, COSMOS)[0]).abs().sum(-1) == 0
    judge(
        lambda z: vkernels.fsq_quantize(z, COSMOS)[0],
        eager,
        lambda z: oracle.fsq_quantize(z, COSMOS)[0],
        [z[away]],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_checks(backend, check, dtype):
    if dtype in check.dtypes:
        for finding in check.run(torch.device("cpu"), dtype):
            assert finding.fine, finding


def test_two_levels_are_exact(backend):
    """Their shift is atanh(0.999): from constants in float32 y would be off by 1e-5."""
    z = torch.linspace(-9, 3, 4001).unsqueeze(1)
    z = z[away_from_ties(z, [2])]
    assert torch.equal(vkernels.fsq_quantize(z, [2])[1].long(), oracle.fsq_quantize(z, [2])[1])


def test_compiles_and_checks():
    torch.manual_seed(0)
    z = torch.randn(3, 6)
    compiles(lambda z: vkernels.fsq_quantize(z, COSMOS)[0], z)
    torch.library.opcheck(torch.ops.vkernels.fsq_quantize.default, (z.requires_grad_(), COSMOS))
    torch.library.opcheck(torch.ops.vkernels.fsq_dequantize.default, (torch.arange(5, dtype=torch.int32), COSMOS))


@pytest.mark.parametrize("levels", [[1000], [999]])
def test_as_many_levels_as_the_bound_allows(backend, levels):
    z = torch.tensor([[-torch.inf], [-1e30], [1e30], [torch.inf]])
    codes, ids = vkernels.fsq_quantize(z, levels)
    assert ids.tolist() == [0, 0, levels[0] - 1, levels[0] - 1]
    assert torch.equal(vkernels.fsq_dequantize(ids, levels), codes)


@pytest.mark.parametrize("levels", [[8, 8], [8, 8, 8, 5, 5, 1], [1000] * 6, [8, 8, 8, 5, 5, 1001]])
def test_levels_that_do_not_fit_are_named(levels):
    with pytest.raises(ValueError, match="levels"):
        vkernels.fsq_quantize(torch.zeros(2, 6), levels)
