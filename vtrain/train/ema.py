"""An exponential moving average of the trained weights, by shards: what is evaluated, drawn and exported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from vtrain.train.checkpoint import Tensors
from vtrain.train.optim import AdamW


class Ema:
    """average <- decay * average + (1 - decay) * weights after every step; the average starts as the weights."""

    def __init__(self, optimizers: Iterable[AdamW], decay: float) -> None:
        self.decay = decay
        self.live = {name: shard for o in optimizers for name, shard in o.shards.items()}
        self.rows = {name: p.shape[0] for o in optimizers for name, p in o.parameters.items()}
        self.average = {name: shard.detach().clone() for name, shard in self.live.items()}

    @torch.no_grad()
    def update(self, kept: torch.Tensor) -> None:
        """kept: 1.0 on the device, or 0.0 after a step that was skipped."""
        difference = torch._foreach_sub(list(self.live.values()), list(self.average.values()))
        torch._foreach_mul_(difference, kept * (1.0 - self.decay))
        torch._foreach_add_(list(self.average.values()), difference)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self.live.items():
            kept = live.detach().clone()
            live.copy_(self.average[name])
            self.average[name].copy_(kept)

    def tensors(self) -> Tensors:
        """The averages for a checkpoint, as views."""
        return Tensors({f"ema.{name}": (self.average[name], rows) for name, rows in self.rows.items()}, {})
