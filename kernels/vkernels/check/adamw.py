"""Checks of adamw_step and clip_factor."""

from __future__ import annotations

import torch

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, error

LR, DECAY = 1e-2, 0.1


def _gradients(shapes, steps, dtype, device):
    g = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=g).to(dtype).to(device) for s in shapes] for _ in range(steps)]


def _adamw(name: str, shapes: list[tuple[int, ...]], steps: int, small: bool = True) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        """Weights after `steps` steps of clipped gradients of `dtype`, beside torch.optim.AdamW on float32 ones."""
        g = torch.Generator().manual_seed(0)
        begin = [torch.randn(s, generator=g) for s in shapes]
        grads = _gradients(shapes, steps, dtype, device)
        truth = oracle.adamw(begin, [[x.cpu() for x in at] for at in grads], lr=LR, weight_decay=DECAY, max_norm=1.0)
        theirs = [torch.nn.Parameter(p.to(device, copy=True)) for p in begin]
        optimizer = torch.optim.AdamW(theirs, lr=LR, weight_decay=DECAY)
        for at in grads:
            for p, x in zip(theirs, at):
                p.grad = x.float()
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            optimizer.step()
        first, second = _ours(begin, grads, device), _ours(begin, grads, device)
        findings = []
        for i, true in enumerate(truth):
            bound = 1.5 * error(theirs[i], true) + 1e-7
            findings.append(Finding(f"params {i}", error(first[0][i], true), bound))
            findings.append(Finding(f"copies {i}", error(first[1][i], first[0][i].to(torch.bfloat16)), 0.0))
        same = all(torch.equal(a, b) for one, two in zip(first, second) for a, b in zip(one, two))
        findings.append(Finding("again", 0.0 if same else float("inf"), 0.0))
        return findings

    return Check("adamw_step", name, run, small=small)


def _ours(begin, grads, device):
    params = [p.to(device, copy=True) for p in begin]
    copies = [torch.full_like(p, float("nan"), dtype=torch.bfloat16) for p in params]
    exp_avgs, exp_avg_sqs = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    step = torch.zeros((), device=device)
    for at in grads:
        factor, _ = vkernels.clip_factor(at, 1.0)
        vkernels.adamw_step(params, at, exp_avgs, exp_avg_sqs, step=step, lr=LR, weight_decay=DECAY, copies=copies,
                            grad_scale=factor)  # fmt: skip
    return params, copies


def _norm(name: str, shapes: list[tuple[int, ...]], small: bool = True) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        (grads,) = _gradients(shapes, 1, dtype, device)
        truth = sum(x.cpu().double().square().sum() for x in grads).sqrt()
        factor, norm = vkernels.clip_factor(grads, 0.5)
        again = vkernels.clip_factor(grads, 0.5)[1]
        return [
            Finding("norm", error(norm, truth), 1e-6),
            Finding("factor", error(factor, (0.5 / (truth + 1e-6)).clamp(max=1.0)), 1e-6),
            Finding("again", 0.0 if torch.equal(norm, again) else float("inf"), 0.0),
        ]

    return Check("square_sum", name, run, small=small)


AWKWARD = [(5, 7), (4096,), (0, 3), (4097,), (1,), (), (67, 131)]
LARGE = [(2048, 4096), (1000003,), (1,)]
CHECKS = [
    _adamw("awkward sizes, 5 steps", AWKWARD, 5),
    _adamw("100 steps", [(33, 9)], 100, small=False),
    _adamw("large", LARGE, 3, small=False),
    _norm("awkward sizes", AWKWARD),
    _norm("large", LARGE, small=False),
]
