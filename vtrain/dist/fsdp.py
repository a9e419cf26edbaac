"""FSDP2 with our own normalisation: gradients are summed over ranks; the loss is already divided by global counts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vtrain.dist.mesh import World


def shard(root: nn.Module, blocks: Iterable[nn.Module], world: World, compute_dtype: torch.dtype) -> None:
    """Shard fp32 parameters over all ranks: every block is a gather unit, the rest of `root` is the last one.

    Parameters stay fp32; blocks compute in `compute_dtype`; gradients are reduced in fp32 by a plain sum. The sum is
    forced because gloo has no averaging collectives, and because a rank's share of the step's tokens is not 1/n.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, root):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def sync_gradients(root: nn.Module, enabled: bool) -> None:
    """Reduce gradients at the end of the next backward (the last micro-batch of a step), or only accumulate them."""
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(enabled)


def reshard(root: nn.Module) -> None:
    """Let go of the gathered parameters of the root: the next forward gathers them anew."""
    if isinstance(root, FSDPModule):
        root.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter or gradient (the tensor itself when it is not sharded)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(rows: int, world: World) -> tuple[int, int]:
    """The rows [start, stop) of dimension 0 that this rank holds of a sharded parameter."""
    chunk = -(-rows // world.size)
    return min(world.rank * chunk, rows), min((world.rank + 1) * chunk, rows)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank (a collective when it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
