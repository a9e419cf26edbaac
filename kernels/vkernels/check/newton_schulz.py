"""Checks of newton_schulz."""

from __future__ import annotations

import torch

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, judge
from vkernels.newton_schulz import MUON


def _eager(dtype: torch.dtype):
    def iterate(g: torch.Tensor) -> torch.Tensor:
        a, b, c = MUON
        x = g.to(dtype)
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.to(g.dtype)

    return iterate


def _check(shape: tuple[int, ...], small: bool = True) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return judge(lambda g: vkernels.newton_schulz(g, dtype=dtype), _eager(dtype), oracle.newton_schulz,
                         [g], device, dtype)  # fmt: skip

    return Check("newton_schulz", "x".join(map(str, shape)), run, small=small)


SHAPES = [(1, 1), (7, 33), (3, 65, 17), (2, 2, 40, 40), (0, 4), (130, 70)]
LARGE = [(1024, 4096), (4, 2048, 2048), (5000, 640)]
CHECKS = [*[_check(s) for s in SHAPES], *[_check(s, small=False) for s in LARGE]]
