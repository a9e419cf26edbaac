"""What the symmetric product compiles to."""

import pytest
import torch
from sm90 import check, meta
from triton.runtime.jit import JITFunction

from vkernels.jit.newton_schulz import symmetric_product


def products(batch, m, n, dtype=torch.bfloat16):
    def launch():
        x = meta(batch, m, n, dtype=dtype)
        gram = symmetric_product(x, 1.0, None, 0.0)
        symmetric_product(gram, 2.0, gram, -4.0)

    return launch


def test_newton_schulz():
    check("newton_schulz", {"2048 x 8192": products(4, 2048, 8192), "512 x 2048": products(8, 512, 2048)})


@pytest.mark.slow
def test_float32():
    check("newton_schulz", {"float32": products(4, 2048, 8192, torch.float32)})


def test_more_matrices_than_the_other_axes_of_a_grid_take(monkeypatch):
    grids = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, **options: grids.append(grid))
    symmetric_product(meta(70000, 100, 3), 1.0, None, 0.0)
    assert grids == [(3 * 70000,)]
