"""Optimizer steps over the parameters of a small model: AdamW with clipping, and Muon's orthogonalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from cases import Cost, On, Problem, case

import vkernels

MAX_NORM = 1.0
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STATE = 12  # bytes of a parameter and its two moments in float32


def shapes(layers: int, C: int, ffn: int) -> list[tuple[int, ...]]:
    """The tensors of a decoder's blocks."""
    return layers * [(C,), (4 * C, C), (C, 2 * C), (C,), (2 * ffn, C), (C, ffn)]


def split(leaves: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Parameters and gradients: the leaves are the ones, then the others."""
    half = len(leaves) // 2
    return leaves[:half], leaves[half:]


class States:
    """Moments, bf16 copies and the step of every set of leaves, made at its first use, outside the timing."""

    def __init__(self) -> None:
        self._of: dict[int, tuple] = {}

    def __call__(self, params: Sequence[torch.Tensor]) -> tuple:
        key = params[0].data_ptr()
        if key not in self._of:
            zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
            copies = [p.to(torch.bfloat16) for p in params]
            self._of[key] = (*zeros, copies, torch.zeros((), device=params[0].device))
        return self._of[key]


def fused_torch(params: Sequence[torch.Tensor], optimizers: dict[int, torch.optim.Optimizer]) -> torch.optim.Optimizer:
    key = params[0].data_ptr()
    if key not in optimizers:
        optimizers[key] = torch.optim.AdamW(list(params), fused=True, **ADAMW)
    return optimizers[key]


@case("adamw_step", "fp32 + bf16 copy", value=85, full={"layers": 8, "C": 2048, "ffn": 6144},
      small={"layers": 4, "C": 256, "ffn": 768})  # fmt: skip
def adamw_step(on: On, layers: int, C: int, ffn: int) -> Problem:
    wanted = shapes(layers, C, ffn)
    params = [on.randn(*s, scale=0.02, dtype=torch.float32) for s in wanted]
    grads = [on.randn(*s, scale=1e-3, dtype=torch.float32) for s in wanted]
    states, optimizers = States(), {}

    def ours(*leaves):
        params, grads = split(leaves)
        m, v, copies, step = states(params)
        factor, _ = vkernels.clip_factor(grads, MAX_NORM)
        vkernels.adamw_step(params, grads, m, v, step=step, copies=copies, grad_scale=factor, zero_grads=True, **ADAMW)

    def theirs(clip: Callable) -> Callable:
        """torch's fused update after `clip`, then what a bf16 model needs: copies of the weights; zeroed gradients."""

        def run(*leaves):
            params, grads = split(leaves)
            _, _, copies, _ = states(params)
            for p, g in zip(params, grads):
                p.grad = g
            clip(params)
            fused_torch(params, optimizers).step()
            torch._foreach_copy_(copies, list(params))
            torch._foreach_zero_(list(grads))

        return run

    def clip(params):
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)

    peers = {"torch eager": lambda: theirs(clip), "torch fused, no clipping": lambda: theirs(lambda params: None)}
    n = sum(p.numel() for p in params)
    # Gradients are read twice, for the norm and for the update, and zeroed once; a bf16 copy is written.
    moved = n * (2 * STATE + 3 * 4 + 2)
    return Problem([*params, *grads], ours, peers, forward=Cost(0.0, moved), more={"parameters": n})


@case("newton_schulz", "8 x 2048 x 2048", value=65, full={"batch": 8, "m": 2048, "n": 2048},
      small={"batch": 4, "m": 256, "n": 256})  # fmt: skip
@case("newton_schulz", "8 x 2048 x 6144", value=43, full={"batch": 8, "m": 2048, "n": 6144},
      small={"batch": 4, "m": 256, "n": 768})  # fmt: skip
def newton_schulz(on: On, batch: int, m: int, n: int) -> Problem:
    g = on.randn(batch, m, n)

    def of_torch() -> Callable:
        from torch.optim._muon import _zeropower_via_newtonschulz as orthogonalise

        return lambda g: torch.stack([orthogonalise(x, (3.4445, -4.7750, 2.0315), 5, 1e-7) for x in g])

    # Each of 5 steps: X X^T, its square, and one more product, the first two symmetric (counted by half).
    flops = 5 * batch * (m * m * n + m * m * m + 2 * m * m * n)
    moved = 2 * g.numel() * on.dtype.itemsize
    return Problem([g], vkernels.newton_schulz, {"torch eager": of_torch}, forward=Cost(float(flops), moved))
