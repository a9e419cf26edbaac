"""Gated and plain activations in one op each, saving only their inputs: SwiGLU, GEGLU, quick GELU.

Each is a value(gate) * up, where `act` names the value: "silu", "gelu" (exact), "gelu_tanh", "quick_gelu".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate[..., F]) * up[..., F] -> [..., F] of their dtype, computed in float32.

    Without `up`, gate is [..., 2F], gates before ups, as a merged projection gives it: same numbers, and the gradient
    is written as one tensor, where that of two halves costs a copy to join them.
    """
    _check("swiglu", gate, up)
    return _swiglu(gate, up)


def geglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, approximate: str = "none") -> torch.Tensor:
    """gelu(gate[..., F]) * up[..., F] -> [..., F], else as swiglu. approximate: "none", the exact GELU, or "tanh"."""
    _check("geglu", gate, up)
    if approximate not in _GELUS:
        raise ValueError(f"geglu: approximate {approximate!r}, expected one of {', '.join(map(repr, _GELUS))}")
    return _geglu(gate, up, _GELUS[approximate])


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), CLIP's GELU, of x's shape and dtype, computed in float32."""
    require_floats("quick_gelu", x=x)
    return _quick_gelu(x)


_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def _check(op: str, gate: torch.Tensor, up: torch.Tensor | None) -> None:
    require_floats(op, gate=gate, up=gate if up is None else up)
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"{op}: gate {list(gate.shape)} without up, expected gates and ups in an even last dimension"
            )
    elif up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"{op}: up {list(up.shape)} {up.dtype}, expected gate's {list(gate.shape)} {gate.dtype}")


def halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up), which are the halves of `gate` where up is None."""
    return gate.chunk(2, -1) if up is None else (gate, up)


def _value(x, act):
    if act == "silu":
        return F.silu(x)
    if act == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def _value_backward(dy, x, act):
    """dy times the derivative of the value."""
    if act == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if act == "quick_gelu":
        s = torch.sigmoid(1.702 * x)
        return dy * s * (1 + 1.702 * x * (1 - s))
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if act == "gelu_tanh" else "none")


def _gated_forward(gate, up, act):
    gate, up = halves(gate, up)
    return _value(gate.to(accumulate_dtype(gate.dtype)), act).mul(up).to(gate.dtype).contiguous()


def _gated_backward(dy, gate, up, act):
    """-> the gradients of gate and up side by side, [..., 2F]."""
    gate, up = halves(gate, up)
    acc = accumulate_dtype(gate.dtype)
    DY, g = dy.to(acc), gate.to(acc)
    return torch.cat([_value_backward(DY * up, g, act), DY * _value(g, act)], -1).to(gate.dtype)


def _cpu_forward(gate, up):
    gate, up = halves(gate, up)
    acc = accumulate_dtype(gate.dtype)
    g, u = flat_rows(gate.to(acc)), flat_rows(up.to(acc))
    y = torch.empty(g.shape, dtype=acc)
    _host.swiglu_forward(to_numpy(g), to_numpy(u), to_numpy(y), torch.get_num_threads())
    return y.to(gate.dtype).view(gate.shape)


def _cpu_backward(dy, gate, up):
    gate, up = halves(gate, up)
    acc = accumulate_dtype(gate.dtype)
    g, u = flat_rows(gate.to(acc)), flat_rows(up.to(acc))
    both = torch.empty(g.shape[0], 2 * g.shape[1], dtype=acc)
    arrays = flat_rows(dy.to(acc)), g, u, *both.chunk(2, -1)
    _host.swiglu_backward(*map(to_numpy, arrays), torch.get_num_threads())
    return both.to(gate.dtype).view(_both_shape(gate))


def _both_shape(half):
    return (*half.shape[:-1], 2 * half.shape[-1])


def _fake(gate, up, *act):
    return gate.new_empty(halves(gate, up)[0].shape)


def _fake_backward(dy, gate, up, *act):
    return gate.new_empty(_both_shape(dy))


_swiglu = define(
    "swiglu",
    "(Tensor gate, Tensor? up) -> Tensor",
    fake=_fake,
    cpu=Backend(_cpu_forward, _cpu_backward, on_cpu),
    triton=jit("activations", "swiglu_forward", "swiglu_backward"),
    torch=Backend(lambda *args: _gated_forward(*args, "silu"), lambda *args: _gated_backward(*args, "silu"), anywhere),
)
_swiglu_backward = define_backward("swiglu", "(Tensor dy, Tensor gate, Tensor? up) -> Tensor", fake=_fake_backward)
_geglu = define(
    "geglu",
    "(Tensor gate, Tensor? up, str act) -> Tensor",
    fake=_fake,
    triton=jit("activations", "gated_forward", "gated_backward"),
    torch=Backend(_gated_forward, _gated_backward, anywhere),
)
_geglu_backward = define_backward(
    "geglu", "(Tensor dy, Tensor gate, Tensor? up, str act) -> Tensor", fake=_fake_backward
)
_quick_gelu = define(
    "quick_gelu",
    "(Tensor x) -> Tensor",
    fake=lambda x: x.new_empty(x.shape),
    triton=jit("activations", "quick_gelu_forward", "quick_gelu_backward"),
    torch=Backend(
        lambda x: _value(x.to(accumulate_dtype(x.dtype)), "quick_gelu").to(x.dtype).contiguous(),
        lambda dy, x: _value_backward(dy, x.to(accumulate_dtype(x.dtype)), "quick_gelu").to(x.dtype).contiguous(),
        anywhere,
    ),
)
_quick_gelu_backward = define_backward(
    "quick_gelu", "(Tensor dy, Tensor x) -> Tensor", fake=lambda dy, x: x.new_empty(x.shape)
)


def _gradients(both, up):
    """What autograd wants for (gate, up): one gradient of the merged input, or the two halves."""
    return (both, None) if up is None else both.chunk(2, -1)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        with below_autograd():
            return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return _gradients(_swiglu_backward(dy, gate, up), up)


class _GeGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        ctx.act = act
        with below_autograd():
            return _geglu(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        return *_gradients(_geglu_backward(dy, gate, up, ctx.act), up), None


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        with below_autograd():
            return _quick_gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _quick_gelu_backward(dy, *ctx.saved_tensors)


define_autograd("swiglu", _SwiGlu)
define_autograd("geglu", _GeGlu)
define_autograd("quick_gelu", _QuickGelu)
