"""Collectives on small host values. All ranks call them in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """The float64 sums of host numbers over all ranks."""
    vector = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1 and len(values):
        dist.all_reduce(vector)
    return vector.tolist()


def max_over_ranks(values: Sequence[float]) -> list[float]:
    vector = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1 and len(values):
        dist.all_reduce(vector, op=dist.ReduceOp.MAX)
    return vector.tolist()


def barrier() -> None:
    """Wait for all ranks (a gloo all-reduce: dist.barrier would touch the GPU)."""
    max_over_ranks([0.0])


def raise_together(problem: str | None) -> None:
    """Raise ValueError on every rank if any rank has a problem: no rank is left waiting for one that gave up.

    Every rank that has a problem raises it in its own words; the others name the first of them.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    failed = int(max_over_ranks([0 if problem is None else world - rank])[0])
    if problem is not None:  # an exception without a message is a problem too
        raise ValueError(problem)
    if failed:
        raise ValueError(f"rank {world - failed} failed; its own message names the cause")
