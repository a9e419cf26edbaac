"""Rotary position embedding of queries and keys in one op, alone or after an RMSNorm of every head.

The backward pass of the rotation is the rotation by the negative angle.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from vkernels import _host
from vkernels.arguments import require_floats
from vkernels.host import dense_heads, to_numpy
from vkernels.norms import rms_backward
from vkernels.registry import (
    Backend,
    accumulate_dtype,
    anywhere,
    below_autograd,
    define,
    define_autograd,
    define_backward,
    jit,
    on_cpu,
)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q[T, Hq, D] and k[T, Hk, D] by the angles of cos, sin float32[T, D/2], as Hugging Face's Llama does.

    Dimension i is paired with i + D/2. -> new (q, k) of the same dtypes; cos and sin get no gradient.
    """
    _check("rope", q, k, cos, sin)
    return _rope(q, k, cos, sin, False)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rope(rms_norm(q, q_weight[D], eps), rms_norm(k, k_weight[D], eps), cos, sin) in one pass over q and k.

    Every head of q[T, Hq, D] and k[T, Hk, D] is normed on its own, in float32, and rounded once, after the rotation.
    """
    _check("qk_norm_rope", q, k, cos, sin)
    require_floats("qk_norm_rope", q_weight=q_weight, k_weight=k_weight)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q.shape[-1:]:
            raise ValueError(f"qk_norm_rope: {name} {list(weight.shape)}, expected {list(q.shape[-1:])}")
    return _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)[:2]


def _check(op: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    require_floats(op, q=q, k=k, cos=cos, sin=sin)
    if q.dim() != 3 or k.dim() != 3 or q.shape[::2] != k.shape[::2] or q.shape[2] % 2:
        raise ValueError(f"{op}: q {list(q.shape)}, k {list(k.shape)}, expected [T, Hq, D] and [T, Hk, D] with D even")
    tables = (q.shape[0], q.shape[2] // 2)
    if cos.shape != tables or sin.shape != tables:
        raise ValueError(f"{op}: cos {list(cos.shape)}, sin {list(sin.shape)}, expected {list(tables)}")


def _rotate(x, cos, sin, inverse):
    acc = accumulate_dtype(x.dtype)
    cos, sin = cos.to(acc).unsqueeze(1), sin.to(acc).unsqueeze(1)
    a, b = x.to(acc).chunk(2, dim=-1)
    y = torch.empty(x.shape, dtype=acc, device=x.device)
    half = x.shape[-1] // 2
    torch.mul(a, cos, out=y[..., :half]).addcmul_(b, sin, value=1 if inverse else -1)
    torch.mul(b, cos, out=y[..., half:]).addcmul_(a, sin, value=-1 if inverse else 1)
    return y


def _forward(q, k, cos, sin, inverse):
    return _rotate(q, cos, sin, inverse).to(q.dtype), _rotate(k, cos, sin, inverse).to(k.dtype)


def _cpu_rotate(x, cos, sin, inverse):
    acc = accumulate_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=acc)
    tables = to_numpy(cos.to(acc).contiguous()), to_numpy(sin.to(acc).contiguous())
    _host.rope(to_numpy(dense_heads(x.to(acc))), *tables, inverse, to_numpy(y), torch.get_num_threads())
    return y.to(x.dtype)


def _cpu_forward(q, k, cos, sin, inverse):
    return _cpu_rotate(q, cos, sin, inverse), _cpu_rotate(k, cos, sin, inverse)


def _norm_rotate(x, weight, cos, sin, eps):
    X = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(X.square().mean(-1, keepdim=True) + eps)
    return _rotate((X * rstd).mul_(weight), cos, sin, False).to(x.dtype), rstd.squeeze(-1)


def _norm_rotate_backward(dy, x, weight, cos, sin, rstd):
    return rms_backward(_rotate(dy, cos, sin, True), x, weight, rstd)


def _cpu_norm_rotate(x, weight, cos, sin, eps):
    acc = accumulate_dtype(x.dtype)
    heads, parameters = dense_heads(x.to(acc)), [t.to(acc).contiguous() for t in (weight, cos, sin)]
    y, rstd = torch.empty(x.shape, dtype=acc), torch.empty(x.shape[:2], dtype=acc)
    arrays = heads, *parameters, y, rstd.view(-1)
    _host.norm_rope_forward(*map(to_numpy, arrays), eps, torch.get_num_threads())
    return y.to(x.dtype), rstd


def _cpu_norm_rotate_backward(dy, x, weight, cos, sin, rstd):
    acc = accumulate_dtype(x.dtype)
    grads, heads = dense_heads(dy.to(acc)), dense_heads(x.to(acc))
    w, *tables = [t.to(acc).contiguous() for t in (weight, cos, sin)]
    dx, dweight = torch.empty(x.shape, dtype=acc), torch.empty(w.shape, dtype=acc)
    arrays = grads, heads, w, *tables, rstd.view(-1), dx, dweight
    _host.norm_rope_backward(*map(to_numpy, arrays), torch.get_num_threads())
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _of_both(forward):
    """The forward pass over q and k, of one over either."""

    def both(q, k, q_weight, k_weight, cos, sin, eps):
        (yq, q_rstd), (yk, k_rstd) = forward(q, q_weight, cos, sin, eps), forward(k, k_weight, cos, sin, eps)
        return yq, yk, q_rstd, k_rstd

    return both


def _of_both_backward(backward):
    def both(dq, dk, q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd):
        dq, dq_weight = backward(dq, q, q_weight, cos, sin, q_rstd)
        dk, dk_weight = backward(dk, k, k_weight, cos, sin, k_rstd)
        return dq, dk, dq_weight, dk_weight

    return both


def _fake_norm(q, k, *rest):
    rstd = (x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype)) for x in (q, k))
    return q.new_empty(q.shape), k.new_empty(k.shape), *rstd


def _fake_norm_backward(dq, dk, *inputs):
    return tuple(x.new_empty(x.shape) for x in inputs[:4])


_rope = define(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    fake=lambda q, k, cos, sin, inverse: (q.new_empty(q.shape), k.new_empty(k.shape)),
    cpu=Backend(_cpu_forward, None, on_cpu),
    triton=jit("rotary", "rope"),
    torch=Backend(_forward, None, anywhere),
)
_qk_norm_rope = define(
    "qk_norm_rope",
    "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_norm,
    cpu=Backend(_of_both(_cpu_norm_rotate), _of_both_backward(_cpu_norm_rotate_backward), on_cpu),
    triton=jit("rotary", "qk_norm_rope_forward", "qk_norm_rope_backward"),
    torch=Backend(_of_both(_norm_rotate), _of_both_backward(_norm_rotate_backward), anywhere),
)
_qk_norm_rope_backward = define_backward(
    "qk_norm_rope",
    "(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " Tensor q_rstd, Tensor k_rstd) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_norm_backward,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        with below_autograd():
            return _rope(q, k, cos, sin, inverse)

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = _rope(dq, dk, *ctx.saved_tensors, not ctx.inverse)
        return dq, dk, None, None, None


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps):
        with below_autograd():
            yq, yk, q_rstd, k_rstd = _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd)
        ctx.mark_non_differentiable(q_rstd, k_rstd)
        return yq, yk, q_rstd, k_rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, *_):
        return *_qk_norm_rope_backward(dq, dk, *ctx.saved_tensors), None, None, None


define_autograd("rope", _Rope)
define_autograd("qk_norm_rope", _QkNormRope)
