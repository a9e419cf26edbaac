"""Packed attention: documents lie end to end, a query sees keys of its own document only.

Legend: Tq, Tk rows of queries and keys; Hq, Hk heads (Hq a multiple of Hk); D head size; S documents.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from vkernels import _host
from vkernels.arguments import require_floats, require_indices
from vkernels.attention_facades import FLASH, LIBRARIES, TRITON
from vkernels.host import dense_heads, to_numpy
from vkernels.registry import (
    Backend,
    Facts,
    accumulate_dtype,
    anywhere,
    below_autograd,
    define,
    define_autograd,
    define_backward,
    interpreting,
    on_cpu,
)

_CHUNK_SCORES = 16 << 20  # scores of one chunk of queries in the masked path: 64 MB in float32


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int | None = None,
    *,
    kv_lo: torch.Tensor | None = None,
    kv_hi: torch.Tensor | None = None,
    scale: float | None = None,
    tiles: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q[Tq, Hq, D], k[Tk, Hk, D], v[Tk, Hk, D], cu_seqlens int32[S + 1] -> o[Tq, Hq, D] (, lse float32[Hq, Tq]).

    Causal in the document; where a document has other numbers of queries and keys, the last query sees the last key.
    kv_lo, kv_hi int32[Tq]: the query attends keys in [kv_lo, kv_hi), absolute rows of k, cut to its document; kv_lo
    replaces the document's start, kv_hi the causal bound. A query without keys gives 0 and lse -inf. max_seqlen: upper
    bounds of the lengths (0 = the number of rows). scale: default 1 / sqrt(D), above 0. tiles: what `attention_tiles`
    made on the host of the same cu_seqlens, kv_lo and kv_hi, on q's device; without it, kernels that walk such a list
    make it on the device. lse gets no gradient. cu_seqlens begin with 0 and end with Tq and Tk: on a GPU nobody looks,
    and what belongs to rows behind the last document is left unwritten. ValueError for shapes, scale or tiles that do
    not fit.
    """
    if scale is not None and not scale > 0:
        raise ValueError(f"varlen_attention: scale is {scale}, expected a number above 0")
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_k or max_seqlen_q
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, kv_lo, kv_hi)
    out, lse = _op(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q or q.shape[0],
        max_seqlen_k or k.shape[0],
        kv_lo,
        kv_hi,
        1 / math.sqrt(q.shape[2]) if scale is None else scale,
        tiles,
    )
    return (out, lse) if return_lse else out


def _check(q, k, v, cu_q, cu_k, kv_lo, kv_hi) -> None:
    """What kernels would take for granted: a GPU reads and writes where these shapes say."""
    require_floats("varlen_attention", q=q, k=k, v=v)
    require_indices("varlen_attention", cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    shapes = f"q {q.dtype}{list(q.shape)}, k {k.dtype}{list(k.shape)}, v {v.dtype}{list(v.shape)}"
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[2] == k.shape[2] > 0
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1] or not q.dtype == k.dtype == v.dtype:
        expected = "[Tq, Hq, D], [Tk, Hk, D] twice, with Hq a multiple of Hk, of one dtype"
        raise ValueError(f"varlen_attention: {shapes}; expected {expected}")
    if cu_q.dim() != 1 or cu_q.shape != cu_k.shape or cu_q.shape[0] == 0:
        found = f"cu_seqlens_q is {list(cu_q.shape)}, cu_seqlens_k {list(cu_k.shape)}"
        raise ValueError(f"varlen_attention: {found}; expected two lists of the same length")
    for name, x in (("kv_lo", kv_lo), ("kv_hi", kv_hi)):
        if x is not None:
            require_indices("varlen_attention", **{name: x})
            if x.shape != q.shape[:1]:
                found = f"{name} is {list(x.shape)}"
                raise ValueError(f"varlen_attention: {found}, expected one row of k for each query, [Tq]")


def _bounds(Tq, cu_q, cu_k, kv_lo, kv_hi):
    """The keys [lo, hi) of every query row, int64[Tq] each."""
    row = torch.arange(Tq, device=cu_q.device)
    cu_q, cu_k = cu_q.long(), cu_k.long()
    document = torch.searchsorted(cu_q[1:].contiguous(), row, right=True)
    lo, end = cu_k[document], cu_k[document + 1]
    hi = end - cu_q[document + 1] + row + 1 if kv_hi is None else torch.minimum(end, kv_hi.long())
    if kv_lo is not None:
        lo = torch.maximum(lo, kv_lo.long())
    return lo, hi


