"""Checks of the norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, judge


def _rms_norm(shape: tuple[int, ...]) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(0)
        inputs = [3 * torch.randn(shape, generator=g), torch.randn(shape[-1], generator=g)]
        return judge(vkernels.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), oracle.rms_norm,
                     inputs, device, dtype)  # fmt: skip

    return Check("rms_norm", "x".join(map(str, shape)), run, small=torch.Size(shape).numel() < 1 << 15)


CHECKS = [_rms_norm(s) for s in [(1, 2), (7, 64), (3, 5, 17), (257, 31), (2, 1, 128), (0, 8), (600, 2048), (65, 8192)]]
