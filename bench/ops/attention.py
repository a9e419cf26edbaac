"""Packed attention: documents of 8k tokens, of about 2k, and image blocks that see all of themselves."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cases import Cost, Judged, On, Problem, case

import vkernels

WIDE = {"T": 32768, "Hq": 16, "Hk": 8, "D": 128}
NARROW = {"T": 32768, "Hq": 32, "Hk": 8, "D": 64}
TOY = {"T": 1024, "Hq": 4, "Hk": 2, "D": 64}
SLIM = {**TOY, "D": 32}


class Documents(NamedTuple):
    """cu_seqlens, and for image blocks the end of what each row sees (None = causal)."""

    cu: np.ndarray
    hi: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.cu)

    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        if self.hi is None:
            return int((self.lengths * (self.lengths + 1) // 2).sum())
        return int((self.hi - np.repeat(self.cu[:-1], self.lengths)).sum())


def laid(lengths: np.ndarray, T: int) -> np.ndarray:
    """cu_seqlens of documents end to end, the last one cut at T."""
    cu = np.minimum(np.concatenate([[0], np.cumsum(lengths)]), T)
    return cu[: int(np.searchsorted(cu, T)) + 1]


def documents(kind: str, T: int) -> Documents:
    """T tokens of documents of T/4, of lognormal lengths around T/16, or of captions and images of 1/8 of T/16."""
    random = np.random.default_rng(7)
    mean = T // 16
    if kind == "even":
        return Documents(np.arange(0, T + 1, T // 4))
    if kind == "mixed":
        lengths = np.clip(random.lognormal(np.log(mean) - 0.32, 0.8, 99), 16, T // 4)
        return Documents(laid(lengths.astype(np.int64), T))
    image, caption = mean // 8, max(mean // 32, 1)
    cu = laid(np.full(99, 4 * (image + caption)), T)
    hi = np.arange(T) + 1
    for start, end in itertools.pairwise(cu):
        for first in range(start + caption, end, image + caption):
            hi[first : min(first + image, end)] = min(first + image, end)
    return Documents(cu, hi)


def per_document(docs: Documents, on: On, kernel: str = "") -> Callable:
    """torch's attention one document at a time; `kernel` forces one of its implementations."""
    same = docs.hi is None and len(set(docs.lengths)) == 1
    masks = None
    if docs.hi is not None:
        hi = on.tensor(docs.hi)
        spans = itertools.pairwise(docs.cu)
        masks = [torch.arange(a, b, device=on.device)[None] < hi[a:b, None] for a, b in spans]

    def build() -> Callable:
        backends = None
        if kernel:
            from torch.nn.attention import SDPBackend

            backends = [getattr(SDPBackend, kernel)]
        batch, lengths = len(docs.lengths), docs.lengths.tolist()

        def attend(q, k, v, mask=None):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

        def run(q, k, v):
            if same:  # [B, H, L, D]
                out = attend(*(x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v)))
                return out.transpose(1, 2).flatten(0, 1)
            parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), masks or [None] * batch)
            return torch.cat([attend(*part) for part in parts], dim=2)[0].transpose(0, 1)

        def forced(q, k, v):
            from torch.nn.attention import sdpa_kernel

            with sdpa_kernel(backends):
                return run(q, k, v)

        return forced if backends else run

    return build


def flash_varlen(docs: Documents, cu: torch.Tensor, longest: int) -> Callable:
    """torch's public packed attention, in the form of 2.11 and of later versions."""

    def build() -> Callable:
        from torch.nn.attention.varlen import varlen_attn

        takes = inspect.signature(varlen_attn).parameters
        causal = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
        grouped = "enable_gqa" in takes
        more = causal | ({"enable_gqa": True} if grouped else {})

        def run(q, k, v):
            if not grouped:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            return varlen_attn(q, k, v, cu, cu, longest, longest, **more)

        return run

    return build


def flex(docs: Documents, on: On) -> Callable:
    """FlexAttention, compiled, with its block mask made beforehand."""

    def build() -> Callable:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._functorch.config.donated_buffer = False
        T = int(docs.cu[-1])
        lo = on.tensor(np.repeat(docs.cu[:-1], docs.lengths))
        hi = on.tensor(np.arange(T) + 1 if docs.hi is None else docs.hi)

        def visible(b, h, q, k):
            return (k >= lo[q]) & (k < hi[q])

        make = torch.compile(create_block_mask) if on.device.type == "cuda" else create_block_mask
        mask = make(visible, None, None, T, T, device=str(on.device))
        fast = torch.compile(flex_attention, dynamic=False, fullgraph=True)

        def run(q, k, v):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return fast(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        return run

    return build


def exact(hi: torch.Tensor) -> Callable:
    """Attention of the first document in float64; row i sees the keys below hi[i]."""

    def run(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        hidden = torch.arange(len(k), device=k.device)[None] >= hi[:, None]
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)

    return run


@case("varlen_attention", "docs 8k", value=100, full={"kind": "even", **WIDE}, small={"kind": "even", **TOY})
@case("varlen_attention", "docs ~2k", value=99, full={"kind": "mixed", **WIDE}, small={"kind": "mixed", **TOY})
@case("varlen_attention", "image blocks", value=98, full={"kind": "images", **WIDE}, small={"kind": "images", **TOY})
@case("varlen_attention", "docs 8k, D=64", value=70, full={"kind": "even", **NARROW}, small={"kind": "even", **SLIM})
@case("varlen_attention", "docs ~2k, D=64", value=50, full={"kind": "mixed", **NARROW}, small={"kind": "mixed", **SLIM})
@case("varlen_attention", "image blocks, D=64", value=49, full={"kind": "images", **NARROW},
      small={"kind": "images", **SLIM})  # fmt: skip
def varlen_attention(on: On, kind: str, T: int, Hq: int, Hk: int, D: int) -> Problem:
    docs = documents(kind, T)
    longest, pairs = int(docs.lengths.max()), docs.visible_pairs()
    cu, hi = on.tensor(docs.cu), None if docs.hi is None else on.tensor(docs.hi)
    on_host = None if docs.hi is None else torch.tensor(docs.hi, dtype=torch.int32)
    tiles = vkernels.attention_tiles(torch.tensor(docs.cu, dtype=torch.int32), kv_hi=on_host).to(on.device)
    q, k, v = on.randn(T, Hq, D), on.randn(T, Hk, D), on.randn(T, Hk, D)

    def ours(q, k, v):
        return vkernels.varlen_attention(q, k, v, cu, max_seqlen_q=longest, kv_hi=hi, tiles=tiles)

    peers = {"torch eager": per_document(docs, on)}
    if docs.hi is None:
        peers["torch varlen_attn"] = flash_varlen(docs, cu, longest)
        peers["cuDNN SDPA"] = per_document(docs, on, "CUDNN_ATTENTION")
    peers["torch.compile FlexAttention"] = flex(docs, on)
    rows = min(int(docs.cu[1]), 512 if docs.hi is None else T)  # a causal prefix is a document of its own
    judged = Judged(exact(torch.arange(rows, device=on.device) + 1 if hi is None else hi[:rows]),
                    [q[:rows], k[:rows], v[:rows]], rows)  # fmt: skip
    size, flops = on.dtype.itemsize * T * D, 4.0 * Hq * D * pairs
    return Problem(
        [q, k, v], ours, peers, judged=judged, more={"pairs": pairs, "documents": len(docs.lengths)},
        forward=Cost(flops, size * (2 * Hq + 2 * Hk)), backward=Cost(2.5 * flops, size * (4 * Hq + 4 * Hk)),
    )  # fmt: skip
