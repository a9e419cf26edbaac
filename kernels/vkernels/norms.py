"""RMSNorm, RMSNorm of a residual stream, and LayerNorm over the last dimension, with their hand-written backwards."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from vkernels import _host
from vkernels.arguments import require_floats
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

WIDEST = 8192  # columns that the Triton kernels hold in registers; at 16384 their backward passes spill 88 to 240 bytes


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x[..., C] / sqrt(mean(x^2) + eps) * weight[C] -> [..., C] of x's dtype, computed in float32."""
    _check("rms_norm", x, weight=weight)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's output x[..., C] joins the residual stream, which the next block reads through a norm.

    -> (rms_norm(stream, weight[C], eps), stream) with stream = x + residual, rounded to their dtype. The gradients of
    x and residual are one tensor.
    """
    _check("add_rms_norm", x, weight=weight)
    require_floats("add_rms_norm", residual=residual)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: residual {list(residual.shape)} {residual.dtype}, expected x's {list(x.shape)} {x.dtype}"
        )
    return _add_rms_norm(x, residual, weight, eps)[:2]


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """(x[..., C] - mean) / sqrt(variance + eps) * weight[C] + bias[C] -> [..., C] of x's dtype, computed in float32."""
    _check("layer_norm", x, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, eps)[0]


def _check(op: str, x: torch.Tensor, **parameters: torch.Tensor) -> None:
    require_floats(op, x=x, **parameters)
    for name, p in parameters.items():
        if p.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} {list(p.shape)}, expected {list(x.shape[-1:])} as the last of x has")


def _facts(x, *rest):
    return {"columns": x.shape[-1]}


def _one_tile(facts):
    return None if facts["columns"] <= WIDEST else f"rows of {facts['columns']} elements, it takes up to {WIDEST}"


def _rms_forward(x, weight, eps):
    X = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(X.square().mean(-1, keepdim=True) + eps)
    y = (X * rstd).mul_(weight).to(x.dtype)
    return y.contiguous(), rstd.squeeze(-1)


def rms_backward(dy, x, weight, rstd, dstream=None):
    """The gradient of x, to which that of the stream is added where there is one, and the gradient of weight."""
    acc = accumulate_dtype(x.dtype)
    DY, r = dy.to(acc), rstd.unsqueeze(-1)
    xhat = x.to(acc) * r
    dweight = (DY * xhat).reshape(-1, x.shape[-1]).sum(0)
    g = DY * weight
    dx = g.sub_(xhat.mul_((g * xhat).mean(-1, keepdim=True))).mul_(r)
    if dstream is not None:
        dx += dstream
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)


def _cpu_rms_forward(x, weight, eps):
    acc = accumulate_dtype(x.dtype)
    rows = flat_rows(x.to(acc))
    y, rstd = torch.empty(rows.shape, dtype=acc), torch.empty(rows.shape[0], dtype=acc)
    w = weight.to(acc).contiguous()
    _host.rms_norm_forward(to_numpy(rows), to_numpy(w), eps, to_numpy(y), to_numpy(rstd), torch.get_num_threads())
    return y.to(x.dtype).view(x.shape), rstd.view(x.shape[:-1])


def _cpu_rms_backward(dy, x, weight, rstd, dstream=None):
    acc = accumulate_dtype(x.dtype)
    rows, w = flat_rows(x.to(acc)), weight.to(acc).contiguous()
    dx, dweight = torch.empty(rows.shape, dtype=acc), torch.empty(w.shape, dtype=acc)
    arrays = flat_rows(dy.to(acc)), rows, w, rstd.view(-1), dx, dweight
    also = None if dstream is None else to_numpy(flat_rows(dstream.to(acc)))
    _host.rms_norm_backward(*map(to_numpy, arrays), also, torch.get_num_threads())
    return dx.to(x.dtype).view(x.shape), dweight.to(weight.dtype)


def _add_then(forward):
    """The forward pass of add_rms_norm for a backend whose sum is a pass of its own."""

    def add_forward(x, residual, weight, eps):
        stream = torch.add(x, residual).contiguous()
        y, rstd = forward(stream, weight, eps)
        return y, stream, rstd

    return add_forward


def _layer_forward(x, weight, bias, eps):
    acc = accumulate_dtype(x.dtype)
    X = x.to(acc)
    y, mean, rstd = torch.native_layer_norm(X, weight.shape, weight.to(acc), bias.to(acc), eps)
    return y.to(x.dtype).contiguous(), mean.squeeze(-1), rstd.squeeze(-1)


