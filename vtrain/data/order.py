"""The order of one epoch: a keyed permutation of 0..n-1 that is computed, not stored.

An alternating Feistel network on Z_a x Z_b with a * b just above n, walked until it lands below n. Integers only, so
it is the same on every host. Below 4096 samples, where six rounds are not yet uniform, an explicit table.
"""

from __future__ import annotations

import math

import numpy as np

from vtrain.rng import fold, fold_array

ROUNDS = 6
TABLE_BELOW = 4096
_LOW32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


class Order:
    """A permutation of 0..n-1: `order(positions) -> ids`, int64 arrays of any equal shape.

    key: any 64-bit integer; see `epoch_key`. n may be up to 2**62.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 0 < n <= 2**62:
            raise ValueError(f"the order of {n} samples: expected 1..2**62")
        self.n = n
        self._table = _shuffled(n, key) if n < TABLE_BELOW else None
        self._b = np.uint64(math.isqrt(n - 1) + 1)
        self._a = np.uint64(-(-n // int(self._b)))
        self._keys = [np.uint64(fold(key, r) & 0xFFFFFFFF) for r in range(ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not (positions.min() >= 0 and positions.max() < self.n):
            raise IndexError(
                f"positions {positions.min()}..{positions.max()} are outside the order of {self.n} samples"
            )
        if self._table is not None:
            return self._table[positions]
        ids = self._permute(positions.astype(np.uint64).ravel())
        outside = np.flatnonzero(ids >= self.n)
        while outside.size:  # cycle walking; a * b - n < b, so few need it
            ids[outside] = self._permute(ids[outside])
            outside = outside[ids[outside] >= self.n]
        return ids.astype(np.int64).reshape(positions.shape)

    def _permute(self, p: np.ndarray) -> np.ndarray:
        x, y = np.divmod(p, self._b)  # x in Z_a, y in Z_b
        for r, key in enumerate(self._keys):
            if r % 2 == 0:
                x = _add(x, _murmur(y ^ key), self._a)
            else:
                y = _add(y, _murmur(x ^ key), self._b)
        return x * self._b + y


def epoch_key(seed: int, uuid64: int, epoch: int) -> int:
    """The key of one dataset's order in one epoch."""
    return fold(seed, "order", uuid64, epoch)


def _add(half: np.ndarray, draw: np.ndarray, modulus: np.uint64) -> np.ndarray:
    """half + (a 32-bit draw scaled to 0..modulus-1), modulo modulus. u64, both terms below 2**32."""
    total = half + ((draw * modulus) >> _32)
    return np.where(total >= modulus, total - modulus, total)


def _murmur(h: np.ndarray) -> np.ndarray:
    """murmur3's 32-bit finaliser on u64 lanes (products stay below 2**64)."""
    h = h & _LOW32
    h = ((h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & _LOW32
    h = ((h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & _LOW32
    return h ^ (h >> np.uint64(16))


def _shuffled(n: int, key: int) -> np.ndarray:
    """Fisher-Yates with one counter draw per position: entry i swaps with one of 0..i."""
    i = np.arange(n, dtype=np.uint64)
    partner = (((fold_array(key, i) >> _32) * (i + np.uint64(1))) >> _32).tolist()
    table = list(range(n))
    for at in range(n - 1, 0, -1):
        other = partner[at]
        table[at], table[other] = table[other], table[at]
    return np.array(table, dtype=np.int64)
