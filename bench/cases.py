"""What a kernel bench is: a problem of one op, by size, with the implementations that are timed on it.

    @case("rms_norm", value=5, full={"T": 32768, "C": 2048}, small={"T": 256, "C": 64})
    def rms_norm(on, T, C):
        return Problem(leaves=[on.randn(T, C), on.randn(C)], ours=vkernels.rms_norm, peers={...}, ...)

`ours` is served by every backend of the op in turn. Whoever makes a problem puts nothing on another device than `on`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Cost(NamedTuple):
    """What must be done at least: floating-point operations, and bytes moved with every operand touched once."""

    flops: float
    bytes: float


class Judged(NamedTuple):
    """How the first output and the gradient of the first leaf are compared with float64, in their first rows.

    oracle(*inputs float64) gives the outputs for these rows alone; inputs: of the same meaning as the leaves.
    """

    oracle: Callable[..., Any]
    inputs: Sequence[torch.Tensor]
    rows: int
    outputs: bool = True  # False where the first output is no row (a sum): only the gradient is compared
    gradient: bool = True  # False where the first leaf has no rows like the output's (a table)


@dataclass
class Problem:
    """leaves: float tensors, of which every implementation gets its own copies; the gradient is taken of all of them.

    peers: name -> a function without arguments that imports and compiles, and gives the implementation. backward None =
    there is none. passes: which are timed; "both" alone where some do the work of the backward pass in the forward one.
    graph: timed as a CUDA graph that is replayed, for what is shorter than its launches.
    """

    leaves: Sequence[torch.Tensor]
    ours: Callable[..., Any]
    peers: dict[str, Callable[[], Callable[..., Any]]]
    forward: Cost
    backward: Cost | None = None
    judged: Judged | None = None
    passes: tuple[str, ...] = ("forward", "backward", "both")
    graph: bool = False
    more: dict[str, Any] = field(default_factory=dict)  # for the row: visible pairs and the like


class Case(NamedTuple):
    """`value` orders the cases, the most valuable first; full: sizes on a GPU, small: of a dry run on the CPU."""

    op: str
    name: str
    value: int
    full: dict[str, Any]
    small: dict[str, Any]
    make: Callable[..., Problem]


CASES: list[Case] = []
MODULES = ("attention", "cross_entropy", "vq", "embedding", "norms", "optimizers", "decode")


def case(op: str, name: str = "", *, value: int, full: dict[str, Any], small: dict[str, Any]) -> Callable:
    """Add a case. Several stand above one function for several sizes."""

    def add(make: Callable[..., Problem]) -> Callable[..., Problem]:
        CASES.append(Case(op, name or in_words(full), value, full, small, make))
        return make

    return add


def in_words(sizes: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in sizes.items())


def load() -> list[Case]:
    """All cases, the most valuable first."""
    for module in MODULES:
        importlib.import_module(f"ops.{module}")
    return sorted(CASES, key=lambda c: -c.value)


class On:
    """Random tensors of the bench's dtype on its device, the same in every run."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.mul_(scale).to(dtype or self.dtype)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.device)
        return drawn.to(dtype)

    def tensor(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)


def eager(function: Callable) -> Callable[[], Callable]:
    """The peer that is plain torch."""
    return lambda: function


def compiled(function: Callable) -> Callable[[], Callable]:
    """The peer that is plain torch under torch.compile, for these shapes."""

    def build() -> Callable:
        torch._functorch.config.donated_buffer = False  # the backward pass is timed on one graph again and again
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False, fullgraph=True)

    return build
