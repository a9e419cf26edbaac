"""Counter-based randomness: a draw is a pure function of (key, counters), never of what was drawn before.

So a document's caption choice or the reset of a codebook entry is the same on any rank, in any batch and after any
resume. The mixer is splitmix64's finaliser (Steele, Lea, Flood 2014) applied once per word. The numpy and the torch
form are bit-identical: integers wrap modulo 2**64 in both.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def fold(key: int, *words: int | str) -> int:
    """A new 64-bit key from a key and any words (integers or names)."""
    key = int(key)  # a numpy scalar would wrap with a warning, or not take the mask
    for word in words:
        if isinstance(word, str):
            word = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        key = _mix_int(((key & _MASK) ^ _mix_int((int(word) + _GAMMA) & _MASK)) + _GAMMA & _MASK)
    return key


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def fold_array(key: int | np.ndarray, words: np.ndarray) -> np.ndarray:
    """`fold` over arrays: u64 keys, one per element of `key` and `words` broadcast together."""
    if isinstance(key, int):
        key &= _MASK
    with np.errstate(over="ignore"):
        words = _mix_numpy(np.asarray(words).astype(np.uint64) + np.uint64(_GAMMA))
        return _mix_numpy((np.asarray(key, dtype=np.uint64) ^ words) + np.uint64(_GAMMA))


def _mix_numpy(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
        return z ^ (z >> np.uint64(31))


def uniform(key: int | np.ndarray, words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one per element: the top 53 bits of `fold_array`."""
    return (fold_array(key, words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:  # logical: torch shifts int64 arithmetically
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix_torch(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX2)
    return z ^ _shift(z, 31)


def fold_tensor(key: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """`fold_array` on any device: int64 tensors that carry the u64 bits."""
    words = _mix_torch(words + _signed(_GAMMA))
    return _mix_torch((key ^ words) + _signed(_GAMMA))


def key_tensor(key: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A 64-bit key as the int64 scalar tensor that `fold_tensor` takes."""
    return torch.tensor(_signed(key & _MASK), dtype=torch.int64, device=device)
