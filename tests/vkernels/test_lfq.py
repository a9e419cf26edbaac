"""Lookup-free quantisation against its definition over all 2^d codes in float64."""

import math

import pytest
import torch
from op_check import compiles, judge

import vkernels
from vkernels import oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 18), (1, 1), (5, 7, 18), (65, 31)])
def test_codes_and_ids(backend, shape, dtype):
    torch.manual_seed(0)
    z = torch.randn(shape).to(dtype)
    codes, ids = vkernels.lfq_quantize(z, scale=0.5)
    true_codes, true_ids = oracle.lfq_quantize(z, scale=0.5)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), true_ids)
    assert torch.equal(codes.double(), true_codes)
    assert torch.equal(vkernels.lfq_dequantize(ids, shape[-1], scale=0.5), codes.float())


def test_zero_is_no_set_bit_and_nan_is_seen(backend):
    codes, ids = vkernels.lfq_quantize(torch.tensor([[0.0, -0.0, 1e-30], [float("nan"), 1.0, -1.0]]))
    assert ids.tolist() == [4, 2]
    assert codes[0].tolist() == [-1, -1, 1]
    assert codes[1].isnan().tolist() == [True, False, False]


def test_gradient_passes_straight(backend):
    z, dcodes = torch.randn(5, 18, requires_grad=True), torch.randn(5, 18)
    (grad,) = torch.autograd.grad(vkernels.lfq_quantize(z, scale=0.5)[0], z, dcodes)
    assert torch.equal(grad, dcodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), [((9, 6), 1), ((9, 6), 2), ((2, 5, 6), 6), ((30, 5), 5), ((1, 9), 1)])
def test_entropy(shape, groups, dtype):
    """Values and gradients, for tables of 2, 8, 64 and 512 codes."""
    torch.manual_seed(0)
    judge(
        lambda z: vkernels.lfq_entropy(z, groups, 0.7, scale=0.5),
        lambda z: oracle.lfq_entropy(z.float(), groups, 0.7, scale=0.5),
        lambda z: oracle.lfq_entropy(z, groups, 0.7, scale=0.5),
        [torch.randn(shape)],
        dtype,
        {torch.float32: 1e-6, torch.bfloat16: 1e-3},
    )


def test_autocast_does_not_reach_the_probabilities():
    torch.manual_seed(0)
    z = torch.randn(64, 18)
    plain = vkernels.lfq_entropy(z, 2, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        for mine, other in zip(vkernels.lfq_entropy(z, 2, 0.5), plain):
            assert mine.dtype == torch.float32
            assert torch.equal(mine, other)


def test_entropy_at_its_ends():
    """Sure rows have none; sure rows spread over all codes fill the batch's; both gradients stay finite."""
    signs = oracle.lfq_quantize(vkernels.lfq_dequantize(torch.arange(16), 4))[0].float()
    z = (1e4 * signs).requires_grad_()
    sample, batch = vkernels.lfq_entropy(z, 1, 0.01)
    assert (sample == 0).all()
    assert batch.item() == pytest.approx(math.log(16))
    (sample.sum() + batch).backward()
    assert z.grad.isfinite().all()
    sample, batch = vkernels.lfq_entropy(torch.zeros(3, 4), 2, 1.0)
    assert sample.tolist() == pytest.approx([math.log(16)] * 3)
    assert batch.item() == pytest.approx(math.log(16))
    assert vkernels.lfq_entropy(torch.zeros(0, 4), 2, 1.0)[1].item() == 0


def test_entropy_of_18_bits_makes_no_table_of_them():
    z = torch.randn(64, 18, requires_grad=True)
    sample, batch = vkernels.lfq_entropy(z, 2, 1.0)
    assert batch >= sample.mean()
    batch.backward()
    assert z.grad.isfinite().all()


def test_compiles_and_checks():
    z = torch.randn(3, 6)
    compiles(lambda z: vkernels.lfq_quantize(z)[0], z)
    compiles(lambda z: torch.cat([t.flatten() for t in vkernels.lfq_entropy(z, 2, 1.0)]), z)
    torch.library.opcheck(torch.ops.vkernels.lfq_quantize.default, (z.requires_grad_(), 1.0))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"lfq_quantize: z \[2, 32\]; expected 1 to 31 channels"):
        vkernels.lfq_quantize(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="lfq_entropy: 4 groups of 6 channels"):
        vkernels.lfq_entropy(torch.zeros(2, 6), 4, 1.0)
