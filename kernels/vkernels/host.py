"""Between tensors and the host kernels, which take numpy views."""

from __future__ import annotations

import math

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack


def to_numpy(x: torch.Tensor):
    """A numpy view that shares memory, also of a tensor that requires a gradient.

    It goes through an alias: `x.numpy()` itself would forbid for good to resize the storage of `x`, and FSDP does that.
    """
    return from_dlpack(to_dlpack(x.detach())).numpy()


def flat_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [N, C] with the elements of a row side by side; rows may be apart. A view where possible."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(1) == 1 else rows.contiguous()


def dense_heads(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D] with a row's heads side by side; rows may be apart. A view where possible."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