def _layer_backward(dy, x, weight, mean, rstd):
    acc = accumulate_dtype(x.dtype)
    DY, r = dy.to(acc), rstd.unsqueeze(-1)
    xhat = (x.to(acc) - mean.unsqueeze(-1)).mul_(r)
    dweight = (DY * xhat).reshape(-1, x.shape[-1]).sum(0)
    dbias = DY.reshape(-1, x.shape[-1]).sum(0)
    g = DY * weight
    dx = (g - g.mean(-1, keepdim=True)).sub_(xhat.mul_((g * xhat).mean(-1, keepdim=True))).mul_(r)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _cpu_layer_forward(x, weight, bias, eps):
    acc = accumulate_dtype(x.dtype)
    rows, w, b = flat_rows(x.to(acc)), weight.to(acc).contiguous(), bias.to(acc).contiguous()
    y, mean, rstd = (torch.empty(shape, dtype=acc) for shape in (rows.shape, rows.shape[:1], rows.shape[:1]))
    arrays = rows, w, b, y, mean, rstd
    _host.layer_norm_forward(*map(to_numpy, arrays), eps, torch.get_num_threads())
    return y.to(x.dtype).view(x.shape), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def _cpu_layer_backward(dy, x, weight, mean, rstd):
    acc = accumulate_dtype(x.dtype)
    rows, w = flat_rows(x.to(acc)), weight.to(acc).contiguous()
    dx, dweight, dbias = torch.empty(rows.shape, dtype=acc), torch.empty_like(w), torch.empty_like(w)
    arrays = flat_rows(dy.to(acc)), rows, w, mean.view(-1), rstd.view(-1), dx, dweight, dbias
    _host.layer_norm_backward(*map(to_numpy, arrays), torch.get_num_threads())
    return dx.to(x.dtype).view(x.shape), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _statistic(x):
    return x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype))


_rms_norm = define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda x, weight, eps: (x.new_empty(x.shape), _statistic(x)),
    facts=_facts,
    cpu=Backend(_cpu_rms_forward, _cpu_rms_backward, on_cpu),
    triton=jit("norms", "rms_norm_forward", "rms_norm_backward", _one_tile),
    torch=Backend(_rms_forward, rms_backward, anywhere),
)
_rms_norm_backward = define_backward(
    "rms_norm",
    "(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda dy, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    facts=_facts,
)
_add_rms_norm = define(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape), _statistic(x)),
    facts=_facts,
    cpu=Backend(_add_then(_cpu_rms_forward), _cpu_rms_backward, on_cpu),
    triton=jit("norms", "add_rms_norm_forward", "rms_norm_backward", _one_tile),
    torch=Backend(_add_then(_rms_forward), rms_backward, anywhere),
)
_add_rms_norm_backward = define_backward(
    "add_rms_norm",
    "(Tensor dy, Tensor stream, Tensor weight, Tensor rstd, Tensor? dstream) -> (Tensor, Tensor)",
    fake=lambda dy, stream, weight, rstd, dstream: (stream.new_empty(stream.shape), weight.new_empty(weight.shape)),
    facts=_facts,
)
_layer_norm = define(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, weight, bias, eps: (x.new_empty(x.shape), _statistic(x), _statistic(x)),
    facts=_facts,
    cpu=Backend(_cpu_layer_forward, _cpu_layer_backward, on_cpu),
    triton=jit("norms", "layer_norm_forward", "layer_norm_backward", _one_tile),
    torch=Backend(_layer_forward, _layer_backward, anywhere),
)
_layer_norm_backward = define_backward(
    "layer_norm",
    "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    fake=lambda dy, x, weight, *rest: (x.new_empty(x.shape), *(weight.new_empty(weight.shape) for _ in range(2))),
    facts=_facts,
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        with below_autograd():
            y, rstd = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        return *_rms_norm_backward(dy, *ctx.saved_tensors), None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        with below_autograd():
            y, stream, rstd = _add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(stream, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)  # the last norm of a model has no reader of its stream
        return y, stream, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstream, _):
        stream, weight, rstd = ctx.saved_tensors
        dy = torch.zeros_like(stream) if dy is None else dy
        dx, dweight = _add_rms_norm_backward(dy, stream, weight, rstd, dstream)
        return dx, dx, dweight, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        with below_autograd():
            y, mean, rstd = _layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        return *_layer_norm_backward(dy, *ctx.saved_tensors), None


define_autograd("rms_norm", _RmsNorm)
define_autograd("add_rms_norm", _AddRmsNorm)
define_autograd("layer_norm", _LayerNorm)
