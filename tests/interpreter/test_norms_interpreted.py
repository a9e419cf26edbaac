"""The Triton kernels of the norms."""

import pytest
import torch

import vkernels
from vkernels.check.norms import CHECKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


def test_gradients():
    torch.manual_seed(0)
    d = {"dtype": torch.float64, "requires_grad": True}
    x, residual, w, b = torch.randn(4, 3, **d), torch.randn(4, 3, **d), torch.randn(3, **d), torch.randn(3, **d)
    assert torch.autograd.gradcheck(vkernels.rms_norm, (x, w))
    assert torch.autograd.gradcheck(vkernels.add_rms_norm, (x, residual, w))
    assert torch.autograd.gradcheck(vkernels.layer_norm, (x, w, b))


def test_either_output_alone_has_gradients():
    torch.manual_seed(0)
    inputs = [t.requires_grad_() for t in (torch.randn(4, 30), torch.randn(4, 30), torch.randn(30))]
    y, stream = vkernels.add_rms_norm(*inputs)
    dy, dstream = torch.randn(4, 30), torch.randn(4, 30)
    both = torch.autograd.grad([y, stream], inputs, [dy, dstream], retain_graph=True)
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    second = torch.autograd.grad(stream, inputs, dstream)
    for b, f, s in zip(both, first, second):
        torch.testing.assert_close(b, f + s)


def test_a_mean_far_from_zero_costs_no_digits():
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 64) + 3000, torch.ones(64), torch.zeros(64)
    truth = torch.nn.functional.layer_norm(x.double(), (64,))
    torch.testing.assert_close(vkernels.layer_norm(x, w, b).double(), truth, atol=1e-3, rtol=0)  # x has steps of 2e-4


def test_rows_that_fit_no_tile_are_refused():
    x = torch.ones(1, 8193)
    with pytest.raises(ValueError, match="cannot run: rows of 8193 elements, it takes up to 8192"):
        vkernels.rms_norm(x, x[0])
    vkernels.force("rms_norm", None)
    torch.testing.assert_close(vkernels.rms_norm(x, x[0]), x)


def test_only_the_sum_of_the_stream_is_rounded():
    """What is normed is the stream as stored: the backward pass, which sees no other, then fits the forward pass."""
    torch.manual_seed(0)
    x, residual, w = torch.randn(3, 40), 100 * torch.randn(3, 40), torch.ones(40)
    x, residual = x.bfloat16(), residual.bfloat16()
    y, stream = vkernels.add_rms_norm(x, residual, w)
    assert torch.equal(stream, x + residual)
    assert torch.equal(y, vkernels.rms_norm(stream, w))
