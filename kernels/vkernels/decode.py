"""Attention of one new token per sequence over a key-value cache, which takes the new key and value in the same op."""

from __future__ import annotations

import math
from itertools import groupby

import torch
import torch.nn.functional as F

from vkernels.arguments import require_floats
from vkernels.registry import Backend, accumulate_dtype, anywhere, define, jit, on_cpu


def decode_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    length: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Write k_new and v_new to column `length` of the caches and attend over columns [start, length]. -> o[B, Hq, D].

    q[B, Hq, D]; k_new, v_new[B, Hk, D], where Hk divides Hq; k_cache, v_cache[B, L, Hk, D] of q's dtype, the last
    dimension dense, changed in place. length: int32 or int64, [B] or one column for all ([]), on q's device, within
    0..L-1: the cpu backend raises, on a GPU a column outside is not written. start: int32 or int64 [B] (None = 0),
    at most length. scale: default D ** -0.5. What lies in the columns outside [start, length] does not matter.

    It never waits for the device and its launches depend on shapes only: it can be captured in a CUDA graph and
    replayed while `length` grows in place. It has no gradient. ValueError: shapes or dtypes that do not fit.
    """
    _check(q, k_new, v_new, k_cache, v_cache, length, start)
    return _op(q, k_new, v_new, k_cache, v_cache, length, start, q.shape[-1] ** -0.5 if scale is None else scale)


def _check(q, k_new, v_new, k_cache, v_cache, length, start) -> None:
    require_floats("decode_attention", q=q, k_new=k_new, v_new=v_new, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; "
            "expected q[B, Hq, D] and caches [B, L, Hk, D]"
        )
    (B, Hq, D), (Bc, _, Hk, Dc) = q.shape, k_cache.shape
    if (Bc, Dc) != (B, D) or Hk == 0 or Hq % Hk or not k_new.shape == v_new.shape == (B, Hk, D):
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)}, k_new {tuple(k_new.shape)}, v_new {tuple(v_new.shape)} do not fit "
            f"caches {tuple(k_cache.shape)}; expected [B, Hq, D], twice [B, Hk, D] and [B, L, Hk, D], Hk dividing Hq"
        )
    tensors = (q, k_new, v_new, k_cache, v_cache)
    devices = {x.device for x in (*tensors, length, start) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"decode_attention: operands on {sorted(map(str, devices))}; expected one device")
    if len({x.dtype for x in tensors}) > 1:
        raise ValueError(f"decode_attention: dtypes {[str(x.dtype) for x in tensors]}; expected one for all")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError(
            f"decode_attention: caches with strides {k_cache.stride()}, {v_cache.stride()}; expected a last one of 1"
        )
    for name, x, shapes in (("length", length, ((), (B,))), ("start", start, ((B,),))):
        if x is not None and (x.dtype not in (torch.int32, torch.int64) or tuple(x.shape) not in shapes):
            raise ValueError(f"decode_attention: {name} is {x.dtype} {tuple(x.shape)}; expected an int tensor [{B}]")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("decode_attention: it has no gradient, an operand requires one; expected torch.no_grad()")


def _append(k, v, k_cache, v_cache, length):
    rows = torch.arange(k.shape[0], device=k.device)
    k_cache.index_put_((rows, length), k)
    v_cache.index_put_((rows, length), v)


def _forward(q, k, v, k_cache, v_cache, length, start, scale):
    B, L, Hk, D = k_cache.shape
    acc = accumulate_dtype(q.dtype)
    length = length.long().expand(B)
    _append(k, v, k_cache, v_cache, length)
    column = torch.arange(L, device=q.device)
    visible = column <= length.unsqueeze(1)
    if start is not None:
        visible &= column >= start.unsqueeze(1)
    # What is outside may be anything, NaN too: no product with it, not even by 0.
    keys = k_cache.to(acc).masked_fill(~visible[:, :, None, None], 0)
    values = v_cache.to(acc).masked_fill(~visible[:, :, None, None], 0)
    grouped = q.reshape(B, Hk, q.shape[1] // Hk, D).to(acc)
    scores = torch.einsum("bhgd,blhd->bhgl", grouped * scale, keys)
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bhgl,blhd->bhgd", weights, values).reshape(q.shape).to(q.dtype).contiguous()


def _cpu_forward(q, k, v, k_cache, v_cache, length, start, scale):
    B, L, Hk, D = k_cache.shape
    if not B:
        return torch.empty_like(q)
    lengths = length.tolist() if length.dim() else [int(length)] * B
    starts = [0] * B if start is None else start.tolist()
    for b, (lo, at) in enumerate(zip(starts, lengths)):
        if not 0 <= lo <= at < L:
            raise ValueError(
                f"decode_attention: row {b} starts at {lo} and has length {at}; expected 0 <= start <= length < {L}"
            )
    lo, at = min(starts), max(lengths)
    one_column = min(lengths) == at
    if one_column:
        k_cache[:, at], v_cache[:, at] = k, v  # a third of the time of indices
    else:
        _append(k, v, k_cache, v_cache, length.long())
    # The query heads that share a key head stand as rows of one attention: no key is repeated.
    grouped = q.reshape(B, Hk, q.shape[1] // Hk, D)
    keys, values = k_cache[:, lo : at + 1], v_cache[:, lo : at + 1]
    if one_column and max(starts) == lo:
        return _attend(grouped, keys, values, scale).reshape(q.shape)
    column = torch.arange(lo, at + 1)
    mask = column <= length.expand(B)[:, None]
    if start is not None:
        mask &= column >= start[:, None]
    out = _attend(grouped, keys, values, scale, mask[:, None, None])
    if not math.isnan(out.sum()):
        return out.reshape(q.shape)
    return torch.cat(list(_by_runs(grouped, k_cache, v_cache, scale, starts, lengths))).reshape(q.shape)


def _by_runs(q, k_cache, v_cache, scale, starts, lengths):
    """Without a mask, through which a NaN of a masked column comes (as 0 * NaN): neighbours with the same columns go
    together, cut to these.
    """
    for (lo, at), run in groupby(range(len(starts)), list(zip(starts, lengths)).__getitem__):
        run = list(run)
        rows, columns = slice(run[0], run[-1] + 1), slice(lo, at + 1)
        yield _attend(q[rows], k_cache[rows, columns], v_cache[rows, columns], scale)


def _attend(q, k, v, scale, mask=None):
    return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)


def _facts(q, k, *rest):
    return {"head_dim": q.shape[2], "group": q.shape[1] // k.shape[1]}


def _fits_registers(facts):
    D, G = facts["head_dim"], facts["group"]
    return None if D <= 256 and D * G <= 8192 else f"{G} heads of {D} to a key; it takes {8192 // D} of up to 256"


_op = define(
    "decode_attention",
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor length, Tensor? start,"
    " float scale) -> Tensor",
    fake=lambda q, *rest: q.new_empty(q.shape),
    facts=_facts,
    cpu=Backend(_cpu_forward, None, on_cpu),
    triton=jit("decode", "decode_attention", takes=_fits_registers),
    torch=Backend(_forward, None, anywhere),
)
