"""Rotary position embedding of queries and keys in one op. The backward pass is the rotation by the negative angle."""

from __future__ import annotations

import torch

from vkernels import _host
from vkernels.host import dense_heads, to_numpy
from vkernels.registry import Backend, accumulate_dtype, anywhere, below_autograd, define, define_autograd, on_cpu


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q[T, Hq, D] and k[T, Hk, D] by the angles of cos, sin float32[T, D/2], as Hugging Face's Llama does.

    Dimension i is paired with i + D/2. -> new (q, k) of the same dtypes; cos and sin get no gradient.
    """
    return _op(q, k, cos, sin, False)


def _rotate(x, cos, sin, inverse):
    acc = accumulate_dtype(x.dtype)
    cos, sin = cos.to(acc).unsqueeze(1), sin.to(acc).unsqueeze(1)
    a, b = x.to(acc).chunk(2, dim=-1)
    y = torch.empty(x.shape, dtype=acc, device=x.device)
    half = x.shape[-1] // 2
    torch.mul(a, cos, out=y[..., :half]).addcmul_(b, sin, value=1 if inverse else -1)
    torch.mul(b, cos, out=y[..., half:]).addcmul_(a, sin, value=-1 if inverse else 1)
    return y.to(x.dtype)


def _forward(q, k, cos, sin, inverse):
    return _rotate(q, cos, sin, inverse), _rotate(k, cos, sin, inverse)


def _cpu_rotate(x, cos, sin, inverse):
    acc = accumulate_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=acc)
    tables = to_numpy(cos.to(acc).contiguous()), to_numpy(sin.to(acc).contiguous())
    _host.rope(to_numpy(dense_heads(x.to(acc))), *tables, inverse, to_numpy(y), torch.get_num_threads())
    return y.to(x.dtype)


def _cpu_forward(q, k, cos, sin, inverse):
    return _cpu_rotate(q, cos, sin, inverse), _cpu_rotate(k, cos, sin, inverse)


def _fake(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


_op = define(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    fake=_fake,
    cpu=Backend(_cpu_forward, None, on_cpu),
    torch=Backend(_forward, None, anywhere),
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        with below_autograd():
            return _op(q, k, cos, sin, inverse)

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = _op(dq, dk, *ctx.saved_tensors, not ctx.inverse)
        return dq, dk, None, None, None


define_autograd("rope", _Rope)
