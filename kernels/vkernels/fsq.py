"""Finite scalar quantisation (Mentzer et al. 2023) in the form of NVIDIA Cosmos: no codebook, one digit per channel.

Channel i has L = levels[i] values; index = sum of digit_i * basis_i, basis being the exclusive product of levels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from vkernels.arguments import require_floats, require_indices
from vkernels.registry import (
    Backend,
    accumulate_dtype,
    anywhere,
    below_autograd,
    define,
    define_autograd,
    define_backward,
    jit,
)

_EPS = 1e-3  # widens the bound so that the outer levels are reached before tanh saturates


def fsq_quantize(z: torch.Tensor, levels: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """z[..., d] -> (codes[..., d] of z's dtype, in [-1, 1]; ids int32[...] in 0..prod(levels)-1).

    y = tanh(z + shift) * half - offset is rounded half to even and divided by L // 2. Straight-through gradient: the
    rounding passes it unchanged, the tanh does not. Computed in float32: the same as in float64 unless y lies within
    2e-7 * L of the middle between two levels.
    """
    require_floats("fsq_quantize", z=z)
    return _quantize(z, _checked("fsq_quantize", levels, z.shape[-1]))


def fsq_dequantize(ids: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """ids int[...] -> codes float32[..., d], the inverse of `fsq_quantize`'s ids."""
    require_indices("fsq_dequantize", ids=ids)
    return _dequantize(ids, _checked("fsq_dequantize", levels, len(levels)))


def _checked(op, levels, d):
    levels = list(levels)
    size = 1
    for L in levels:
        size *= L
    # Beyond 1000 levels the widened bound would reach half a step past the outer ones.
    if not 0 < d == len(levels) or not all(2 <= L <= 1000 for L in levels) or size >= 2**31:
        raise ValueError(
            f"{op}: levels {levels} for {d} channels; expected {d} integers in 2..1000 with a product < 2**31"
        )
    return levels


class Channels(NamedTuple):
    """The constants of each channel: y = tanh(z + shift) * half - offset, code = round(y) / width."""

    half: torch.Tensor
    offset: torch.Tensor
    shift: torch.Tensor
    width: torch.Tensor  # L // 2
    basis: torch.Tensor  # int32: what one step of its digit adds to the index
    levels: torch.Tensor  # int32


@functools.lru_cache(maxsize=64)
def channels(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Channels:
    """The constants in `dtype` on `device`, rounded once: for two levels atanh magnifies an error by 500."""
    L = torch.tensor(levels, dtype=torch.int32)
    half = (L - 1).double() * (1 + _EPS) / 2
    offset = torch.where(L % 2 == 0, 0.5, 0.0).double()
    basis = torch.ones_like(L)
    basis[1:] = L[:-1].cumprod(0)
    made = (half, offset, torch.atanh(offset / half), L // 2)
    return Channels(*(t.to(device, dtype) for t in made), basis.to(device), L.to(device))


def _quantize_forward(z, levels):
    acc = accumulate_dtype(z.dtype)
    c = channels(tuple(levels), acc, z.device)
    q = ((z.to(acc) + c.shift).tanh_() * c.half).sub_(c.offset).round_()
    ids = ((q + c.width).to(torch.int32) * c.basis).sum(-1, dtype=torch.int32)
    return (q / c.width).to(z.dtype).contiguous(), ids


def _quantize_backward(dcodes, z, levels):
    acc = accumulate_dtype(z.dtype)
    c = channels(tuple(levels), acc, z.device)
    slope = 1 - (z.to(acc) + c.shift).tanh_().square_()
    return (dcodes.to(acc) * slope.mul_(c.half / c.width)).to(z.dtype).contiguous()


def _dequantize_forward(ids, levels):
    c = channels(tuple(levels), torch.float32, ids.device)
    digits = torch.div(ids.unsqueeze(-1), c.basis, rounding_mode="floor") % c.levels
    return (digits - c.width) / c.width


_quantize = define(
    "fsq_quantize",
    "(Tensor z, int[] levels) -> (Tensor, Tensor)",
    fake=lambda z, levels: (z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int32)),
    triton=jit("fsq", "fsq_quantize", "fsq_quantize_backward"),
    torch=Backend(_quantize_forward, _quantize_backward, anywhere),
)
_quantize_grad = define_backward(
    "fsq_quantize",
    "(Tensor dcodes, Tensor z, int[] levels) -> Tensor",
    fake=lambda dcodes, z, levels: z.new_empty(z.shape),
)
_dequantize = define(
    "fsq_dequantize",
    "(Tensor ids, int[] levels) -> Tensor",
    fake=lambda ids, levels: ids.new_empty((*ids.shape, len(levels)), dtype=torch.float32),
    triton=jit("fsq", "fsq_dequantize"),
    torch=Backend(_dequantize_forward, None, anywhere),
)


class _FsqQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, levels):
        with below_autograd():
            codes, ids = _quantize(z, levels)
        ctx.save_for_backward(z)
        ctx.levels = levels
        ctx.mark_non_differentiable(ids)
        return codes, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, dcodes, _):
        return _quantize_grad(dcodes, *ctx.saved_tensors, ctx.levels), None


define_autograd("fsq_quantize", _FsqQuantize)
