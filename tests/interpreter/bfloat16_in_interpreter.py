"""Triton 3.6's interpreter holds bf16 as 16-bit integers: products of them are garbage and casts to it cut bits off.

`mend()` makes casts round to nearest even and matrix products exact. Any other arithmetic in bf16 raises: our kernels
cast to the accumulation dtype after each load. numpy >= 2.4 takes no 1-element array as a bound of `range`: mended too.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def rounded(data: np.ndarray) -> np.ndarray:
    as_torch = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return as_torch.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def is_bf16(x) -> bool:
    return x.dtype.scalar == tl.bfloat16


def cast(plain):
    def do(self, src, dst_type, *rest):
        if is_bf16(src) and dst_type.scalar != tl.bfloat16:
            dtype = interpreter._get_np_dtype(dst_type)
            return TensorHandle(widened(src.data).astype(dtype), dst_type.scalar)
        if not is_bf16(src) and dst_type.scalar == tl.bfloat16:
            return TensorHandle(rounded(src.data), tl.bfloat16)
        return plain(self, src, dst_type, *rest)

    return do


def dot(plain):
    def do(self, a, b, d, *rest):
        a, b = (TensorHandle(widened(x.data), tl.float32) if is_bf16(x) else x for x in (a, b))
        return plain(self, a, b, d, *rest)

    return do


def refuse(plain):
    def do(self, *args):
        if any(is_bf16(a) for a in args if isinstance(a, TensorHandle)):
            raise TypeError("arithmetic in bf16: cast to the accumulation dtype after the load")
        return plain(self, *args)

    return do


def bound(x) -> int:
    return int(np.asarray(x.handle.data).reshape(-1)[0])


def mend() -> None:
    B = InterpreterBuilder
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(B, name, cast(getattr(B, name)))
    B.create_dot = dot(B.create_dot)
    B.binary_op, B.unary_op = refuse(B.binary_op), refuse(B.unary_op)
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", bound)

    interpreter._patch_lang_tensor = patched
