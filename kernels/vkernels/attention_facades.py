"""Packed attention by libraries: torch's flash attention, cuDNN, and the flash-attn packages where they are installed.

They know causal documents only, in half precision. Their signatures are those of torch 2.11 to 2.13, flash-attn 2.7 and
3, and flash-attn-4 4.0.0b; a package is imported when it is first asked for. Their backward passes add with atomics,
and so repeat bit for bit only under `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType

import torch

from vkernels.registry import Backend, Facts, jit

# Two files: the kernels of the backward pass are one of their own.
TRITON = jit("attention", "forward")._replace(backward=jit("attention_backward", "backward").forward)


def takes_causal_half(facts: Facts) -> str | None:
    if facts["mask"] != "causal":
        return "it knows causal documents only, kv_lo or kv_hi was given"
    if facts["dtype"] not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {facts['dtype']}"
    if facts["head_dim"] % 8 or facts["head_dim"] > 256:
        return f"it takes head sizes up to 256 in steps of 8, not {facts['head_dim']}"
    return "it takes no empty tensors" if facts["empty"] else None


def takes_same_causal_half(facts: Facts) -> str | None:
    reason = takes_causal_half(facts)
    if reason is None and not facts["same"]:
        return "its first query sees the first key: it takes only documents with as many keys as queries"
    if reason is None and facts["head_dim"] > 128:
        return f"it takes head sizes up to 128, not {facts['head_dim']}"
    return reason


def on_ampere(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it runs on GPUs only, the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"it needs compute capability 8.0, the GPU has {capability}"


def _needs(name: str, device: torch.device) -> str | None:
    reason = on_ampere(device)
    return f"{name} cannot be imported" if reason is None and _module(name) is None else reason


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _int32(*tensors):
    return [x.to(torch.int32).contiguous() for x in tensors]


def _aligned(call):
    """`call` with copies of those [T, H, D] whose rows or heads do not begin at multiples of the 16 bytes it loads."""

    @functools.wraps(call)
    def loadable(*args):
        return call(*(x if _begins_at_16_bytes(x) else x.clone(memory_format=torch.contiguous_format) for x in args))

    return loadable


def _begins_at_16_bytes(x) -> bool:
    if not isinstance(x, torch.Tensor) or x.dim() != 3:
        return True
    places = x.data_ptr(), x.stride(0) * x.itemsize, x.stride(1) * x.itemsize
    return x.stride(2) == 1 and not any(place % 16 for place in places)


def _signed(lse):
    """Flash attention 2 gives +inf for a row without keys, we -inf; it reads both as nothing seen."""
    return lse.masked_fill(lse == math.inf, -math.inf)


@_aligned
def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    """The operators under torch.nn.attention.varlen, which has no backward of its own to call."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_int32(cu_q, cu_k), max_q, max_k, 0.0, True, False, scale=scale
    )
    return out, _signed(lse)


@_aligned
def flash_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    grads = torch.ops.aten._flash_attention_backward(
        do.contiguous(), q, k, v, out, lse, *_int32(cu_q, cu_k), max_q, max_k, 0.0, True, seed, unused, scale=scale
    )
    return tuple(g.contiguous() for g in grads)


@_aligned
def cudnn_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # it computes the offsets of documents from cu_seqlens
    out, lse, *_ = torch.ops.aten._cudnn_attention_forward(
        q, k, v, None, *_int32(cu_q, cu_k), max_q, max_k, True, 0.0, True, False, scale=scale
    )
    return out, lse.view(q.shape[0], q.shape[1]).t().contiguous()


@_aligned
def flash2_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    out, lse, *_ = _module("flash_attn.flash_attn_interface")._flash_attn_varlen_forward(
        q, k, v, *_int32(cu_q, cu_k), max_q, max_k, 0.0, scale, True
    )
    return out, _signed(lse)


@_aligned
def flash2_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    _module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
        do.contiguous(), q, k, v, out, lse, *grads, *_int32(cu_q, cu_k), max_q, max_k, 0.0, scale, True,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return tuple(grads)


@_aligned
def flash3_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    cu_q, cu_k = _int32(cu_q, cu_k)
    out, lse, *_ = _module("flash_attn_interface")._flash_attn_forward(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    return out, _signed(lse)


@_aligned
def flash3_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    _module("flash_attn_interface")._flash_attn_backward(
        do.contiguous(), q, k, v, out, lse, *_int32(cu_q, cu_k), None, None, max_q, max_k, *grads, scale, True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return tuple(grads)


@_aligned
def flash4_forward(q, k, v, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    cu_q, cu_k = _int32(cu_q, cu_k)
    out, lse, *_ = _module("flash_attn.cute.interface")._flash_attn_fwd(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        softmax_scale=scale, causal=True, return_lse=True,
    )  # fmt: skip
    return out, _signed(lse)


@_aligned
def flash4_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, kv_lo, kv_hi, scale, tiles):
    cu_q, cu_k = _int32(cu_q, cu_k)
    return _module("flash_attn.cute.interface")._flash_attn_bwd(
        q, k, v, out, do.contiguous(), lse, scale, True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q,
        max_seqlen_k=max_k, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _package(forward, backward, name: str) -> Backend:
    return Backend(forward, backward, functools.partial(_needs, name), takes_causal_half)


FLASH = Backend(flash_forward, flash_backward, on_ampere, takes_causal_half)
# torch's backward of cuDNN takes query.size(2), in packed form the head size, for the longest document: ours instead.
CUDNN = Backend(cudnn_forward, TRITON.backward, on_ampere, takes_same_causal_half)
FLASH_ATTN_2 = _package(flash2_forward, flash2_backward, "flash_attn.flash_attn_interface")
FLASH_ATTN_3 = _package(flash3_forward, flash3_backward, "flash_attn_interface")
FLASH_ATTN_4 = _package(flash4_forward, flash4_backward, "flash_attn.cute.interface")
LIBRARIES = {
    "cudnn": CUDNN,
    "flash_attn_2": FLASH_ATTN_2,
    "flash_attn_3": FLASH_ATTN_3,
    "flash_attn_4": FLASH_ATTN_4,
}
