"""From logits to a token, as pure functions in this order: guide -> temperature -> top-k -> top-p -> draw.

The draw is Gumbel-max with noise from the counter RNG on (seed, sample key, step, token), so a sample does not depend
on the batch it is drawn in. Legend: B sequences, V tokens of the sampled range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vtrain.rng import fold_array, uniform_tensor


@dataclass(frozen=True)
class Sampling:
    """How to draw. cfg: guidance scale (1 = none); temperature 0 = argmax; top_k 0 and top_p 1 = keep everything."""

    cfg: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "cfg": (self.cfg >= 0, "at least 0"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 = off)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1 = off)"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f"sampling: {name} is {getattr(self, name)}; expected {expected}")

    @property
    def guided(self) -> bool:
        """Whether the unconditional branch is needed at all."""
        return self.cfg != 1.0


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance on log-probabilities: u + scale * (c - u), float32[B, V] from logits [B, V]."""
    c = cond.float().log_softmax(-1)
    u = uncond.float().log_softmax(-1)
    return u + scale * (c - u)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Logits [B, V] with -inf below the k-th largest of the row; tokens equal to the k-th stay. 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Logits [B, V] with -inf outside the fewest likeliest tokens whose probability reaches p.

    The likeliest token always stays, and tokens as likely as the last one kept stay too.
    """
    if p >= 1.0:
        return logits
    ordered = logits.sort(dim=-1, descending=True).values
    probs = ordered.double().softmax(-1)
    kept = probs.cumsum(-1) - probs < p  # a token stays while the mass before it is below p
    smallest = ordered.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    return logits.masked_fill(logits < smallest, -torch.inf)


def noise_keys(seed: int, keys: Sequence[int], steps: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """RNG keys of every step and sequence from u64 sample keys: int64[steps, B], equal to fold(seed, key, step)."""
    rows = fold_array(np.uint64(seed % 2**64), np.array([key % 2**64 for key in keys], dtype=np.uint64))
    table = fold_array(rows[None], np.arange(steps, dtype=np.uint64)[:, None])
    return torch.from_numpy(table.view(np.int64)).to(device)


def gumbel_noise(keys: torch.Tensor, size: int) -> torch.Tensor:
    """Standard Gumbel noise float64[B, size] from the keys of one step, int64[B]."""
    u = uniform_tensor(keys[:, None], torch.arange(size, device=keys.device))
    return -torch.log(-torch.log(u.clamp(min=2.0**-54)))  # u is a multiple of 2**-53 in [0, 1): both ends stay finite


def sample_token(
    cond: torch.Tensor, uncond: torch.Tensor | None, keys: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row: (int64[B] tokens, float[B] their noisy scores, not finite where a row has no valid logit).

    cond, uncond: logits [B, V] (uncond only where `sampling.guided`); keys: int64[B], a row of `noise_keys`.
    """
    logits = guide(cond, uncond, sampling.cfg) if sampling.guided else cond.float()
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
        logits = keep_top_p(keep_top_k(logits, sampling.top_k), sampling.top_p)
        logits = logits + gumbel_noise(keys, logits.shape[-1])
    scores, tokens = logits.max(dim=-1)
    return tokens, scores
