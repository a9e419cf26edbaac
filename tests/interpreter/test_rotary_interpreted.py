"""The Triton kernels of the rotary embedding."""

import pytest
import torch

import vkernels
from vkernels.check.rotary import CHECKS
from vkernels.jit.rotary import _share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


def test_gradients():
    torch.manual_seed(0)
    d = {"dtype": torch.float64, "requires_grad": True}
    cos, sin = (t.double() for t in vkernels.rope_tables(torch.arange(2), 4))
    args = torch.randn(2, 2, 4, **d), torch.randn(2, 1, 4, **d), torch.randn(4, **d), torch.randn(4, **d)
    assert torch.autograd.gradcheck(lambda q, k: vkernels.rope(q, k, cos, sin), args[:2], fast_mode=True)
    assert torch.autograd.gradcheck(lambda *a: vkernels.qk_norm_rope(*a, cos, sin), args, fast_mode=True)


def test_few_programs_share_the_rows():
    for q_tiles, k_tiles, programs in [(0, 0, 8), (5, 3, 8), (5, 3, 9), (900, 100, 8), (1, 999, 8), (999, 1, 2)]:
        shares = _share(q_tiles, k_tiles, programs)
        assert sum(shares) <= programs
        for share, tiles in zip(shares, (q_tiles, k_tiles)):
            assert share <= tiles
            assert (share > 0) == (tiles > 0)
