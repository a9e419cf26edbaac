"""Finite scalar quantisation (Mentzer et al. 2023) in the form of NVIDIA Cosmos: no codebook, one digit per channel.

Channel i has L = levels[i] values; index = sum of digit_i * basis_i, basis being the exclusive product of levels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from vkernels.registry import (
    Backend,
    accumulate_dtype,
    anywhere,
    below_autograd,
    define,
    define_autograd,
    define_backward,
)

_EPS = 1e-3  # widens the bound so that the outer levels are reached before tanh saturates


def fsq_quantize(z: torch.Tensor, levels: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """z[..., d] -> (codes[..., d] of z's dtype, in [-1, 1]; ids int32[...] in 0..prod(levels)-1).

    y = tanh(z + shift) * half - offset is rounded half to even and divided by L // 2. Straight-through gradient: the
    rounding passes it unchanged, the tanh does not.
    """
    return _quantize(z, _checked(levels, z.shape[-1]))


def fsq_dequantize(ids: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """ids int[...] -> codes float32[..., d], the inverse of `fsq_quantize`'s ids."""
    return _dequantize(ids, _checked(levels, len(levels)))


def _checked(levels, d):
    levels = list(levels)
    size = 1
    for L in levels:
        size *= L
    if len(levels) != d or min(levels, default=0) < 2 or size >= 2**31:
        raise ValueError(f"fsq: levels {levels} for {d} channels; expected {d} integers >= 2 with a product < 2**31")
    return levels


@functools.lru_cache(maxsize=64)
def _constants(levels: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    """(half, offset, shift, L // 2) of each channel, and the basis, as tensors on `device`."""
    L = torch.tensor(levels, dtype=torch.int32)
    half = (L - 1).to(dtype) * (1 + _EPS) / 2
    offset = torch.where(L % 2 == 0, 0.5, 0.0).to(dtype)
    basis = torch.ones_like(L)
    basis[1:] = L[:-1].cumprod(0)
    made = half, offset, torch.atanh(offset / half), (L // 2).to(dtype), basis.to(torch.int32)
    return tuple(t.to(device) for t in made)


def _quantize_forward(z, levels):
    acc = accumulate_dtype(z.dtype)
    half, offset, shift, width, basis = _constants(tuple(levels), acc, z.device)
    q = ((z.to(acc) + shift).tanh_() * half).sub_(offset).round_()
    ids = ((q + width).to(torch.int32) * basis).sum(-1, dtype=torch.int32)
    return (q / width).to(z.dtype).contiguous(), ids


def _quantize_backward(dcodes, z, levels):
    acc = accumulate_dtype(z.dtype)
    half, _, shift, width, _ = _constants(tuple(levels), acc, z.device)
    slope = 1 - (z.to(acc) + shift).tanh_().square_()
    return (dcodes.to(acc) * slope.mul_(half / width)).to(z.dtype).contiguous()


def _dequantize_forward(ids, levels):
    _, _, _, width, basis = _constants(tuple(levels), torch.float32, ids.device)
    L = _levels_tensor(tuple(levels), ids.device)
    digits = torch.div(ids.unsqueeze(-1), basis, rounding_mode="floor") % L
    return (digits - width) / width


@functools.lru_cache(maxsize=64)
def _levels_tensor(levels: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.int32).to(device)


_quantize = define(
    "fsq_quantize",
    "(Tensor z, int[] levels) -> (Tensor, Tensor)",
    fake=lambda z, levels: (z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int32)),
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
