"""From logits to a token: guide -> temperature -> top-k -> top-p -> draw, in one op (`vkernels.sample_logits`).

The draw is a function of (seed, sample key, step) and of the sample's own logits, so a sample does not depend on the
batch it is drawn in. Legend: B sequences, V tokens of the sampled range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vkernels import sample_logits


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


def key_rows(keys: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """u64 sample keys as the op takes them: int64[B] that carries their bits."""
    table = np.array([key % 2**64 for key in keys], dtype=np.uint64)
    return torch.from_numpy(table.view(np.int64)).to(device)


def sample_token(
    cond: torch.Tensor, uncond: torch.Tensor | None, keys: torch.Tensor, step: int, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row: (int64[B] tokens, float32[B] their log-probabilities, NaN where a row has no valid logit).

    cond, uncond: logits [B, V] (uncond only where `sampling.guided`); keys: `key_rows`; step: the token's number.
    """
    return sample_logits(
        cond,
        uncond=uncond if sampling.guided else None,
        guidance=sampling.cfg,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        step=step,
        keys=keys,
        return_logprob=True,
    )
