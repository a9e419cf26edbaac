"""How an op is judged: against float64, by at most 1.5 times the error that eager torch makes in the same dtype.

Inputs are rounded to the dtype first; an error is the relative Frobenius norm of the difference, for every output and
every gradient; what a kernel leaves unwritten is NaN; a second run must give the same bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

# Below it, both are as good as rounding.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 1e-3, torch.float16: 1.5e-4}


class Finding(NamedTuple):
    """One figure of a check: fine if error <= bound."""

    what: str
    error: float
    bound: float

    @property
    def fine(self) -> bool:
        return self.error <= self.bound  # false for NaN


class Check(NamedTuple):
    """`run(device, dtype)` judges `op` (a name of the registry) on the backend at hand. small: for the interpreter."""

    op: str
    name: str
    run: Callable[[torch.device, torch.dtype], list[Finding]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    small: bool = True


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius error; a NaN anywhere is infinite."""
    if value.shape != truth.shape:
        return math.inf
    value, truth = value.detach().cpu().double(), truth.detach().cpu().double()
    if value.numel() == 0:
        return 0.0
    same = value == truth  # infinities too
    difference = torch.where(same, 0, value - truth)
    e = (difference.norm() / torch.where(same & truth.isinf(), 0, truth).norm().clamp_min(1e-30)).item()
    return e if e == e else math.inf


def run(op: Callable, inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]):
    """-> the outputs of op(*inputs), and the gradients of the inputs for the gradients of its float outputs."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = op(*inputs)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    pairs = [(o, c.to(o)) for o, c in zip(outputs, cotangents) if o.requires_grad]
    if not pairs:
        return [o.detach() for o in outputs], []
    grads = torch.autograd.grad([o for o, _ in pairs], inputs, [c for _, c in pairs], allow_unused=True)
    return [o.detach() for o in outputs], [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs)]


def judge(
    ours: Callable,
    eager: Callable,
    oracle: Callable,
    inputs: Sequence[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    others: Mapping[str, Any] | None = None,
    floor: float | None = None,
    repeat: bool = True,
) -> list[Finding]:
    """Outputs and gradients of ours(*inputs, **others) in `dtype` on `device`, beside eager's, against the oracle's.

    inputs: float tensors, rounded to `dtype` first. others: tensors (moved to the device as they are) and values. The
    three give the same outputs, in order; the oracle runs on the CPU in float64. Integer outputs must be equal.
    """
    others = dict(others or {})
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
    inputs = [x.to(dtype) for x in inputs]
    moved = [x.to(device) for x in inputs]
    with torch.no_grad():
        shapes = oracle(*[x.double() for x in inputs], **others)
    shapes = shapes if isinstance(shapes, (tuple, list)) else [shapes]
    generator = torch.Generator().manual_seed(len(shapes))
    cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(dtype) for o in shapes]
    truth = run(lambda *x: oracle(*x, **others), [x.double() for x in inputs], [c.double() for c in cotangents])
    theirs = run(lambda *x: eager(*x, **there), moved, cotangents)
    with poisoned():
        first = run(lambda *x: ours(*x, **there), moved, cotangents)
        second = run(lambda *x: ours(*x, **there), moved, cotangents) if repeat else None
    floor = FLOOR[dtype] if floor is None else floor
    findings = []
    for k, kind in enumerate(("output", "gradient")):
        for i, (mine, other, true) in enumerate(zip(first[k], theirs[k], truth[k], strict=True)):
            exact = not mine.is_floating_point()
            findings.append(
                Finding(f"{kind} {i}", error(mine, true), 0.0 if exact else 1.5 * error(other, true) + floor)
            )
            if second is not None:
                same = torch.equal(_bits(mine), _bits(second[k][i]))
                findings.append(Finding(f"{kind} {i} again", 0.0 if same else math.inf, 0.0))
    return findings


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8) if x.numel() and x.is_floating_point() else x


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let torch.empty and new_empty hand out NaN, so that whatever a kernel forgets to write shows."""

    def poison(make: Callable) -> Callable:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = make(*args, **kwargs)
            if out.device.type == "meta" or out.dtype == torch.bool:
                return out
            return out.fill_(math.nan) if out.is_floating_point() else out.fill_(77)

        return filled

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield
