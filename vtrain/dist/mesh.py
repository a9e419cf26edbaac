"""The processes of a run: started by torchrun, or a single one by plain python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """Where this process stands: rank of size processes, its device, and the one-dimensional data-parallel mesh."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def world(device: str = "auto", timeout_s: float = 600.0, deterministic: bool = False) -> Iterator[World]:
    """Join the process group for the length of the block and leave it in an orderly way.

    device: "cpu", "cuda" or "auto" (cuda where there is one). Under torchrun the rendezvous comes from its environment;
    without it the process is alone and opens no port. deterministic: torch's deterministic algorithms only, which on a
    GPU costs speed and memory (index_add and scatter backwards; a workspace for cuBLAS) and raises for an operator that
    has none. ValueError if cuda is asked for and absent.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"run.device: {device!r}, expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: 'cuda', but torch finds no CUDA device; use cpu or auto")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first matrix product
        torch.use_deterministic_algorithms(True)
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # gloo carries the host counts
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("data",))
        yield World(dist.get_rank(), dist.get_world_size(), place, mesh)
    finally:
        dist.destroy_process_group()


def set_threads(threads: int) -> None:
    """CPU threads of this process; 0 keeps torch's choice (torchrun sets OMP_NUM_THREADS=1 for several processes)."""
    if threads:
        torch.set_num_threads(threads)
