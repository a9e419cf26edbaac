"""What the optimizer's kernels compile to."""

import torch
from sm90 import check, launches, meta

from vkernels.jit import adamw


def step(grads, moments, copies=None, zero=False, plain=False):
    def launch():
        def tensors(dtype):
            return [meta(512, 1024, dtype=dtype), meta(1000, dtype=dtype)]

        scalar = meta(dtype=torch.float32)
        adamw.adamw_step(
            scalar, tensors(torch.float32), tensors(grads), tensors(moments), tensors(moments),
            tensors(copies) if copies else [], [0.1, 0.0], meta(dtype=torch.float64), 0.9, 0.999, 1e-8,
            *((None, None) if plain else (scalar, scalar)), zero, 1 << 40,
        )  # fmt: skip

    return launch


def test_adamw_step():
    check("adamw_step", {
        "float32": step(torch.float32, torch.float32),
        "bf16 gradients and copies, zeroed": step(torch.bfloat16, torch.float32, torch.bfloat16, zero=True),
        "bf16 state, no scale": step(torch.bfloat16, torch.bfloat16, torch.bfloat16, plain=True),
    })  # fmt: skip


def test_square_sum():
    def launch(dtype):
        return lambda: adamw.square_sum(meta(dtype=torch.float32), [meta(512, 1024, dtype=dtype), meta(7, dtype=dtype)])

    check("square_sum", {"float32": launch(torch.float32), "bf16": launch(torch.bfloat16)})


def test_vectors_of_16_bytes():
    """Pointers out of a table say nothing of their alignment: the kernel must."""
    with launches() as kernels:
        step(torch.float32, torch.float32)()
    ptx = kernels[0][1].asm["ptx"]
    assert ptx.count("ld.global.v4.b32") >= 4 * 4, ptx.count("ld.global.v4.b32")
    assert ptx.count("st.global.v4.b32") >= 3 * 4
