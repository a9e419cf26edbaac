"""The Triton kernel of the symmetric product."""

import pytest
import torch

from vkernels.check.newton_schulz import CHECKS
from vkernels.jit.newton_schulz import symmetric_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


@pytest.mark.parametrize("m", [1, 64, 65, 300])
def test_symmetric_product(m):
    """Every tile of the triangle, its mirror image, and both ends that do not fill a tile."""
    torch.manual_seed(0)
    x, plus = torch.randn(2, m, 37, dtype=torch.float64), torch.randn(2, m, m, dtype=torch.float64)
    plus = plus + plus.mT
    out = symmetric_product(x, 0.5, plus, -2.0)
    torch.testing.assert_close(out, 0.5 * x @ x.mT - 2 * plus, rtol=1e-12, atol=1e-12)
    assert torch.equal(out, out.mT)
