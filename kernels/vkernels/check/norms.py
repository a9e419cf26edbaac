"""Checks of the norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, judge

SHAPES = [(1, 3), (7, 64), (3, 5, 17), (1103, 20), (2, 1, 128), (0, 8), (600, 2048), (65, 8192), (33, 9000)]


def _add_rms_norm(x, residual, weight):
    stream = x + residual
    return F.rms_norm(stream, weight.shape, weight, 1e-6), stream


# op -> (how many inputs have x's shape, how many have one row's, eager torch)
OPS = {
    "rms_norm": (1, 1, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)),
    "add_rms_norm": (2, 1, _add_rms_norm),
    "layer_norm": (1, 2, lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5)),
}


def _check(op: str, shape: tuple[int, ...]) -> Check:
    rows, parameters, eager = OPS[op]

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(0)
        inputs = [3 * torch.randn(shape, generator=g) + 1 for _ in range(rows)]
        inputs += [torch.randn(shape[-1], generator=g) for _ in range(parameters)]
        return judge(getattr(vkernels, op), eager, getattr(oracle, op), inputs, device, dtype)

    return Check(op, "x".join(map(str, shape)), run, small=torch.Size(shape).numel() < 1 << 15)


def _every_other_row(op: str) -> Check:
    """Rows that are apart, of the inputs and of the gradients that come back."""
    rows, parameters, eager = OPS[op]

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(0)
        inputs = [torch.randn(26, 40, generator=g) for _ in range(rows)]
        inputs += [torch.randn(32, generator=g) for _ in range(parameters)]

        def strided(f):
            def call(*args):
                out = f(*(a[::2, :32] for a in args[:rows]), *args[rows:])
                return out[0].T.flatten() if isinstance(out, tuple) else out.T.flatten()

            return call

        return judge(*map(strided, (getattr(vkernels, op), eager, getattr(oracle, op))), inputs, device, dtype)

    return Check(op, "strided", run)


CHECKS = [_check(op, shape) for op in OPS for shape in SHAPES] + [_every_other_row(op) for op in OPS]
