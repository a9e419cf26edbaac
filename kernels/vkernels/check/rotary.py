"""Checks of the rotary embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, judge

SHAPES = [  # T, Hq, Hk, D
    (1, 1, 1, 2), (7, 4, 2, 32), (401, 3, 1, 10), (5, 7, 1, 80), (33, 2, 2, 96), (0, 2, 1, 8), (70, 6, 2, 64),
    (3000, 16, 8, 128), (4097, 28, 4, 128), (900, 8, 4, 256),
]  # fmt: skip


def _small(T: int, Hq: int, Hk: int, D: int) -> bool:
    return T * (Hq + Hk) * D < 1 << 16


def _rotate(x, cos, sin):
    cos, sin = (torch.cat([t, t], -1).unsqueeze(1) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def _rope(q, k, cos, sin):
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _norm_rope(q, k, q_weight, k_weight, cos, sin):
    q, k = (F.rms_norm(x, w.shape, w, 1e-6) for x, w in ((q, q_weight), (k, k_weight)))
    return _rope(q, k, cos, sin)


def _tables(T: int, D: int, g: torch.Generator) -> dict[str, torch.Tensor]:
    cos, sin = vkernels.rope_tables(torch.randint(200_000, (T,), generator=g), D)
    return {"cos": cos, "sin": sin}


def _check(op: str, shape: tuple[int, ...]) -> Check:
    T, Hq, Hk, D = shape

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(0)
        inputs = [torch.randn(T, Hq, D, generator=g), torch.randn(T, Hk, D, generator=g)]
        if op == "qk_norm_rope":
            inputs += [torch.randn(D, generator=g), torch.randn(D, generator=g)]
        eager = _norm_rope if op == "qk_norm_rope" else _rope
        return judge(getattr(vkernels, op), eager, getattr(oracle, op), inputs, device, dtype, others=_tables(T, D, g))

    return Check(op, "T{} Hq{} Hk{} D{}".format(*shape), run, small=_small(*shape))


def _merged(op: str, shape: tuple[int, ...]) -> Check:
    """q and k as slices of a projection that holds v too; gradients come back in slices of one tensor as well."""
    T, Hq, Hk, D = shape

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(0)
        inputs = [torch.randn(T, (Hq + 2 * Hk) * D, generator=g)]
        if op == "qk_norm_rope":
            inputs += [torch.randn(D, generator=g), torch.randn(D, generator=g)]

        def merged(f):
            def call(qkv, *weights, cos, sin):
                q, k, _ = qkv.view(T, -1, D).split((Hq, Hk, Hk), 1)
                return torch.cat(f(q, k, *weights, cos, sin), 1)

            return call

        eager = _norm_rope if op == "qk_norm_rope" else _rope
        return judge(*map(merged, (getattr(vkernels, op), eager, getattr(oracle, op))), inputs, device, dtype,
                     others=_tables(T, D, g))  # fmt: skip

    return Check(op, "T{} Hq{} Hk{} D{} merged".format(*shape), run, small=_small(*shape))


CHECKS = [
    *(_check(op, shape) for op in ("rope", "qk_norm_rope") for shape in SHAPES),
    *(_merged(op, shape) for op in ("rope", "qk_norm_rope") for shape in [(13, 4, 2, 32), (3001, 16, 8, 128)]),
]
