"""Checks of the touched rows of a table: their gradients, and lazy AdamW."""

from __future__ import annotations

import torch

import vkernels
from vkernels import oracle
from vkernels.check.embedding import zipf
from vkernels.check.judge import FLOOR, Check, Finding, error, poisoned

ADAMW = {"step": 6, "lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _check(name: str, ids: torch.Tensor, base: int, size: int, C: int, *, ordered: bool, small: bool = True):
    """The gradient of the touched rows; and one lazy update by it, from the same state, beside the slow one."""

    def run(device: torch.device, dtype: torch.dtype) -> tuple[list[Finding], list[Finding]]:
        g = torch.Generator().manual_seed(2)
        dy = torch.randn(len(ids), C, generator=g).to(dtype)
        state = [torch.randn(size, C, generator=g), torch.randn(size, C, generator=g), torch.rand(size, C, generator=g)]
        order = vkernels.embed_order(ids, [base], [size]).to(device) if ordered else None
        with poisoned():
            touched = vkernels.embed_touched(dy.to(device), ids.to(device), base, size, order=order)
            ours = [x.clone().to(device) for x in state]
            vkernels.lazy_adamw_rows(*ours, touched, **ADAMW, grad_scale=torch.tensor(0.5, device=device))
        rows, grads = oracle.embed_touched(dy, ids, base, size)
        used = int(touched.count)
        exact = used == len(rows) and torch.equal(touched.rows[:used].cpu().long(), rows)
        mine = touched.grads[:used].cpu()
        summed = [Finding("rows", 0.0 if exact else 1.0, 0.0), Finding("gradients", error(mine, grads), 4e-7)]
        # The update by the gradients that it was given: nothing but float32 arithmetic is between the two.
        truth = oracle.lazy_adamw_rows(*state, rows, mine, **ADAMW, grad_scale=0.5)
        still = torch.ones(size, dtype=torch.bool).index_fill(0, rows, False)
        updated = [Finding(n, error(a, t), 4 * FLOOR[torch.float32]) for n, a, t in zip("pmv", ours, truth)]
        kept = all(torch.equal(a.cpu()[still], b[still]) for a, b in zip(ours, state))
        return summed, [*updated, Finding("untouched rows stay as they are", 0.0 if kept else 1.0, 0.0)]

    def part(number: int):
        return lambda device, dtype: run(device, dtype)[number]

    return [
        Check("embed_touched", name, part(0), small=small),
        Check("lazy_adamw_rows", name, part(1), dtypes=(torch.float32,), small=small),
    ]


def _checks() -> list[Check]:
    g = torch.Generator().manual_seed(3)
    some = torch.randint(-1, 40, (90,), generator=g)
    return [
        *_check("some", some, 5, 20, 17, ordered=False),
        *_check("host order", some, 5, 20, 17, ordered=True),
        *_check("zipf", zipf(250, 100, g, specials=0.6), 0, 100, 24, ordered=True),
        *_check("none in range", some, 50, 20, 5, ordered=False),
        *_check("empty", some[:0], 5, 20, 5, ordered=True),
        *_check("zipf 16k x 2048", zipf(16384, 20000, g), 0, 20000, 2048, ordered=True, small=False),
    ]


CHECKS = _checks()
