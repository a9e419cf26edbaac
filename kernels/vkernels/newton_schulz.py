"""The Newton-Schulz iteration that makes an update nearly orthogonal, as Muon needs it.

Method and coefficients: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vkernels.arguments import require_floats
from vkernels.registry import Backend, accumulate_dtype, anywhere, define, jit

MUON = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def newton_schulz(
    g: torch.Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = MUON,
    *,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """g[..., m, n] -> [..., m, n] of g's dtype with the same singular vectors, and singular values near 1.

    x = g / (|g| + eps), then `steps` times x = a x + (b A + c A A) x with A = x x^T, of the shorter side. Matrices of
    one shape go together as a batch. dtype: of the products, which accumulate in float32. Not differentiable.
    Five steps of the default coefficients bring singular values of 0.002 |g| and more into [0.68, 1.21].
    """
    require_floats("newton_schulz", g=g)
    if g.dim() < 2:
        raise ValueError(f"newton_schulz: g is {list(g.shape)}, expected [..., m, n]")
    if steps < 0 or len(coefficients) != 3 or not dtype.is_floating_point:
        found = f"steps {steps}, coefficients {coefficients}, dtype {dtype}"
        raise ValueError(f"newton_schulz: {found}; expected steps >= 0, three coefficients, a float dtype")
    return _op(g, steps, *map(float, coefficients), eps, dtype)


def iterate(product: Callable, g, steps, a, b, c, eps, dtype) -> torch.Tensor:
    """product(x[B, m, n], alpha, plus[B, m, m] | None, beta) -> alpha x x^T + beta plus, contiguous, of x's dtype."""
    if not g.numel():
        return g.new_empty(g.shape)
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).reshape(-1, min(g.shape[-2:]), max(g.shape[-2:]))
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=accumulate_dtype(g.dtype))
    x = (x / (norm + eps)).to(dtype).contiguous()
    for _ in range(steps):
        gram = product(x, 1.0, None, 0.0)
        x = torch.baddbmm(x, product(gram, c, gram, b), x, beta=a)
    x = x.view(*g.shape[:-2], *x.shape[1:]).to(g.dtype)
    return (x.mT if tall else x).contiguous()


def _product(x, alpha, plus, beta):
    if plus is None:
        return torch.bmm(x, x.mT)  # alpha is 1
    return torch.baddbmm(plus, x, x.mT, alpha=alpha, beta=beta)


_op = define(
    "newton_schulz",
    "(Tensor g, int steps, float a, float b, float c, float eps, ScalarType dtype) -> Tensor",
    fake=lambda g, *rest: g.new_empty(g.shape),
    triton=jit("newton_schulz", "newton_schulz"),
    torch=Backend(lambda *args: iterate(_product, *args), None, anywhere),
)
