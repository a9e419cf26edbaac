"""What several ops ask of their arguments: tensors of a kind of dtype, ranges of a vocabulary that lie apart.

Shapes are each op's own to check; that all tensors are on one device, the registry's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)  # unsigned ones wrap where a base is taken off


def require_floats(op: str, **arguments: object) -> None:
    """ValueError unless each argument is a real floating-point tensor, or a list of such."""
    for name, value in arguments.items():
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                raise ValueError(f"{op}: {name} is {_kind(x)}, expected a floating-point tensor")


def require_indices(op: str, **arguments: object) -> None:
    """ValueError unless each argument is a tensor of signed integers, or a list of such."""
    for name, value in arguments.items():
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(x, torch.Tensor) or x.dtype not in INTEGERS:
                raise ValueError(f"{op}: {name} is {_kind(x)}, expected a tensor of signed integers")


def _kind(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"


def require_separate(op: str, bases: Sequence[int], sizes: Sequence[int]) -> None:
    """ValueError unless the ranges [base, base + size) of a vocabulary lie apart, from 0 on."""
    if len(bases) != len(sizes) or any(n < 0 for n in (*bases, *sizes)):
        raise ValueError(f"{op}: bases {list(bases)}, sizes {list(sizes)}; expected as many of each, none negative")
    ranges = sorted((base, base + size) for base, size in zip(bases, sizes) if size)
    for (begin, end), (following, _) in pairwise(ranges):
        if end > following:
            found = f"the ranges [{begin}, {end}) and from {following} on overlap"
            raise ValueError(f"{op}: {found}; expected each id in at most one")
