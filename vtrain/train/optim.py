"""Optimizers over the local shards of parameters.

Updates are elementwise, so each rank updates its own rows: the op sees plain tensors (DTensor dispatch would cost more
than the update of a small model) and the state is named by parameter for the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

import vkernels
from vtrain.dist.fsdp import local
from vtrain.train.checkpoint import Tensors


class AdamW:
    """AdamW (Loshchilov, Hutter 2019) on named parameters; weight decay on matrices only (dimension >= 2).

    In a step: `clip` once all gradients are there, then `step`. A parameter without a gradient stays as it is.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.base_lr = self.lr = lr
        self.betas, self.eps = betas, eps
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.shards = {name: local(p.data) for name, p in self.parameters.items()}  # some may have no row on this rank
        self.decays = {name: weight_decay if p.ndim >= 2 else 0.0 for name, p in self.parameters.items()}
        self.averages = {name: torch.zeros_like(shard) for name, shard in self.shards.items()}
        self.squares = {name: torch.zeros_like(shard) for name, shard in self.shards.items()}
        device = next(iter(self.shards.values())).device
        self.updates = torch.zeros((), device=device)  # made so far; counted on the device, which alone knows of skips
        self._counts = [(self.updates, list(self.parameters))]  # names of parameters by the count that is theirs
        self._factor: torch.Tensor | None = None  # of the gradients, in the coming step

    def count_apart(self, names: Iterable[str]) -> None:
        """Count the updates of these parameters anew: their moments begin at zero while those of others go on.

        Under the others' count nothing would correct their bias: their first updates would be 3 times too large.
        """
        apart = set(names)
        rest = [(count, [n for n in theirs if n not in apart]) for count, theirs in self._counts]
        new = (torch.zeros_like(self.updates), [n for n in self.parameters if n in apart])
        self._counts = [(count, theirs) for count, theirs in (*rest, new) if theirs]

    def set_lr(self, lr: float) -> None:
        self.lr = lr

    def clip(self, max_norm: float, loss: torch.Tensor) -> torch.Tensor:
        """The global L2 norm of all gradients (a device scalar); `step` scales them down to `max_norm` if it is > 0.

        Not finite, on every rank, if a gradient or the detached `loss` of any rank is not.
        """
        many = dist.is_initialized() and dist.get_world_size() > 1
        self._factor, norm = vkernels.clip_factor(
            list(self._gradients().values()),
            max_norm,
            start=loss.float() * 0.0,  # nan if the loss is not finite
            reduce=dist.all_reduce if many else None,
        )
        return norm

    def step(self, kept: torch.Tensor) -> None:
        """Update, or leave weights and state as they are where `kept` (a device scalar) is 0; drop the gradients."""
        gradients = self._gradients()
        lists = (self.shards, gradients, self.averages, self.squares)
        for count, names in self._counts:
            own = [name for name in names if name in gradients]
            vkernels.adamw_step(
                *([tensors[name] for name in own] for tensors in lists),
                step=count,
                lr=self.lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=[self.decays[name] for name in own],
                grad_scale=self._factor,
                kept=kept,
            )
        self._factor = None
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()  # DTensor.to_local() goes through autograd otherwise: 6 us a tensor, not 0.1
    def _gradients(self) -> dict[str, torch.Tensor]:
        return {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def tensors(self, prefix: str) -> Tensors:
        """The optimizer's state for a checkpoint, as views: moments by rows; the count under every name, as in torch's
        own state.
        """
        whole = {f"{prefix}.{name}.step": count for count, names in self._counts for name in names}
        sharded = {}
        for name, parameter in self.parameters.items():
            sharded[f"{prefix}.{name}.exp_avg"] = (self.averages[name], parameter.shape[0])
            sharded[f"{prefix}.{name}.exp_avg_sq"] = (self.squares[name], parameter.shape[0])
        return Tensors(sharded, whole)
