"""Checks of packed attention: causal, windows, image blocks, any intervals, with and without a list of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, judge
from vkernels.registry import forced, interpreting

# The backward pass takes the softmax's inner product from the rounded output: where a row's gradient nearly cancels (a
# few keys), that costs more than eager's direct form. Whole sequences stay far below.
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 3e-4, torch.float64: 1e-6}


class Case(NamedTuple):
    """mask: causal, window, image (blocks that see all of themselves), both, or any (intervals in no order)."""

    name: str
    of_q: tuple[int, ...]
    of_k: tuple[int, ...] | None = None
    heads: tuple[int, int] = (2, 1)
    D: int = 16
    mask: str = "causal"
    tiles: bool = False
    small: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def lengths_to_cu(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def bounds(case: Case, cu_q: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """kv_lo and kv_hi of the case's mask; windows are a fifth of the longest document, image blocks a third."""
    rows = torch.arange(int(cu_q[-1]), dtype=torch.int32)
    longest = max(case.of_q)
    if case.mask == "any":
        lo = torch.randint(-5, len(rows) + 5, rows.shape, generator=g, dtype=torch.int32)
        return lo, lo + torch.randint(-3, longest, rows.shape, generator=g, dtype=torch.int32)
    lo = rows - longest // 5 if case.mask in ("window", "both") else None
    hi = None
    if case.mask in ("image", "both"):
        hi = rows + 1
        for a, n in zip(cu_q.tolist(), case.of_q):
            hi[a + n // 3 : a + 2 * n // 3] = a + 2 * n // 3
    return lo, hi


def dense(q, k, v, cu_q, cu_k, kv_lo, kv_hi):
    """What one writes first in plain torch: a mask and a softmax per document, in the inputs' dtype."""
    out = []
    group = q.shape[1] // k.shape[1]
    for s in range(cu_q.numel() - 1):
        a, b, c, d = (int(x) for x in (cu_q[s], cu_q[s + 1], cu_k[s], cu_k[s + 1]))
        rows, keys = torch.arange(a, b, device=q.device), torch.arange(c, d, device=q.device)
        lo = torch.full_like(rows, c) if kv_lo is None else kv_lo[a:b]
        hi = rows + 1 + d - b if kv_hi is None else kv_hi[a:b]
        hidden = (keys < lo[:, None]) | (keys >= hi[:, None])
        K, V = (x[c:d].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[a:b], K) / math.sqrt(q.shape[2])
        p = scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)
        out.append(torch.einsum("hij,jhd->ihd", p, V))
    return torch.cat([*out, q[:0] * 0 + v.sum() * 0 + k.sum() * 0])


def truth(q, k, v, cu_q, cu_k, kv_lo, kv_hi):
    return oracle.varlen_attention(q, k, v, cu_q, cu_k, kv_lo=kv_lo, kv_hi=kv_hi)[0]


def repeatable(device: torch.device) -> bool:
    """Whether a second run must give the same bits: libraries add with atomics. The interpreter has one order."""
    return not interpreting() and (device.type == "cpu" or forced("varlen_attention") in ("triton", "torch"))


def check(case: Case) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(0)
        of_k = case.of_q if case.of_k is None else case.of_k
        cu_q, cu_k = lengths_to_cu(case.of_q), lengths_to_cu(of_k)
        kv_lo, kv_hi = bounds(case, cu_q, g)
        Hq, Hk = case.heads
        inputs = [torch.randn(sum(n), h, case.D, generator=g) for n, h in ((case.of_q, Hq), (of_k, Hk), (of_k, Hk))]
        tiles = vkernels.attention_tiles(cu_q, cu_k, kv_lo=kv_lo, kv_hi=kv_hi).to(device) if case.tiles else None

        def ours(q, k, v, cu_q, cu_k, kv_lo, kv_hi):
            cu_k = None if case.of_k is None else cu_k
            longest = max(case.of_q), max(of_k)
            return vkernels.varlen_attention(q, k, v, cu_q, cu_k, *longest, kv_lo=kv_lo, kv_hi=kv_hi, tiles=tiles)

        # Row by row, a large case would take hours; small ones hold the dense form against the rows.
        return judge(ours, dense, truth if case.small else dense, inputs, device, dtype,
                     others={"cu_q": cu_q, "cu_k": cu_k, "kv_lo": kv_lo, "kv_hi": kv_hi}, floor=FLOOR[dtype],
                     repeat=repeatable(device))  # fmt: skip

    return Check("varlen_attention", case.name, run, dtypes=case.dtypes, small=case.small)


HALF = (torch.bfloat16, torch.float16)
MIXED = (1500, 1, 640, 0, 1907)
CASES = [
    Case("two rows", (2,), D=5),
    Case("short documents", (7, 1, 0, 13), heads=(2, 2), D=32, tiles=True),
    Case("two tiles", (150, 3)),
    Case("more keys than queries", (5, 0, 40), (9, 4, 140), heads=(4, 2), D=20, tiles=True),
    Case("fewer keys than queries", (40, 2, 4), (3, 2, 0), D=8),
    Case("no queries", (0,), (5,)),
    Case("windows", (140, 30), D=24, mask="window", tiles=True),
    Case("image blocks", (140, 1, 30), heads=(3, 1), mask="image"),
    Case("windows and image blocks", (33, 120), D=80, mask="both"),
    Case("any intervals", (60, 0, 70, 1), mask="any", tiles=True),
    Case("8k causal", (4096, 4096), heads=(2, 1), D=128, small=False, dtypes=HALF),
    Case("mixed lengths, D 64", MIXED, heads=(4, 2), D=64, small=False, tiles=True, dtypes=(*HALF, torch.float32)),
    Case("mixed lengths, D 128", MIXED, heads=(4, 2), D=128, small=False, dtypes=(*HALF, torch.float32)),
    Case("mixed lengths, D 80", MIXED, heads=(2, 2), D=80, small=False),
    Case("mixed lengths, D 96", MIXED, heads=(2, 2), D=96, small=False),
    Case("mixed lengths, D 256", MIXED, heads=(2, 1), D=256, small=False, dtypes=HALF),
    Case("image blocks, D 64", MIXED, heads=(4, 2), D=64, mask="image", small=False, tiles=True),
    Case("image blocks and windows, D 128", MIXED, heads=(4, 2), D=128, mask="both", small=False, tiles=True),
    Case("any intervals, D 128", MIXED, heads=(2, 1), D=128, mask="any", small=False),
    Case("queries behind keys", (130, 1, 700), (1130, 900, 700), heads=(4, 2), D=128, small=False),
    Case("many short documents", (17,) * 200, heads=(4, 2), D=64, small=False, tiles=True),
]
CHECKS = [check(case) for case in CASES]
