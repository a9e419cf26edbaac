"""Checks of sampling: the id must be the one that the row's random number picks from the exact distribution."""

from __future__ import annotations

import math

import torch

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, poisoned

# How far float32 scores may move the edges between tokens: scores up to about 40 carry 24 bits.
EDGES = 1e-5


def _sample(rows: int, columns: int, small: bool = True, **setting) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(columns)
        logits, uncond = (3 * torch.randn(2, rows, columns, generator=g)).to(dtype)
        options = {"uncond": uncond, "seen": torch.rand(rows, columns, generator=g) < 0.2, **setting}
        there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        draw = {"seed": 2**63 + columns, "step": 3, "return_logprob": True, **there}
        with poisoned():
            ids, logprob = (x.cpu() for x in vkernels.sample_logits(logits.to(device), **draw))
            again = vkernels.sample_logits(logits.to(device), **draw)[0].cpu()
            with vkernels.force("sample_logits", "torch"):
                plain = vkernels.sample_logits(logits.to(device), **draw)[0].cpu()
        p = oracle.sample_distribution(logits, **options)
        upper = p.cumsum(1).gather(1, ids[:, None])[:, 0]
        own = p.gather(1, ids[:, None])[:, 0]
        u = torch.tensor([_uniform(draw["seed"], draw["step"], r) for r in range(rows)], dtype=torch.float64)
        outside = torch.maximum(upper - own - u, u - upper).clamp_min(0)
        return [
            Finding("draw", _highest(outside), EDGES),
            Finding("log-probability", _highest((logprob - own.log()).abs()), 1e-4),
            Finding("again", float((ids != again).sum()), 0.0),
            Finding("against the torch backend", float((ids != plain).sum()), 0.0),
        ]

    name = " ".join([f"{rows}x{columns}", *(f"{k} {v}" for k, v in setting.items())])
    return Check("sample_logits", name, run, small=small)


def _highest(x: torch.Tensor) -> float:
    e = x.max().item() if x.numel() else 0.0
    return e if e == e else math.inf


def _uniform(seed: int, step: int, key: int) -> float:
    words = [word >> shift & 0xFFFFFFFF for word in (step, key, seed) for shift in (0, 32)]
    r0, r1, *_ = oracle.philox(words[:4], words[4:])
    return (r1 * 2**32 + r0) / 2**64


CHECKS = [
    _sample(3, 1),
    _sample(0, 7),
    _sample(4, 31, top_k=5),
    _sample(9, 257, guidance=2.5, temperature=0.8, top_k=40, top_p=0.9),
    _sample(5, 1000, guidance=6.0, penalty=1.1, top_p=0.5, lo=77, hi=990),
    _sample(5, 1023, guidance=3.0, penalty=1.3, temperature=0.0),
    _sample(16, 64000, small=False, guidance=6.0, top_k=64000),
    _sample(3, 151936, small=False, top_k=50, top_p=0.95, temperature=0.7),
    _sample(2, 300000, small=False, guidance=4.0, top_p=0.99),
]
