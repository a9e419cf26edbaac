"""The library of CUDA C++ kernels, `_cuda.so` beside this file. setup.py builds it where it finds nvcc.

It has a plain C interface and no tie to torch: it is loaded at the first use on a GPU, and may be missing.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from vkernels.registry import current

PATH = Path(__file__).parent / "_cuda.so"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `Type` in csrc/cuda


class Sampling(ctypes.Structure):
    """`VkSampling` of csrc/cuda/sampling.cu: the same fields in the same order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "uncond", "seen", "step", "keys", "ids", "logprob")),
        *((name, ctypes.c_int64) for name in ("logits_stride", "uncond_stride", "seen_stride", "seed")),
        ("top_p", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("guidance", "penalty", "inverse_penalty", "inverse_temperature")),
        *((name, ctypes.c_int32) for name in ("rows", "lo", "hi", "top_k", "type", "greedy", "device")),
    ]


@functools.cache
def library(path: Path = PATH) -> ctypes.CDLL:
    """The loaded library. OSError where there is none or it cannot be loaded; ImportError if it is of other sources."""
    found = ctypes.CDLL(str(path))
    found.vk_error.restype = ctypes.c_char_p
    found.vk_sample.argtypes = [ctypes.POINTER(Sampling), ctypes.c_void_p]
    if found.vk_sampling_bytes() != ctypes.sizeof(Sampling):
        raise ImportError(f"{path} was built from other sources; expected one built by this version's setup.py")
    return found


@functools.cache
def on_cuda(device: torch.device) -> str | None:
    """None where the library's kernels run, else the reason why they do not (for `registry.Backend`)."""
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs only, the tensors are on {device.type}"
    try:
        found = library()
    except (OSError, ImportError) as e:
        return f"no library of CUDA kernels: {e}"
    with current(device):  # which vk_ready would leave changed
        error = found.vk_ready(device.index or 0)
    return found.vk_error(error).decode() if error else None


def call(function: str, parameters: ctypes.Structure, device: torch.device) -> None:
    """Launch `function` of the library on the device's stream. RuntimeError with CUDA's reason if it cannot be."""
    with current(device):
        error = getattr(library(), function)(ctypes.byref(parameters), _stream(device))
    if error:
        raise RuntimeError(f"vkernels: {function}: {library().vk_error(error).decode()}")


def _stream(device: torch.device) -> int:
    """The address of torch's current stream on the device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
