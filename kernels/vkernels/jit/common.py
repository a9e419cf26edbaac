"""What the launches share: dtypes as Triton names them, and how many programs fill the device."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
H200_SMS = 132  # for what is compiled ahead of time, where there is no device to ask


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """What a kernel computes in: float32, or float64 for float64 tensors, which Triton's interpreter takes."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def tl_type(dtype: torch.dtype) -> tl.dtype:
    return _TYPES[dtype]


def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side; 2 in the interpreter, so that loops over work are taken more than once."""
    if device.type == "cuda":
        return _properties(device.index).multi_processor_count
    return 2 if device.type == "cpu" else H200_SMS


@functools.cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


def row_blocks(columns: int, elements: int = 4096) -> tuple[int, int]:
    """(rows, columns) of a tile of whole rows, both powers of two, of about `elements` elements, at least one row."""
    block = max(16, triton.next_power_of_2(columns))
    return max(1, elements // block), block
