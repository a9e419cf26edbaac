"""Checks of decode attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, judge


def _ours(q, k, v, k_cache, v_cache, *, length, start):
    """The op as a function: what it writes into the caches is an output."""
    caches = k_cache.detach().clone(), v_cache.detach().clone()
    with torch.no_grad():
        return vkernels.decode_attention(q, k, v, *caches, length, start=start), *caches


@torch.no_grad()
def _eager(q, k, v, k_cache, v_cache, *, length, start):
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    B, L, Hk, _ = k_cache.shape
    rows, at = torch.arange(B, device=q.device), length.long().expand(B)
    k_cache[rows, at], v_cache[rows, at] = k, v
    column = torch.arange(L, device=q.device)
    visible = (column <= at[:, None]) & (column >= (0 if start is None else start[:, None]))
    keys, values = (c.transpose(1, 2).repeat_interleave(q.shape[1] // Hk, 1) for c in (k_cache, v_cache))
    return (
        F.scaled_dot_product_attention(q[:, :, None], keys, values, visible[:, None, None])[:, :, 0],
        k_cache,
        v_cache,
    )


@torch.no_grad()
def _oracle(*inputs, length, start):
    return oracle.decode_attention(*inputs, length, start)


def _decode(B: int, Hq: int, Hk: int, D: int, L: int, lengths: str, small: bool = True) -> Check:
    """lengths: "each" row has its own, and its own first column; "one" for all, a scalar, and no first column."""

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(0)
        length = torch.randint(0, L, (B,) if lengths == "each" else (), generator=g, dtype=torch.int32)
        start = (length * torch.rand(B, generator=g)).int() if lengths == "each" else None
        shapes = [(B, Hq, D), (B, Hk, D), (B, Hk, D), (B, L, Hk, D), (B, L, Hk, D)]
        inputs = [torch.randn(s, generator=g) for s in shapes]
        return judge(_ours, _eager, _oracle, inputs, device, dtype, others={"length": length, "start": start})

    return Check("decode_attention", f"B{B} H{Hq}:{Hk} D{D} L{L} {lengths}", run, small=small)


CHECKS = [
    _decode(1, 1, 1, 16, 1, "one"),
    _decode(3, 6, 2, 8, 5, "each"),
    _decode(2, 7, 1, 80, 131, "each"),
    _decode(5, 4, 4, 64, 200, "one"),
    _decode(0, 2, 1, 16, 4, "one"),
    _decode(2, 40, 2, 32, 600, "each"),
    _decode(1, 16, 8, 128, 5000, "one", small=False),
    _decode(33, 28, 4, 128, 1025, "each", small=False),
    _decode(7, 12, 12, 64, 4096, "each", small=False),
    _decode(4, 16, 2, 256, 777, "each", small=False),
]
