"""RMSNorm over the last dimension, with its hand-written backward."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from vkernels import _host
from vkernels.host import flat_rows, to_numpy
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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x[..., C] / sqrt(mean(x^2) + eps) * weight[C] -> [..., C] of x's dtype, computed in float32."""
    return _op(x, weight, eps)[0]


def _forward(x, weight, eps):
    X = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(X.square().mean(-1, keepdim=True) + eps)
    y = (X * rstd).mul_(weight).to(x.dtype)
    return y.contiguous(), rstd.squeeze(-1)


def _backward(dy, x, weight, rstd):
    acc = accumulate_dtype(x.dtype)
    DY, r = dy.to(acc), rstd.unsqueeze(-1)
    xhat = x.to(acc) * r
    dweight = (DY * xhat).reshape(-1, x.shape[-1]).sum(0)
    g = DY * weight
    dx = g.sub_(xhat.mul_((g * xhat).mean(-1, keepdim=True))).mul_(r)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)


def _cpu_forward(x, weight, eps):
    acc = accumulate_dtype(x.dtype)
    rows = flat_rows(x.to(acc))
    y, rstd = torch.empty(rows.shape, dtype=acc), torch.empty(rows.shape[0], dtype=acc)
    w = weight.to(acc).contiguous()
    _host.rms_norm_forward(to_numpy(rows), to_numpy(w), eps, to_numpy(y), to_numpy(rstd), torch.get_num_threads())
    return y.to(x.dtype).view(x.shape), rstd.view(x.shape[:-1])


def _cpu_backward(dy, x, weight, rstd):
    acc = accumulate_dtype(x.dtype)
    rows, w = flat_rows(x.to(acc)), weight.to(acc).contiguous()
    dx, dweight = torch.empty(rows.shape, dtype=acc), torch.empty(w.shape, dtype=acc)
    arrays = dy.to(acc).contiguous().view(rows.shape), rows, w, rstd.view(-1), dx, dweight
    _host.rms_norm_backward(*map(to_numpy, arrays), torch.get_num_threads())
    return dx.to(x.dtype).view(x.shape), dweight.to(weight.dtype)


def _fake_forward(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype))


def _fake_backward(dy, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_op = define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=_fake_forward,
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    triton=jit("norms", "rms_norm_forward", "rms_norm_backward"),
    torch=Backend(_forward, _backward, anywhere),
)
_backward_op = define_backward(
    "rms_norm", "(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)", fake=_fake_backward
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        with below_autograd():
            y, rstd = _op(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        dx, dweight = _backward_op(dy, *ctx.saved_tensors)
        return dx, dweight, None


define_autograd("rms_norm", _RmsNorm)
