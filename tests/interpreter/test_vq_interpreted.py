"""The Triton kernels of vector quantisation."""

import pytest
import torch

import vkernels
from vkernels.check.vq import CHECKS, nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(check, dtype):
    if dtype in check.dtypes:
        for finding in check.run(torch.device("cpu"), dtype):
            assert finding.fine, finding


def test_mixed_dtypes():
    torch.manual_seed(0)
    x, codebook = torch.randn(50, 12), torch.randn(200, 12)
    assert torch.equal(vkernels.vq_nearest(x.bfloat16(), codebook).long(), nearest(x.bfloat16(), codebook))
    assert torch.equal(vkernels.vq_nearest(x, codebook.half()).long(), nearest(x, codebook.half()))
    assert torch.equal(vkernels.vq_nearest(x.double(), codebook.double()).long(), nearest(x, codebook))


def test_strided_rows():
    torch.manual_seed(0)
    x, codebook = torch.randn(40, 30)[:, 4:16], torch.randn(12, 90).T
    assert torch.equal(vkernels.vq_nearest(x, codebook).long(), nearest(x, codebook))


def test_codes_that_score_alike_everywhere():
    """All codes the same, all zero, or all as far: the lowest, also across tiles and programs."""
    x = torch.randn(3, 8)
    assert (vkernels.vq_nearest(x, torch.zeros(600, 8)) == 0).all()
    assert (vkernels.vq_nearest(torch.zeros(2, 8), torch.eye(8).repeat(600, 1)) == 0).all()
    last = torch.zeros(4500, 8)
    last[4200] = last[4336] = last[4499] = x[0]
    assert vkernels.vq_nearest(x[:1], last).item() == 4200


def test_rows_that_are_not_finite_get_a_code():
    x = torch.randn(4, 8)
    x[1, 3], x[2, 0], x[3] = float("nan"), float("inf"), 3e38
    ids = vkernels.vq_nearest(x, torch.randn(300, 8))
    assert ((ids >= 0) & (ids < 300)).all()
    assert torch.equal(vkernels.vq_nearest(x[:1], torch.full((3, 8), float("nan"))), torch.zeros(1, dtype=torch.int32))


def test_commitment_gradient():
    torch.manual_seed(0)
    x, codebook = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    ids = torch.tensor([0, 3, 1, 1, -1, 4, 2])
    assert torch.autograd.gradcheck(lambda x: vkernels.vq_straight_through(x, codebook, ids, beta=0.3)[1], x)
    codes = vkernels.vq_straight_through(x, codebook, ids)[0]
    (grad,) = torch.autograd.grad(codes, x, torch.ones_like(codes))
    assert torch.equal(grad, torch.ones_like(x))
    assert torch.equal(codes[4:6], torch.zeros(2, 5, dtype=torch.float64))


def test_strided_gradients():
    torch.manual_seed(0)
    x, codebook, ids = torch.randn(9, 6, requires_grad=True), torch.randn(4, 6), torch.randint(4, (9,))
    dcodes, dcommitment = torch.randn(6, 9).T, torch.randn(18)[::2]
    codes, commitment = vkernels.vq_straight_through(x, codebook, ids)
    (strided,) = torch.autograd.grad([codes, commitment], x, [dcodes, dcommitment], retain_graph=True)
    (dense,) = torch.autograd.grad([codes, commitment], x, [dcodes.contiguous(), dcommitment.contiguous()])
    assert torch.equal(strided, dense)


def test_a_codebook_that_moves_after_it_was_read_is_noticed():
    """A kernel writes behind autograd's back: the op must tell it."""
    x, codebook = torch.ones(3, 2, requires_grad=True), torch.ones(4, 2)
    state = [torch.ones(4), torch.ones(4, 2), codebook]
    for move in (
        lambda: vkernels.vq_ema_update(*state, torch.ones(4), torch.ones(4, 2), 0.9, 1e-5),
        lambda: vkernels.vq_reset_codes(*state, torch.ones(4, dtype=torch.bool), torch.ones(4, 2)),
    ):
        product = x @ codebook.T
        move()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_rows_that_are_left_out():
    ids = torch.tensor([0, 3, -1, 7, 2])
    counts, sums = vkernels.vq_code_sums(torch.ones(5, 2), ids, 3)
    assert counts.tolist() == [1, 0, 1]
    assert sums.tolist() == [[1, 1], [0, 0], [1, 1]]
    x = torch.ones(5, 2)
    x[1], x[2, 0], x[3, 1] = torch.inf, torch.nan, -torch.inf
    x.requires_grad_()
    codes, commitment = vkernels.vq_straight_through(x, torch.zeros(3, 2), ids)
    (codes.sum() + commitment.sum()).backward()
    assert x.grad.tolist() == [[2, 2], [1, 1], [1, 1], [1, 1], [2, 2]]
