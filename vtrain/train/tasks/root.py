"""What every task does with its model: join it with the objective, and choose what it computes in."""

from __future__ import annotations

import torch
from torch import nn

from vtrain.dist.mesh import World


class Root(nn.Module):
    """The FSDP root: the objective runs inside its forward, where the model's tables and head are gathered."""

    def __init__(self, model: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *batch) -> tuple[dict, dict]:
        return self.objective(self.model, *batch)


def compute_dtype(name: str, world: World) -> torch.dtype:
    """`parallel.dtype`: auto is bf16 on a GPU and fp32 on CPU."""
    names = {"auto": torch.bfloat16 if world.device.type == "cuda" else torch.float32}
    names |= {"fp32": torch.float32, "bf16": torch.bfloat16}
    return names[name]
