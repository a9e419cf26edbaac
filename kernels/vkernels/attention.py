"""Packed attention: documents lie end to end, a query sees keys of its own document only.

Legend: Tq, Tk rows of queries and keys; Hq, Hk heads (Hq a multiple of Hk); D head size; S documents.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from vkernels import _host
from vkernels.host import dense_heads, to_numpy
from vkernels.registry import (
    Backend,
    accumulate_dtype,
    anywhere,
    below_autograd,
    define,
    define_autograd,
    define_backward,
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
    bounds of the lengths (0 = the number of rows). scale: default 1 / sqrt(D). tiles: work list made on the host for
    kernels that take one; the backends here need none. lse gets no gradient.
    """
    Tq, Hq, D = q.shape
    Tk, Hk, _ = k.shape
    if k.shape != v.shape or k.shape[2] != D or Hk == 0 or Hq % Hk:
        raise ValueError(
            f"varlen_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; expected [Tq, Hq, D], "
            "[Tk, Hk, D] twice, with Hq a multiple of Hk"
        )
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_k or max_seqlen_q
    out, lse = _op(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q or Tq,
        max_seqlen_k or Tk,
        kv_lo,
        kv_hi,
        1 / math.sqrt(D) if scale is None else scale,
    )
    return (out, lse) if return_lse else out


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


def _masked_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale):
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


def _masked_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale):
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


def _flash_takes(q, k, kv_lo, kv_hi):
    """Whether torch's own packed flash attention can do it: causal, half precision, on a GPU that has it."""
    return (
        q.is_cuda
        and kv_lo is None
        and kv_hi is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] <= 256
        and q.shape[2] % 8 == 0
        and min(q.shape[0], k.shape[0]) > 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _torch_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale):
    if not _flash_takes(q, k, kv_lo, kv_hi):
        return _masked_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale)
    cu_q, cu_k = cu_q.int(), cu_k.int()
    # The operators under torch.nn.attention.varlen, which has no separate backward to call.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, True, False, scale=scale
    )
    return out, lse.masked_fill(lse == float("inf"), float("-inf"))  # its sign for a query without keys


def _torch_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale):
    if not _flash_takes(q, k, kv_lo, kv_hi):
        return _masked_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    grads = torch.ops.aten._flash_attention_backward(
        do.contiguous(), q, k, v, out, lse, cu_q.int(), cu_k.int(), max_q, max_k, 0.0, True, seed, unused, scale=scale
    )
    return tuple(g.contiguous() for g in grads)


def _int32(x):
    return None if x is None else to_numpy(x.to(torch.int32).contiguous())


def _operands(q, k, v):
    """q, k, v in the accumulation dtype; their rows may stay apart, as slices of a merged projection are."""
    acc = accumulate_dtype(q.dtype)
    return [dense_heads(x.to(acc)) for x in (q, k, v)]


def _cpu_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale):
    q_, k_, v_ = _operands(q, k, v)
    out = torch.empty(q.shape, dtype=q_.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=q_.dtype)
    tables = _int32(cu_q), _int32(cu_k), _int32(kv_lo), _int32(kv_hi), scale
    arrays = [to_numpy(x) for x in (q_, k_, v_)]
    _host.attention_forward(*arrays, *tables, to_numpy(out), to_numpy(lse), torch.get_num_threads())
    return out.to(q.dtype), lse


def _cpu_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale):
    q_, k_, v_ = _operands(q, k, v)
    acc = q_.dtype
    grads = [torch.empty(x.shape, dtype=acc) for x in (q, k, v)]
    arrays = [to_numpy(x) for x in (do.to(acc).contiguous(), q_, k_, v_, out.to(acc), lse)]
    tables = _int32(cu_q), _int32(cu_k), _int32(kv_lo), _int32(kv_hi), scale
    _host.attention_backward(*arrays, *tables, *map(to_numpy, grads), torch.get_num_threads())
    return tuple(g.to(x.dtype) for g, x in zip(grads, (q, k, v)))


def _fake_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulate_dtype(q.dtype))


def _fake_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_op = define(
    "varlen_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    " Tensor? kv_lo, Tensor? kv_hi, float scale) -> (Tensor, Tensor)",
    fake=_fake_forward,
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    torch=Backend(_torch_forward, _torch_backward, anywhere),
)
_backward_op = define_backward(
    "varlen_attention",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? kv_lo, Tensor? kv_hi, float scale) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale):
        with below_autograd():
            out, lse = _op(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, kv_lo, kv_hi)
        ctx.numbers = max_q, max_k, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, out, lse, cu_q, cu_k, kv_lo, kv_hi = ctx.saved_tensors
        max_q, max_k, scale = ctx.numbers
        grads = _backward_op(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale)
        return *grads, None, None, None, None, None, None, None


define_autograd("varlen_attention", _VarlenAttention)
