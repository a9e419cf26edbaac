"""The order of one epoch: a keyed permutation of 0..n-1 that is computed, not stored, the same on every host.

`Order(n, key)` mixes all samples; `BlockOrder` reads block by block, for disks and object stores; `StoredOrder` is the
order in which they lie. All give objects with `order(positions) -> int64 ids` and `order.range(start, count)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtrain import _host
from vtrain._host import Order
from vtrain.rng import fold

__all__ = ["BlockOrder", "Order", "StoredOrder", "epoch_key", "epoch_order"]


@dataclass(frozen=True)
class BlockOrder:
    """Blocks of `block` consecutive samples in permuted order, `open` at a time, their samples permuted.

    A window of block * open samples should hold 50 steps or more, and sorted data be shuffled once before.
    """

    block: int = 4096
    open: int = 64

    def __post_init__(self) -> None:
        if self.block < 1 or self.open < 1:
            raise ValueError(f"block order: block {self.block}, open {self.open}; expected both >= 1")

    def of(self, n: int, key: int) -> _host.BlockOrder:
        return _host.BlockOrder(n, key, self.block, self.open)


@dataclass(frozen=True)
class StoredOrder:
    """No shuffling: for validation."""

    def of(self, n: int, key: int) -> _Stored:
        return _Stored()


class _Stored:
    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions, dtype=np.int64)

    def range(self, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count, dtype=np.int64)


def epoch_key(seed: int, uuid64: int, epoch: int) -> int:
    """The key of one dataset's order in one epoch."""
    return fold(seed, "order", uuid64, epoch)


def epoch_order(
    kind: BlockOrder | StoredOrder | None, n: int, seed: int, uuid64: int, epoch: int
) -> Order | _host.BlockOrder | _Stored:
    """The order of one epoch of n samples; kind None = all samples mixed."""
    key = epoch_key(seed, uuid64, epoch)
    return Order(n, key) if kind is None else kind.of(n, key)
