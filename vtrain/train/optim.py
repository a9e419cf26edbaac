"""Optimizers over the local shards of parameters.

Updates are elementwise, so each rank updates its own rows: the wrapped torch optimizer sees plain tensors (DTensor
dispatch would cost more than the update of a small model) and its state is named by parameter for the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from vtrain.dist.fsdp import local
from vtrain.train.checkpoint import Tensors


class AdamW:
    """AdamW (Loshchilov, Hutter 2019) on named parameters; weight decay on matrices only (dimension >= 2)."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.base_lr = lr
        self.parameters = {name: p for name, p in named if p.requires_grad}
        # Twins share storage with the shards; a rank may hold no row of a small parameter.
        self.shards = {n: nn.Parameter(local(p.data)) for n, p in self.parameters.items() if local(p.data).numel()}
        groups = [
            {"params": [s for s in self.shards.values() if s.ndim >= 2], "weight_decay": weight_decay},
            {"params": [s for s in self.shards.values() if s.ndim < 2], "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def set_lr(self, lr: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr

    def clip(self, max_norm: float, loss: torch.Tensor) -> torch.Tensor:
        """The global L2 norm of all gradients (a device scalar), to which they are scaled down if `max_norm` > 0.

        Not finite, on every rank, if a gradient or the detached `loss` of any rank is not.
        """
        grads = self._take_gradients()
        square = loss.float() * 0.0  # nan if the loss is not finite
        if grads:
            square = square + torch.stack(torch._foreach_norm(grads)).square().sum()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        if max_norm > 0 and grads:
            torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def step(self, kept: torch.Tensor) -> None:
        """Update, or leave weights and state as they are where `kept` (a device scalar) is 0; drop the gradients."""
        self.inner.grad_scale, self.inner.found_inf = None, 1.0 - kept  # how torch's gradient scaler skips a step
        self.inner.step()
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if name in self.shards:
                self.shards[name].grad = None

    def _take_gradients(self) -> list[torch.Tensor]:
        for name, shard in self.shards.items():
            grad = self.parameters[name].grad
            shard.grad = None if grad is None else local(grad)
        return [s.grad for s in self.shards.values() if s.grad is not None]

    def tensors(self, prefix: str) -> Tensors:
        """The optimizer's state for a checkpoint, as views: moments by rows, update counts whole."""
        sharded, whole = {}, {}
        for name, parameter in self.parameters.items():
            state = self._state_of(name)
            whole[f"{prefix}.{name}.step"] = state["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                sharded[f"{prefix}.{name}.{key}"] = (state[key], parameter.shape[0])
        return Tensors(sharded, whole)

    def _state_of(self, name: str) -> dict[str, torch.Tensor]:
        shard = self.shards.get(name)
        if shard is None:
            empty = self.empty_shard(name)
            return {"step": torch.zeros(()), "exp_avg": empty, "exp_avg_sq": empty}
        state = self.inner.state[shard]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=shard.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(shard), torch.zeros_like(shard)
        return state

    def empty_shard(self, name: str) -> torch.Tensor:
        """The shard of a parameter of which this rank holds no row."""
        return local(self.parameters[name].data)
