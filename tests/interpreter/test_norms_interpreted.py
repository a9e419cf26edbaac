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
    assert torch.autograd.gradcheck(vkernels.rms_norm, (torch.randn(9, 5, **d), torch.randn(5, **d)))
