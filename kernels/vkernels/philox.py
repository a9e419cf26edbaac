"""Philox4x32-10 (Salmon et al. 2011): random words that are a function of a seed and a counter, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

LOW = (1 << 32) - 1


def philox(seed: int, counter: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Four words of 32 bits (int64 tensors) of a 64-bit seed and a counter of four words (int64 tensors, broadcast).

    Triton's tl.philox gives the same ones.
    """
    a, b, c, d = counter
    k, l = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64: as unsigned, all 64 bits of the product
        a, b, c, d = ((y >> 32) & LOW) ^ b ^ k, y & LOW, ((x >> 32) & LOW) ^ d ^ l, x & LOW
        k, l = (k + 0x9E3779B9) & LOW, (l + 0xBB67AE85) & LOW
    return a, b, c, d


def signed(word: int) -> int:
    """The int64 with the bits of the lowest 64 of `word`: how a seed goes through an op."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
