"""Tables that describe a list of tensors to one launch over all of them: pointers, sizes, chunks.

A table is a pure function of the numbers in it and is found again by them, so a stale one cannot be used, and tensors
that stay where they are (parameters, state, mostly gradients too) cost one look-up. New numbers travel by an
asynchronous copy from page-locked memory, without a sync.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

KEPT = 256  # tables; one of pointers has 8 bytes a tensor

_tables: OrderedDict[tuple, torch.Tensor] = OrderedDict()
_in_graphs: list[torch.Tensor] = []  # what captured CUDA graphs read


def pointers(
    op: str, name: str, tensors: Sequence[torch.Tensor], numels: Sequence[int], device: torch.device
) -> tuple[int, ...]:
    """Where the tensors begin. ValueError unless all are on `device`, contiguous, of one dtype and of these sizes."""
    if len(tensors) != len(numels):
        raise ValueError(f"vkernels.{op}: {len(tensors)} {name}, expected {len(numels)}")
    found = tuple([t.data_ptr() for t in tensors])
    kinds, places = {t.dtype for t in tensors}, {t.device for t in tensors}
    if len(kinds) > 1:
        raise ValueError(f"vkernels.{op}: {name} are of {sorted(map(str, kinds))}, expected one dtype a call")
    if places - {device}:
        raise ValueError(f"vkernels.{op}: {name} are on {', '.join(sorted(map(str, places)))}, expected {device}")
    for i, (tensor, pointer, numel) in enumerate(zip(tensors, found, numels)):
        if tensor.numel() != numel or not tensor.is_contiguous():
            raise ValueError(f"vkernels.{op}: {name}[{i}] is {_form(tensor)}, expected {numel} elements, contiguous")
        if not pointer and numel and tensor.device.type != "meta":
            raise ValueError(f"vkernels.{op}: {name}[{i}] has no memory of its own, expected a plain tensor")
    return found


def resident(device: torch.device, kind: str, numbers: tuple, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """make() on `device`, kept for the next call with the same `kind` and `numbers`, of which it must be a function."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _captured((device, kind, numbers))
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (stream, device, kind, numbers)
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = _upload(make(), device)
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table


def _captured(key: tuple) -> torch.Tensor:
    """The table that a step before the capture left, on whatever stream: a capture begins with a synchronisation."""
    table = next((table for found, table in _tables.items() if found[1:] == key), None)
    if table is None:
        raise ValueError("vkernels: a CUDA graph on tensors that no step saw, expected a step before the capture")
    _in_graphs.append(table)
    return table


def resident_numbers(device: torch.device, numbers: tuple, dtype: torch.dtype) -> torch.Tensor:
    """The numbers as a tensor of `dtype` on `device`."""
    return resident(device, str(dtype), numbers, lambda: torch.tensor(numbers, dtype=dtype))


def resident_chunks(device: torch.device, numels: tuple[int, ...], chunk: int) -> torch.Tensor:
    """-> int32[chunks, 2] on `device`: of each chunk of `chunk` elements its tensor, and its number in the tensor."""
    return resident(device, "chunks", (chunk, *numels), lambda: _chunks(numels, chunk))


def _chunks(numels: tuple[int, ...], chunk: int) -> torch.Tensor:
    counts = (torch.tensor(numels, dtype=torch.int64) + chunk - 1) // chunk
    which = torch.repeat_interleave(torch.arange(len(numels)), counts)
    number = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
    return torch.stack([which, number], dim=1).to(torch.int32)


def _upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _form(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} with strides {tuple(tensor.stride())}"
