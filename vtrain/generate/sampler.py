"""From logits to a token: penalty -> guide -> temperature -> top-k -> top-p -> draw, in one op of vkernels.

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
    """How to draw. cfg: guidance scale (1 = none); temperature 0 = argmax; top_k 0 and top_p 1 = keep everything.

    repetition_penalty: logits of ids that are in the prompt or were drawn are divided by it where positive, multiplied
    where negative, before guidance and in the conditional branch only (1 = off). speculate: the window of Jacobi
    decoding (0 = off), which draws from the same distribution in fewer forwards.
    """

    cfg: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    speculate: int = 0

    def __post_init__(self) -> None:
        rules = {
            "cfg": (self.cfg >= 0, "at least 0"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 = off)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1 = off)"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1 = off)"),
            "speculate": (self.speculate >= 0, "at least 0 (0 = off)"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f"sampling: {name} is {getattr(self, name)}; expected {expected}")
        if self.speculate and self.penalised:  # what is seen changes inside a window
            raise ValueError(
                f"sampling: repetition_penalty is {self.repetition_penalty}; expected 1 with speculate {self.speculate}"
            )

    @property
    def guided(self) -> bool:
        """Whether the unconditional branch is needed at all."""
        return self.cfg != 1.0

    @property
    def penalised(self) -> bool:
        """Whether it matters what is in the prompt and was drawn."""
        return self.repetition_penalty != 1.0


def key_rows(keys: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """u64 sample keys as the op takes them: int64[B] that carries their bits."""
    table = np.array([key % 2**64 for key in keys], dtype=np.uint64)
    return torch.from_numpy(table.view(np.int64)).to(device)


def sample_token(
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    keys: torch.Tensor,
    step: int | torch.Tensor,
    sampling: Sampling,
    seen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row: (int64[B] tokens, float32[B] their log-probabilities, NaN where a row has no valid logit).

    cond, uncond: logits [B, V] (uncond only where `sampling.guided`); keys: `key_rows`; step: the token's number, an
    int or int64[] on the device; seen: bool[B, V], needed where `sampling.penalised`.
    """
    return sample_logits(
        cond,
        uncond=uncond if sampling.guided else None,
        guidance=sampling.cfg,
        seen=seen if sampling.penalised else None,
        penalty=sampling.repetition_penalty,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        step=step,
        keys=keys,
        return_logprob=True,
    )