def _chunks(q, k, v, bounds):
    """Query chunks as (rows, q[Hk, G, t, D], mask[t, Tk]) in the accumulation dtype, with k, v as [Hk, 1, Tk, D]."""
    acc = accumulate_dtype(q.dtype)
    Tq, Hq, D = q.shape
    Tk, Hk, _ = k.shape
    K, V = (x.to(acc).transpose(0, 1).unsqueeze(1) for x in (k, v))
    Q = q.to(acc).view(Tq, Hk, Hq // Hk, D).permute(1, 2, 0, 3)
    lo, hi = bounds
    column = torch.arange(Tk, device=q.device)
    step = max(1, _CHUNK_SCORES // max(1, Hq * Tk))
    for a in range(0, Tq, step):
        rows = slice(a, min(a + step, Tq))
        mask = (column >= lo[rows, None]) & (column < hi[rows, None])
        yield rows, Q[:, :, rows], K, V, mask


def _masked_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    Tq, Hq, D = q.shape
    acc = accumulate_dtype(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(Hq, Tq, dtype=acc, device=q.device)
    for rows, Q, K, V, mask in _chunks(q, k, v, _bounds(Tq, cu_q, cu_k, kv_lo, kv_hi)):
        s = (Q @ K.transpose(2, 3)).mul_(scale).masked_fill_(~mask, float("-inf"))
        m = torch.logsumexp(s, -1, keepdim=True)
        p = s.sub_(torch.where(m == float("-inf"), 0, m)).exp_()
        out[rows] = (p @ V).permute(2, 0, 1, 3).reshape(-1, Hq, D).to(q.dtype)
        lse[:, rows] = m.reshape(Hq, -1)
    return out, lse


def _masked_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    Tq, Hq, D = q.shape
    Tk, Hk, _ = k.shape
    acc = accumulate_dtype(q.dtype)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(Hk, Tk, D, dtype=acc, device=q.device)
    dv = torch.zeros_like(dk)
    grouped = (Tq, Hk, Hq // Hk, D)
    DO = do.to(acc).reshape(grouped).permute(1, 2, 0, 3)
    delta = (DO * out.to(acc).view(grouped).permute(1, 2, 0, 3)).sum(-1, keepdim=True)
    lse = torch.where(lse == float("-inf"), 0, lse).view(Hk, Hq // Hk, Tq, 1)
    for rows, Q, K, V, mask in _chunks(q, k, v, _bounds(Tq, cu_q, cu_k, kv_lo, kv_hi)):
        p = (Q @ K.transpose(2, 3)).mul_(scale).sub_(lse[:, :, rows]).exp_().masked_fill_(~mask, 0)
        g = DO[:, :, rows]
        dv += (p.transpose(2, 3) @ g).sum(1)
        ds = (g @ V.transpose(2, 3)).sub_(delta[:, :, rows]).mul_(p).mul_(scale)
        dq[rows] = (ds @ K).permute(2, 0, 1, 3).reshape(-1, Hq, D).to(q.dtype)
        dk += (ds.transpose(2, 3) @ Q).sum(1)
    return dq, dk.transpose(0, 1).contiguous().to(k.dtype), dv.transpose(0, 1).contiguous().to(v.dtype)


def _int32(x):
    return None if x is None else to_numpy(x.to(torch.int32).contiguous())


def _operands(q, k, v):
    """q, k, v in the accumulation dtype; their rows may stay apart, as slices of a merged projection are."""
    acc = accumulate_dtype(q.dtype)
    return [dense_heads(x.to(acc)) for x in (q, k, v)]


def _cpu_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    q_, k_, v_ = _operands(q, k, v)
    out = torch.empty(q.shape, dtype=q_.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=q_.dtype)
    tables = _int32(cu_q), _int32(cu_k), _int32(kv_lo), _int32(kv_hi), scale
    arrays = [to_numpy(x) for x in (q_, k_, v_)]
    _host.attention_forward(*arrays, *tables, to_numpy(out), to_numpy(lse), torch.get_num_threads())
    return out.to(q.dtype), lse


def _cpu_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    q_, k_, v_ = _operands(q, k, v)
    acc = q_.dtype
    grads = [torch.empty(x.shape, dtype=acc) for x in (q, k, v)]
    arrays = [to_numpy(x) for x in (do.to(acc).contiguous(), q_, k_, v_, out.to(acc), lse)]
    tables = _int32(cu_q), _int32(cu_k), _int32(kv_lo), _int32(kv_hi), scale
    _host.attention_backward(*arrays, *tables, *map(to_numpy, grads), torch.get_num_threads())
    return tuple(g.to(x.dtype) for g, x in zip(grads, (q, k, v)))


def _fake_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulate_dtype(q.dtype))


def _fake_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _takes(facts: Facts) -> str | None:
    """What the Triton kernels take."""
    largest = 256 if facts["dtype"] in ("bfloat16", "float16") else 128
    if facts["head_dim"] > largest:
        return f"it takes head sizes up to {largest} in {facts['dtype']}, not {facts['head_dim']}"
    if facts["dtype"] == "float64" and not interpreting():
        return "it takes float64 in Triton's interpreter only"
    return None


def _facts(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles) -> Facts:
    return {
        "head_dim": q.shape[2],
        "mask": "causal" if kv_lo is None and kv_hi is None else "interval",
        "dtype": str(q.dtype).removeprefix("torch."),
        "gqa": q.shape[1] != k.shape[1],
        "same": cu_q is cu_k or (cu_q.data_ptr() == cu_k.data_ptr() and cu_q.shape == cu_k.shape),
        "empty": q.numel() == 0 or k.numel() == 0,
    }


def _facts_backward(do, q, k, v, out, lse, *rest) -> Facts:
    return _facts(q, k, v, *rest)


_op = define(
    "varlen_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    " Tensor? kv_lo, Tensor? kv_hi, float scale, Tensor? tiles) -> (Tensor, Tensor)",
    fake=_fake_forward,
    facts=_facts,
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    flash=FLASH,
    triton=TRITON._replace(takes=_takes),
    torch=Backend(_masked_forward, _masked_backward, anywhere),
    **LIBRARIES,
)
_backward_op = define_backward(
    "varlen_attention",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? kv_lo, Tensor? kv_hi, float scale, Tensor? tiles)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    facts=_facts_backward,
)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
        with below_autograd():
            out, lse = _op(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, kv_lo, kv_hi, tiles)
        ctx.numbers = max_q, max_k, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, out, lse, cu_q, cu_k, kv_lo, kv_hi, tiles = ctx.saved_tensors
        max_q, max_k, scale = ctx.numbers
        grads = _backward_op(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles)
        return *grads, None, None, None, None, None, None, None, None


define_autograd("varlen_attention", _VarlenAttention)
