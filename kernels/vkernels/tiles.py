"""The work list of packed attention: its layout, and how it is made on the host.

int32[1 + NQ + NK, 8]: a header, NQ = Tq // BLOCK_Q + S tiles of queries, NK = Tk // BLOCK_K + S tiles of keys, each
part with the longest tiles first and tiles without rows, all zeros, at its end. A tile lies inside one document.

    header        [kind, BLOCK_Q, BLOCK_K, NQ, NK, Tq, Tk, S]   kind as `kind_of` tells
    query tile    [q0, q1, kv_lo, full_lo, full_hi, kv_hi, shift, 0]
    key tile      [k0, k1, q_lo, full_lo, full_hi, q_hi, shift, 0]

Rows [q0, q1) see nothing outside keys [kv_lo, kv_hi), and all of them see all of [full_lo, full_hi). Keys [k0, k1) are
seen by no query outside rows [q_lo, q_hi), and by all of [full_lo, full_hi) whole. Under a causal mask query i sees the
keys below i + shift. Ranges of queries begin a multiple of STEP rows after their document.
"""

from __future__ import annotations

import torch

from vkernels import _host
from vkernels.arguments import require_indices
from vkernels.host import to_numpy

BLOCK_Q = 128  # a tile of 128 x 128 is what two warpgroups multiply at a time
BLOCK_K = 128
STEP = 64
WIDTH = 8


def attention_tiles(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    kv_lo: torch.Tensor | None = None,
    kv_hi: torch.Tensor | None = None,
) -> torch.Tensor:
    """cu_seqlens int32[S + 1], kv_lo, kv_hi int32[Tq] -> the work list int32[1 + NQ + NK, 8] for `varlen_attention`.

    On the CPU, with the GIL released: for loader threads. Its shape depends on Tq, Tk and S only, so that a captured
    graph can be replayed with another list. kv_lo and kv_hi as given to `varlen_attention`, in any order of rows.
    ValueError where cu_seqlens does not begin with 0 or decreases, or a bound has another length than Tq.
    """
    cu_q = _int32(cu_seqlens_q, "cu_seqlens_q")
    cu_k = cu_q if cu_seqlens_k is None else _int32(cu_seqlens_k, "cu_seqlens_k")
    lo, hi = (None if x is None else _int32(x, name) for x, name in ((kv_lo, "kv_lo"), (kv_hi, "kv_hi")))
    if min(cu_q.numel(), cu_k.numel()) == 0:
        raise ValueError("attention_tiles: cu_seqlens is empty, expected [0, ..., T]")
    S, Tq, Tk = cu_q.numel() - 1, int(cu_q[-1]), int(cu_k[-1])
    NQ, NK = counts(Tq, Tk, S)
    tiles = torch.empty(1 + NQ + NK, WIDTH, dtype=torch.int32)
    tiles[0] = torch.tensor([kind_of(lo, hi), BLOCK_Q, BLOCK_K, NQ, NK, Tq, Tk, S], dtype=torch.int32)
    arrays = [None if x is None else to_numpy(x) for x in (cu_q, cu_k, lo, hi)]
    _host.attention_tiles(*arrays, BLOCK_Q, BLOCK_K, STEP, to_numpy(tiles[1 : 1 + NQ]), to_numpy(tiles[1 + NQ :]))
    return tiles


def counts(Tq: int, Tk: int, S: int) -> tuple[int, int]:
    """(NQ, NK): as many tiles as documents of any lengths can have."""
    return max(Tq, 0) // BLOCK_Q + S, max(Tk, 0) // BLOCK_K + S


def kind_of(kv_lo, kv_hi) -> int:
    """What a list is for, as one number: the sizes of its tiles, and which bounds of rows were given."""
    return BLOCK_Q << 16 | BLOCK_K << 4 | (kv_lo is not None) << 1 | (kv_hi is not None)


def require_fitting(tiles: torch.Tensor, device: torch.device, Tq: int, Tk: int, S: int, kind: int) -> None:
    """ValueError unless `tiles` can be the list of such a call. A GPU is not waited for: there, the kernel looks at the
    header, and gives NaN where it was made for another kind of call.
    """
    NQ, NK = counts(Tq, Tk, S)
    if tiles.device != device or not tiles.is_contiguous():
        raise ValueError(f"varlen_attention: tiles are on {tiles.device}, expected contiguous on {device}")
    if tiles.dtype != torch.int32 or tiles.shape != (1 + NQ + NK, WIDTH):
        raise ValueError(
            f"varlen_attention: tiles are {tiles.dtype} {list(tiles.shape)}, expected torch.int32 "
            f"{[1 + NQ + NK, WIDTH]} as attention_tiles makes them for {Tq} queries, {Tk} keys and {S} documents"
        )
    expected = [kind, BLOCK_Q, BLOCK_K, NQ, NK, Tq, Tk, S]
    if tiles.device.type == "cpu" and tiles[0].tolist() != expected:
        raise ValueError(f"varlen_attention: the tiles' header is {tiles[0].tolist()}, expected {expected}")


def _int32(x: torch.Tensor, name: str) -> torch.Tensor:
    require_indices("attention_tiles", **{name: x})
    if x.device.type != "cpu" or x.dim() != 1:
        raise ValueError(f"attention_tiles: {name} is {list(x.shape)} on {x.device}, expected one dimension on cpu")
    return x.detach().to(torch.int32).contiguous()
