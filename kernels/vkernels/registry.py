"""The table of ops: which backends each has, which one a call gets, and how an op is made known to torch.

Every op is one `torch.library` schema with a fake implementation and an autograd kernel; its real implementation asks
this table for the backend of the device at hand. Backends of one op save the same tensors for the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vkernels import measured

log = logging.getLogger("vkernels")
library = torch.library.Library("vkernels", "DEF")

# What decides between backends besides the device: {"head_dim": 128, "mask": "causal", ...}, as the op defines it.
Facts = Mapping[str, Any]


class CannotRun(ValueError):
    """A forced backend does not run on the device or does not take what the op was called with."""


def takes_all(facts: Facts) -> str | None:
    return None


class Backend(NamedTuple):
    """One implementation of an op.

    `can_run(device)` is None where it runs, else the reason why it does not; `takes(facts)` likewise for what it is
    called with, where the op has facts.
    """

    forward: Callable
    backward: Callable | None
    can_run: Callable[[torch.device], str | None]
    takes: Callable[[Facts], str | None] = takes_all


_table: dict[str, dict[str, Backend]] = {}  # op -> backend name -> backend, the preferred one first
_forced: dict[str, str] = {}
_chosen: dict[tuple, Backend] = {}  # (op, device, *facts) -> backend
_said: set[tuple] = set()  # what was logged


def on_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on cpu only, the tensors are on {device.type}"


def anywhere(device: torch.device) -> str | None:
    return None


def on_gpu(device: torch.device) -> str | None:
    """Triton kernels: on CUDA, and on the CPU where Triton's interpreter stands in for it (TRITON_INTERPRET=1)."""
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None if _has_triton() else "triton is not installed"
    return f"it runs on GPUs only, the tensors are on {device.type}"


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def jit(module: str, forward: str, backward: str | None = None, takes: Callable = takes_all) -> Backend:
    """The backend of the functions `forward` and `backward` of `vkernels.jit.<module>`, imported when first called."""
    return Backend(_on_device(module, forward), backward and _on_device(module, backward), on_gpu, takes)


def _on_device(module: str, name: str) -> Callable:
    """Calls `vkernels.jit.<module>.<name>` with the tensors' device as the current one, on which Triton launches."""

    def call(*args):
        launch = getattr(importlib.import_module(f"vkernels.jit.{module}"), name)
        with current(_device_of(args)):
            return launch(*args)

    return call


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which `device` is the one that launches go to."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def define(
    op: str, schema: str, *, fake: Callable, facts: Callable[..., Facts] | None = None, **backends: Backend
) -> Callable:
    """Register `vkernels::<op><schema>` with its backends, in order of preference. -> the raw torch op.

    `facts(*args)` tells of a call what may decide between backends beyond the device; the order that was measured for
    such facts on the GPU at hand comes before the order here, see `measured`.
    """
    _table[op] = backends
    return _define(op, schema, fake, lambda *args: _pick(op, op, facts, args).forward(*args))


def define_backward(op: str, schema: str, *, fake: Callable, facts: Callable[..., Facts] | None = None) -> Callable:
    """Register `vkernels::<op>_backward`, served by the backends that `define` listed. -> the raw torch op."""
    name = f"{op}_backward"
    return _define(name, schema, fake, lambda *args: _pick(op, name, facts, args).backward(*args))


def _pick(op: str, name: str, facts: Callable[..., Facts] | None, args: Sequence) -> Backend:
    return select(op, _device_of(args), facts(*args) if facts else {}, name)


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
    raw = getattr(torch.ops.vkernels, name).default
    written = [i for i, a in enumerate(raw._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def run(*args):
        _require_one_device(raw, args)
        # An op computes in the dtypes that it tells of, whatever products outside of it are cast to.
        with torch._C._DisableAutocast():
            result = implementation(*args)
        if written:  # what autograd saved of them must not be used after, and a kernel does not tell it
            torch.autograd.graph.increment_version(_tensors([args[i] for i in written]))
        return result

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vkernels::{name}", fake, lib=library)
    return raw


def _require_one_device(raw: Callable, args: Sequence) -> None:
    """ValueError unless all tensors are where the first is; those in lists are each op's own to check."""
    device = _device_of(args)
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor) and a.device != device:
            name, found = raw._schema.arguments[i].name, f"is on {a.device}"
            raise ValueError(f"{raw._schema.name.replace('::', '.')}: {name} {found}, expected {device} as the others")


def _tensors(args: Sequence) -> list[torch.Tensor]:
    """The tensors among them, also those inside lists."""
    return [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a])]


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


def backends(op: str, device: torch.device | None = None) -> tuple[str, ...]:
    """The names of an op's backends, the preferred one first; with a device, of those that run on it."""
    return tuple(name for name, b in _of(op).items() if device is None or b.can_run(device) is None)


def forced(op: str) -> str | None:
    """The backend that is forced on an op, None where none is."""
    return _forced.get(op)


def select(op: str, device: torch.device, facts: Facts | None = None, name: str = "") -> Backend:
    """The backend that serves `op` on `device`: the forced one, else the first that can run. A choice is logged once.

    `name`: under which the order was measured, where forward and backward pass differ (default: the op's).
    """
    facts = facts or {}
    key = (op, device, name or op, *facts.items())
    backend = _chosen.get(key)
    if backend is None:
        chosen = _choose(op, device, facts, name or op)
        if (op, device, name, chosen) not in _said:
            _said.add((op, device, name, chosen))
            log.info("%s on %s: backend %s%s", name or op, device, chosen, " (forced)" if op in _forced else "")
        backend = _chosen[key] = _table[op][chosen]
    return backend


def _choose(op: str, device: torch.device, facts: Facts, name: str) -> str:
    table = _of(op)
    if op in _forced:
        reason = _refusal(table[_forced[op]], device, facts)
        if reason is not None:
            raise CannotRun(f"vkernels.{op}: the forced backend {_forced[op]!r} cannot run: {reason}")
        return _forced[op]
    reasons = {}
    for candidate in sorted(table, key=_rank(measured.order(name, device, facts))):
        reasons[candidate] = _refusal(table[candidate], device, facts)
        if reasons[candidate] is None:
            return candidate
    raise ValueError(f"vkernels.{op}: no backend runs on {device}: {reasons}")


def _refusal(backend: Backend, device: torch.device, facts: Facts) -> str | None:
    reason = backend.can_run(device)
    return backend.takes(facts) if reason is None else reason


def _rank(order: Sequence[str]) -> Callable[[str], int]:
    """A sort key: what was measured first, in that order; the rest after it, as they were (sorting is stable)."""
    return lambda name: order.index(name) if name in order else len(order)


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
    _said.difference_update([key for key in _said if key[0] == op])


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in: float32, or float64 for float64 inputs (gradcheck)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
