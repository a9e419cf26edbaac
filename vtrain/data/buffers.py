"""Host memory of batches, used again as soon as nobody looks at it any more: fresh pages cost a third of a gather."""

from __future__ import annotations

import sys
from collections import defaultdict

import numpy as np
import torch

SPARE = 4  # free slabs of one shape that are kept
_UNUSED = 2  # references to a slab that nobody holds: the pool's list and the argument of getrefcount


class Buffers:
    """`take(shape, dtype)` gives an uninitialised array, and a tensor of its memory, that nobody uses yet.

    A slab is free when the pool's own is the last reference to its array: tensors and numpy views of it hold one each.
    pinned: page-locked memory instead, for asynchronous copies to a GPU. For one thread at a time.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._slabs: defaultdict[tuple, list[np.ndarray]] = defaultdict(list)

    def take(self, shape: tuple[int, ...], dtype: type) -> tuple[np.ndarray, torch.Tensor]:
        if self.pinned:
            # torch's caching host allocator is a ring already: a block is used again once its tensors are gone and the
            # copies that were issued from it have passed their events.
            tensor = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
            return tensor.numpy(), tensor
        slabs = self._slabs[shape, dtype]
        free = [i for i in range(len(slabs)) if sys.getrefcount(slabs[i]) == _UNUSED]
        for i in reversed(free[SPARE:]):
            del slabs[i]
        if not free:
            slabs.append(np.empty(shape, dtype))
        slab = slabs[free[0] if free else -1]
        return slab, torch.from_numpy(slab)

    def bytes(self) -> int:
        """What the pool holds, in use or not."""
        return sum(slab.nbytes for slabs in self._slabs.values() for slab in slabs)
