"""SwiGLU: silu(gate) * up in one op, saving only its two inputs."""

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
    on_cpu,
)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate[..., F]) * up[..., F] -> [..., F] of gate's dtype, computed in float32."""
    return _op(gate, up)


def _forward(gate, up):
    acc = accumulate_dtype(gate.dtype)
    return torch.nn.functional.silu(gate.to(acc)).mul(up).to(gate.dtype).contiguous()


def _backward(dy, gate, up):
    acc = accumulate_dtype(gate.dtype)
    DY, g = dy.to(acc), gate.to(acc)
    s = torch.sigmoid(g)
    silu = g * s
    dup = (DY * silu).to(up.dtype)
    # d silu / d gate = s + silu * (1 - s)
    dgate = silu.mul_(1 - s).add_(s).mul_(DY).mul_(up)
    return dgate.to(gate.dtype).contiguous(), dup.contiguous()


def _cpu_forward(gate, up):
    acc = accumulate_dtype(gate.dtype)
    g, u = flat_rows(gate.to(acc)), flat_rows(up.to(acc))
    y = torch.empty(g.shape, dtype=acc)
    _host.swiglu_forward(to_numpy(g), to_numpy(u), to_numpy(y), torch.get_num_threads())
    return y.to(gate.dtype).view(gate.shape)


def _cpu_backward(dy, gate, up):
    acc = accumulate_dtype(gate.dtype)
    g, u = flat_rows(gate.to(acc)), flat_rows(up.to(acc))
    dgate, dup = torch.empty(g.shape, dtype=acc), torch.empty(g.shape, dtype=acc)
    arrays = dy.to(acc).contiguous().view(g.shape), g, u, dgate, dup
    _host.swiglu_backward(*map(to_numpy, arrays), torch.get_num_threads())
    return dgate.to(gate.dtype).view(gate.shape), dup.to(up.dtype).view(up.shape)


def _fake_forward(gate, up):
    return gate.new_empty(gate.shape)


def _fake_backward(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_op = define(
    "swiglu",
    "(Tensor gate, Tensor up) -> Tensor",
    fake=_fake_forward,
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    torch=Backend(_forward, _backward, anywhere),
)
_backward_op = define_backward("swiglu", "(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", fake=_fake_backward)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        with below_autograd():
            return _op(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _backward_op(dy, *ctx.saved_tensors)


define_autograd("swiglu", _SwiGlu)
