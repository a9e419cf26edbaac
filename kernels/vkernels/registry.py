"""The table of ops: which backends each has, which one a device gets, and how an op is made known to torch.

Every op is one `torch.library` schema with a fake implementation and an autograd kernel; its real implementation asks
this table for the backend of the device at hand. Backends of one op save the same tensors for the backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

log = logging.getLogger("vkernels")
library = torch.library.Library("vkernels", "DEF")


class Backend(NamedTuple):
    """One implementation of an op. `can_run(device)` is None where it runs, else the reason why it does not."""

    forward: Callable
    backward: Callable | None
    can_run: Callable[[torch.device], str | None]


_table: dict[str, dict[str, Backend]] = {}  # op -> backend name -> backend, the preferred one first
_forced: dict[str, str] = {}
_chosen: dict[tuple[str, torch.device], Backend] = {}


def on_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on cpu only, the tensors are on {device.type}"


def anywhere(device: torch.device) -> str | None:
    return None


def define(op: str, schema: str, *, fake: Callable, **backends: Backend) -> Callable:
    """Register `vkernels::<op><schema>` with its backends, in order of preference. -> the raw torch op."""
    _table[op] = backends
    return _define(op, schema, fake, lambda *args: select(op, _device_of(args)).forward(*args))


def define_backward(op: str, schema: str, *, fake: Callable) -> Callable:
    """Register `vkernels::<op>_backward`, served by the backends that `define` listed. -> the raw torch op."""
    return _define(f"{op}_backward", schema, fake, lambda *args: select(op, _device_of(args)).backward(*args))


def define_autograd(op: str, function: type[torch.autograd.Function], pack: Callable | None = None) -> None:
    """Differentiate `vkernels::<op>` by `function`, whose forward calls the raw op under `below_autograd()`.

    `pack` turns the op's arguments into those of `function.apply` (which sees no tensors inside lists).
    """
    raw = getattr(torch.ops.vkernels, op).default

    def kernel(*args):
        if torch.is_grad_enabled() and _requires_grad(args):
            return function.apply(*(pack(*args) if pack else args))
        with below_autograd():
            return raw(*args)

    library.impl(op, kernel, "Autograd")


def below_autograd():
    """The context in which a raw op skips its autograd kernel."""
    return torch._C._AutoDispatchBelowAutograd()


def _define(name: str, schema: str, fake: Callable, implementation: Callable) -> Callable:
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vkernels::{name}", fake, lib=library)
    return getattr(torch.ops.vkernels, name).default


def _device_of(args: Sequence) -> torch.device:
    return args[0].device  # every op takes a tensor first


def _requires_grad(args: Sequence) -> bool:
    for a in args:
        if isinstance(a, torch.Tensor):
            if a.requires_grad:
                return True
        elif isinstance(a, (list, tuple)) and _requires_grad(a):
            return True
    return False


def ops() -> tuple[str, ...]:
    """The names of all ops."""
    return tuple(sorted(_table))


def backends(op: str) -> tuple[str, ...]:
    """The names of an op's backends, the preferred one first."""
    return tuple(_of(op))


def select(op: str, device: torch.device) -> Backend:
    """The backend that serves `op` on `device`: the forced one, else the first that can run. Logged once a device."""
    backend = _chosen.get((op, device))
    if backend is None:
        name = _choose(op, device)
        log.info("%s on %s: backend %s%s", op, device, name, " (forced)" if op in _forced else "")
        backend = _chosen[op, device] = _table[op][name]
    return backend


def _choose(op: str, device: torch.device) -> str:
    table = _of(op)
    if op in _forced:
        name = _forced[op]
        reason = table[name].can_run(device)
        if reason is not None:
            raise ValueError(f"vkernels.{op}: the forced backend {name!r} cannot run: {reason}")
        return name
    reasons = {name: backend.can_run(device) for name, backend in table.items()}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise ValueError(f"vkernels.{op}: no backend runs on {device}: {reasons}")


def _of(op: str) -> dict[str, Backend]:
    if op not in _table:
        raise ValueError(f"vkernels has no op {op!r}; it has {', '.join(ops())}")
    return _table[op]


class force:
    """`force(op, backend)` from now on, or `with force(op, backend):` for a while; backend None lifts it.

    Holds for all threads (the backward pass runs in others). ValueError for an unknown op or backend; a backend that
    cannot run on the tensors' device raises when the op is called.
    """

    def __init__(self, op: str, backend: str | None):
        if backend is not None and backend not in _of(op):
            raise ValueError(f"vkernels.{op} has no backend {backend!r}; it has {', '.join(_of(op))}")
        self._op, self._before = op, _forced.get(op)
        _set(op, backend)

    def __enter__(self) -> force:
        return self

    def __exit__(self, *exc) -> None:
        _set(self._op, self._before)


def _set(op: str, backend: str | None) -> None:
    if backend is None:
        _of(op)  # an unknown op is an error here too
        _forced.pop(op, None)
    else:
        _forced[op] = backend
    for key in [key for key in _chosen if key[0] == op]:
        del _chosen[key]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in: float32, or float64 for float64 inputs (gradcheck)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
