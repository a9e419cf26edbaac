"""Lookup-free quantisation (Yu et al. 2023, MAGVIT-v2): a code is the signs of the channels, its index their bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from vkernels.arguments import require_floats, require_indices
from vkernels.registry import Backend, accumulate_dtype, anywhere, below_autograd, define, define_autograd, jit

_LEAST = 1e-30  # of a probability under the logarithm: its slope there stays finite


def lfq_quantize(z: torch.Tensor, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """z[..., d] -> (codes[..., d] of z's dtype, scale where z > 0 else -scale; ids int32[...] in 0..2^d-1), d <= 31.

    Channel i is bit i of the id. The gradient of the codes passes straight to z.
    """
    require_floats("lfq_quantize", z=z)
    if z.dim() == 0 or not 1 <= z.shape[-1] <= 31:
        raise ValueError(f"lfq_quantize: z {list(z.shape)}; expected 1 to 31 channels in the last dimension")
    return _op(z, scale)


def lfq_dequantize(ids: torch.Tensor, dim: int, *, scale: float = 1.0) -> torch.Tensor:
    """ids int[...] -> codes float32[..., dim], the inverse of `lfq_quantize`'s ids."""
    require_indices("lfq_dequantize", ids=ids)
    if not 1 <= dim <= 31:
        raise ValueError(f"lfq_dequantize: dim {dim}, expected 1 to 31")
    bits = (ids.unsqueeze(-1) >> torch.arange(dim, device=ids.device, dtype=ids.dtype)) & 1
    return torch.where(bits == 1, scale, -scale).float()


def lfq_entropy(
    z: torch.Tensor, groups: int, temperature: float, *, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """z[..., d] -> (entropy of each row's soft code float32[...], entropy of the batch's float32[]), in nats.

    The soft code is softmax(-|z - code|^2 / temperature) over all 2^d codes, whose bits are independent: bit i is set
    with probability sigmoid(4 scale z_i / temperature). MAGVIT-v2 lowers the first and raises the second. The second is
    that of the mean over rows, which does not factorise; it is taken of `groups` groups of d / groups neighbouring
    bits each and summed: an upper bound, exact for one group. Memory is N * 2^(d/groups/2 + 1) + groups * 2^(d/groups).
    """
    require_floats("lfq_entropy", z=z)
    d = z.shape[-1]
    if not temperature > 0:
        raise ValueError(f"lfq_entropy: temperature {temperature}, expected a positive one")
    if groups < 1 or not d or d % groups:
        raise ValueError(f"lfq_entropy: {groups} groups of {d} channels; expected a number that divides them")
    logits = z.to(accumulate_dtype(z.dtype)) * (4 * scale / temperature)
    on, off = torch.sigmoid(logits), torch.sigmoid(-logits)
    # -p log p - (1 - p) log(1 - p), with log p = -softplus(-logit)
    sample = (on * F.softplus(-logits) + off * F.softplus(logits)).sum(-1)
    on, off = (t.reshape(-1, groups, d // groups) for t in (on, off))
    middle = d // groups // 2
    low, high = (_joint(on[..., part], off[..., part]) for part in (slice(0, middle), slice(middle, None)))
    with torch.autocast(z.device.type, enabled=False):  # probabilities of a few millionths, in bf16
        mean = torch.einsum("ngi,ngj->gij", high, low) / max(on.shape[0], 1)
    return sample, -(mean * mean.clamp_min(_LEAST).log()).sum()


def _joint(on: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """The probabilities [N, groups, b] of bits set and not set -> [N, groups, 2^b], of all values of the b bits."""
    table = on.new_ones(*on.shape[:2], 1)
    for i in range(on.shape[2]):
        table = torch.cat([table * off[..., i : i + 1], table * on[..., i : i + 1]], dim=-1)
    return table


def _forward(z, scale):
    bits = z > 0
    weights = torch.arange(z.shape[-1], device=z.device, dtype=torch.int32)
    ids = (bits.to(torch.int32) << weights).sum(-1, dtype=torch.int32)
    codes = torch.where(bits, scale, -scale).to(z.dtype)
    return torch.where(z.isnan(), z, codes).contiguous(), ids  # NaN stays to be seen


_op = define(
    "lfq_quantize",
    "(Tensor z, float scale) -> (Tensor, Tensor)",
    fake=lambda z, scale: (z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int32)),
    triton=jit("fsq", "lfq_quantize"),
    torch=Backend(_forward, None, anywhere),
)


class _LfqQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, scale):
        with below_autograd():
            codes, ids = _op(z, scale)
        ctx.mark_non_differentiable(ids)
        return codes, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, dcodes, _):
        return dcodes, None


define_autograd("lfq_quantize", _LfqQuantize)
