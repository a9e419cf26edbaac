"""Checks of finite scalar and lookup-free quantisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, error, judge, poisoned

COSMOS = (8, 8, 8, 5, 5, 5)
TIE = 2e-7  # times L: so near to the middle between two levels float32 may round either way


def bounded(z: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """What is rounded, in float64."""
    half = torch.tensor([(L - 1) * (1 + 1e-3) / 2 for L in levels], dtype=torch.float64)
    offset = torch.tensor([0.5 if L % 2 == 0 else 0.0 for L in levels], dtype=torch.float64)
    return torch.tanh(z.double() + torch.atanh(offset / half)) * half - offset


def away_from_ties(z: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """bool[...]: rows of which no channel lies so near to a tie that float32 may round it otherwise than float64."""
    y = bounded(z, levels)
    return ((y - y.floor() - 0.5).abs() > TIE * torch.tensor(levels)).all(-1)


def _quantize(shape: tuple[int, ...], levels: Sequence[int], small: bool = True) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        z = (2 * torch.randn(*shape, len(levels), generator=torch.Generator().manual_seed(0))).to(dtype)
        with poisoned():
            (codes, ids), again = (vkernels.fsq_quantize(z.to(device), levels) for _ in range(2))
        true_codes, true_ids = oracle.fsq_quantize(z, levels)
        sure = away_from_ties(z, levels)
        wrong = (ids.cpu() != true_ids)[sure].sum().item() if z.numel() else 0
        mine = (codes.cpu().double() - true_codes)[sure].abs().max().item() if sure.any() else 0.0
        same = torch.equal(codes, again[0]) and torch.equal(ids, again[1])
        return [
            Finding("ids that differ", wrong, 0),
            Finding("codes", mine, 2.0**-8 if dtype == torch.bfloat16 else 1e-6),
            Finding("again", 0.0 if same else math.inf, 0.0),
            *judge(_slope(vkernels.fsq_quantize, levels), _slope(_eager, levels), _slope(oracle.fsq_quantize, levels),
                   [z[sure]], device, dtype),
        ]  # fmt: skip

    return Check("fsq_quantize", f"{shape} of {tuple(levels)}", run, small=small)


def _slope(op, levels):
    """The codes alone: their gradient is what is left to judge."""
    return lambda z: op(z, levels)[0]


def _eager(z, levels):
    L = torch.tensor(levels, device=z.device)
    half, offset = ((L - 1) * (1 + 1e-3) / 2).to(z.dtype), torch.where(L % 2 == 0, 0.5, 0.0).to(z.dtype)
    y = torch.tanh(z + torch.atanh(offset / half)) * half - offset
    return (y + (y.round() - y).detach()) / (L // 2), None


def _dequantize(n: int, levels: Sequence[int], small: bool = True) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        ids = torch.randint(math.prod(levels), (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
        with poisoned():
            codes = vkernels.fsq_dequantize(ids.to(device), levels)
        return [Finding("codes", error(codes, oracle.fsq_dequantize(ids, levels).float()), 0.0)]

    return Check("fsq_dequantize", f"{n} of {tuple(levels)}", run, dtypes=(torch.float32,), small=small)


def _signs(shape: tuple[int, ...], small: bool = True) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))

        def eager(z, scale):
            codes, ids = oracle.lfq_quantize(z, scale=scale)
            return codes.to(z.dtype), ids

        return judge(vkernels.lfq_quantize, eager, oracle.lfq_quantize, [z], device, dtype, others={"scale": 0.5})

    return Check("lfq_quantize", "x".join(map(str, shape)), run, small=small)


CHECKS = [
    *[_quantize(shape, COSMOS) for shape in [(0,), (1,), (4, 3), (257,)]],
    _quantize((50,), (2,)),
    _quantize((50,), (16, 9)),
    _quantize((50,), (7, 5, 5, 5, 5)),
    _quantize((1 << 18,), COSMOS, small=False),
    _dequantize(0, COSMOS),
    _dequantize(301, COSMOS),
    _dequantize(1 << 20, COSMOS, small=False),
    *[_signs(shape) for shape in [(0, 18), (1, 1), (5, 7, 18), (65, 31)]],
    _signs((1 << 18, 18), small=False),
]
