"""Checks of the activations."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, judge

SHAPES = [(1, 1), (7, 64), (3, 5, 17), (257, 31), (0, 8), (5, 1100), (400, 6144), (3, 100003)]

# name -> (op, ours, eager torch, oracle), each of (gate, up)
GATED = {
    "swiglu": ("swiglu", vkernels.swiglu, lambda g, u: F.silu(g) * u, oracle.swiglu),
    "geglu": ("geglu", vkernels.geglu, lambda g, u: F.gelu(g) * u, oracle.geglu),
    "geglu tanh": ("geglu", partial(vkernels.geglu, approximate="tanh"),
                   lambda g, u: F.gelu(g, approximate="tanh") * u, partial(oracle.geglu, approximate="tanh")),
}  # fmt: skip


def _inputs(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [3 * torch.randn(shape, generator=g) for shape in shapes]


def _gated(name: str, shape: tuple[int, ...]) -> Check:
    op, ours, eager, truth = GATED[name]

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        return judge(ours, eager, truth, _inputs(shape, shape), device, dtype)

    label = "x".join(map(str, shape)) + name.removeprefix(op)
    return Check(op, label, run, small=torch.Size(shape).numel() < 1 << 15)


def _merged(name: str, halves: bool) -> Check:
    """gate and up in one tensor, handed over as it is or as its halves."""
    op, ours, eager, truth = GATED[name]

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        split = [lambda x, f=f: f(*x.chunk(2, -1)) for f in (ours, eager, truth)]
        return judge(split[0] if halves else ours, *split[1:], _inputs((9, 4, 96)), device, dtype)

    return Check(op, f"{'halves' if halves else 'merged'}{name.removeprefix(op)}", run)


def _quick_gelu(shape: tuple[int, ...]) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        return judge(vkernels.quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), oracle.quick_gelu,
                     _inputs(shape), device, dtype)  # fmt: skip

    return Check("quick_gelu", "x".join(map(str, shape)), run, small=torch.Size(shape).numel() < 1 << 15)


CHECKS = [
    *(_gated(name, shape) for name in GATED for shape in SHAPES),
    *(_merged(name, halves) for name in GATED for halves in (False, True)),
    *(_quick_gelu(shape) for shape in SHAPES),
]
