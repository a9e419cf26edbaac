"""newton_schulz against float64, eager torch and the singular value decomposition."""

import pytest
import torch

import vkernels
from vkernels.check.newton_schulz import CHECKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(backend, check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_go_to_one_and_vectors_stay(shape, scale):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    g = u @ torch.diag(torch.linspace(0.1, 1.0, 32 if 32 in shape else 48)) @ vh * scale
    x = vkernels.newton_schulz(g)
    assert x.dtype == g.dtype
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.66, values
    assert values.max() < 1.22, values
    alignment = torch.linalg.vector_norm(torch.diag(u.T @ x @ vh.T))
    assert alignment > 0.999 * torch.linalg.vector_norm(x)  # still diagonal in the same vectors


def test_batches_and_views_are_what_their_matrices_are():
    torch.manual_seed(0)
    g = torch.randn(2, 3, 24, 40)
    one_by_one = torch.stack([vkernels.newton_schulz(x, dtype=torch.float32) for x in g.flatten(0, 1)]).view(g.shape)
    torch.testing.assert_close(vkernels.newton_schulz(g, dtype=torch.float32), one_by_one, rtol=1e-5, atol=1e-5)
    transposed = vkernels.newton_schulz(g.mT, dtype=torch.float32)
    assert transposed.is_contiguous()
    torch.testing.assert_close(transposed.mT, one_by_one, rtol=1e-5, atol=1e-5)


def test_zeros_and_no_steps():
    assert not vkernels.newton_schulz(torch.zeros(4, 6)).any()
    g = torch.randn(4, 6)
    torch.testing.assert_close(vkernels.newton_schulz(g, 0, dtype=torch.float32), g / g.norm())
    assert vkernels.newton_schulz(torch.zeros(0, 5)).shape == (0, 5)


def test_autocast_does_not_reach_the_products():
    torch.manual_seed(0)
    g = torch.randn(20, 30)
    plain = vkernels.newton_schulz(g, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vkernels.newton_schulz(g, dtype=torch.float32), plain)


def test_errors():
    with pytest.raises(ValueError, match=r"newton_schulz: g is torch.int64 \[3, 3\], expected a floating-point tensor"):
        vkernels.newton_schulz(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"newton_schulz: g is \[3\], expected \[..., m, n\]"):
        vkernels.newton_schulz(torch.ones(3))


def test_compiles_and_checks():
    torch.manual_seed(0)
    g = torch.randn(6, 9)
    compiled = torch.compile(lambda g: vkernels.newton_schulz(g) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(g), vkernels.newton_schulz(g) * 2)
    args = (g, 2, 3.0, -4.0, 2.0, 1e-7, torch.bfloat16)
    torch.library.opcheck(torch.ops.vkernels.newton_schulz.default, args)
