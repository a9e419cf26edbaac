"""AdamW over lists of tensors in one pass: update, clipping, skipping, bf16 copies and zeroed gradients together.

Method: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, as torch.optim.AdamW computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vkernels import _host, tables
from vkernels.host import to_numpy
from vkernels.philox import LOW, philox, signed
from vkernels.registry import Backend, accumulate_dtype, anywhere, define, jit, on_cpu

_HOST_KINDS = {torch.float32: 0, torch.bfloat16: 1}  # as the host kernel calls them


@torch.no_grad()
def adamw_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    step: int | torch.Tensor,
    lr: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    copies: Sequence[torch.Tensor] | None = None,
    grad_scale: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    zero_grads: bool = False,
    seed: int = 0,
) -> None:
    """One AdamW update of all `params` in place, in one launch on a GPU and without a sync.

    params: float32 (or float64), contiguous; grads: any float dtype; exp_avgs, exp_avg_sqs: of the params' dtype or
    bfloat16, which is rounded stochastically (unbiased; drawn by Philox from `seed`, step, tensor and element, so a
    repeated run repeats every bit). Each list has one dtype and the sizes of `params`.
    step: updates made so far; a tensor (one element, any dtype, on the device) is advanced by this one.
    lr: a number, or a tensor of one element on the device. weight_decay: one number, or one for each tensor.
    copies: tensors of any float dtype that get the new params, rounded to nearest.
    grad_scale: tensor of one element, by which gradients are multiplied: the factor of `clip_factor`.
    kept: tensor of one element; where it is 0, params, state, copies and step stay exactly as they are.
    zero_grads: leave zeros in `grads`, also where the step is not kept.
    ValueError for lists that do not fit each other.
    """
    if not len(params):  # as on a rank that holds no rows
        if isinstance(step, torch.Tensor):
            step.add_(1 if kept is None else kept.ne(0))
        return
    device = params[0].device
    decays = [float(weight_decay)] * len(params) if isinstance(weight_decay, int | float) else list(weight_decay)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas) or eps < 0:
        raise ValueError(f"vkernels.adamw_step: betas {betas}, eps {eps}; expected two in [0, 1) and eps >= 0")
    if len(decays) != len(params):
        raise ValueError(f"vkernels.adamw_step: {len(decays)} weight decays, expected {len(params)}")
    if not isinstance(step, torch.Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    if not isinstance(lr, torch.Tensor):
        lr = torch.full((), lr, dtype=torch.float64, device=device)
    scalars = {"step": step, "lr": lr, "grad_scale": grad_scale, "kept": kept}
    step, lr, grad_scale, kept = (_scalar(name, x, device) for name, x in scalars.items())
    lists = list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(copies or ())
    _op(step, *lists, decays, lr, *map(float, betas), eps, grad_scale, kept, zero_grads, signed(seed))


@torch.no_grad()
def clip_factor(
    grads: Sequence[torch.Tensor],
    max_norm: float,
    *,
    start: torch.Tensor | None = None,
    reduce: Callable[[torch.Tensor], object] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (factor, norm), float32 scalars on the device: the L2 norm of all `grads`, and min(1, max_norm / norm).

    The gradients themselves stay as they are: give the factor to `adamw_step` as `grad_scale`. One pass, no sync, the
    same bits in every run. max_norm <= 0: the factor is 1. A gradient that is not finite makes the norm so.
    start: a scalar added to the sum of squares (`loss * 0` carries a loss that is not finite into the norm).
    reduce: called with the sum of squares, which it makes that of all ranks in place (`torch.distributed.all_reduce`).
    """
    if start is None and not len(grads):
        raise ValueError("vkernels.clip_factor: no gradients and no start, expected one of them for its device")
    square = torch.zeros((), device=grads[0].device) if start is None else start.to(torch.float32, copy=True).view(())
    for dtype in dict.fromkeys(g.dtype for g in grads):
        square = _square_sum(square, [g for g in grads if g.dtype == dtype])
    if reduce is not None:
        reduce(square)
    norm = square.sqrt()
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm > 0 else torch.ones_like(norm)
    return factor, norm


def _scalar(name: str, x: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    if x is not None and (x.numel() != 1 or x.device != device):
        raise ValueError(
            f"vkernels.adamw_step: {name} is {list(x.shape)} on {x.device}, expected one element on {device}"
        )
    return None if x is None else x.view(())


def check_lists(params, grads, exp_avgs, exp_avg_sqs, copies) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """-> (elements of each tensor, pointers of each list; of `copies` none where there are none)."""
    numels = tuple([p.numel() for p in params])
    named = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if copies:
        named["copies"] = copies
    found = [tables.pointers("adamw_step", name, tensors, numels, params[0].device) for name, tensors in named.items()]
    kind = params[0].dtype
    if kind not in (torch.float32, torch.float64):
        raise ValueError(f"vkernels.adamw_step: params are {kind}, expected float32 (the copies may be narrower)")
    for name in ("exp_avgs", "exp_avg_sqs"):
        if named[name][0].dtype not in (kind, torch.bfloat16):
            raise ValueError(f"vkernels.adamw_step: {name} are {named[name][0].dtype}, expected {kind} or bfloat16")
    return numels, found if copies else [*found, ()]


def _words(seed: int, step: torch.Tensor, tensor: int, numel: int) -> torch.Tensor:
    """One random word an element, int64[numel]; four neighbours share a counter."""
    group = torch.arange((numel + 3) // 4, device=step.device)
    words = philox(seed, [group & LOW, group >> 32, torch.full_like(group, tensor), step.long() & LOW])
    return torch.stack(words, dim=-1).view(-1)[:numel]


def _round(x: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor) -> torch.Tensor:
    """x in `dtype`; to bfloat16 up with a probability of what is cut off, by 16 random bits."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    raw = x.float().view(torch.int32)
    up = raw.add(bits.to(torch.int32)) & -0x10000
    return torch.where(x.isnan(), x.float(), up.view(torch.float32)).to(torch.bfloat16)


def _torch(step, params, grads, avgs, squares, copies, decays, lr, beta1, beta2, eps, scale, kept, zero, seed):
    check_lists(params, grads, avgs, squares, copies)
    acc = accumulate_dtype(params[0].dtype)
    t = step.double() + 1
    size, root = (lr.double() / (1 - beta1**t)).to(acc), (1 - beta2**t).sqrt().to(acc)
    keep = torch.ones_like(step, dtype=torch.bool) if kept is None else kept.ne(0)
    narrow = torch.bfloat16 in (avgs[0].dtype, squares[0].dtype)
    for i, (p, g, m, v) in enumerate(zip(params, grads, avgs, squares)):
        G = g.to(acc) if scale is None else g.to(acc) * scale.to(acc)
        M = m.to(acc) + (G - m.to(acc)) * (1 - beta1)
        V = v.to(acc) * beta2 + G * G * (1 - beta2)
        P = p * (1 - lr.double() * decays[i]).to(acc) - size * M / (V.sqrt() / root + eps)
        bits = _words(seed, step, i, p.numel()).view(p.shape) if narrow else torch.zeros_like(p, dtype=torch.int64)
        m.copy_(torch.where(keep, _round(M, m.dtype, bits & 0xFFFF), m))
        v.copy_(torch.where(keep, _round(V, v.dtype, bits >> 16), v))
        p.copy_(torch.where(keep, P, p))
        if copies:
            copies[i].copy_(torch.where(keep, P.to(copies[i].dtype), copies[i]))
        if zero:
            g.zero_()
    step.add_(keep.to(step.dtype))


def _cpu(step, params, grads, avgs, squares, copies, decays, lr, beta1, beta2, eps, scale, kept, zero, seed):
    numels, found = check_lists(params, grads, avgs, squares, copies)
    keep = kept is None or bool(kept)
    tensors = [to_numpy(torch.tensor(numbers, dtype=torch.int64)) for numbers in (numels, *found)]
    kinds = [_HOST_KINDS[x[0].dtype] for x in (grads, avgs, squares)]
    _host.adamw_step(
        tensors, kinds, to_numpy(torch.tensor(decays, dtype=torch.float64)), int(step), float(lr), beta1, beta2, eps,
        1.0 if scale is None else float(scale), keep, zero, seed % 2**64, torch.get_num_threads(),
    )  # fmt: skip
    step.add_(int(keep))


def _facts(step, *lists):
    named = zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "copies"), lists)
    return {name: str(tensors[0].dtype).removeprefix("torch.") for name, tensors in named if tensors}


def _host_takes(facts):
    for name, kind in facts.items():
        fine = {"params": ("float32",), "copies": ("bfloat16",)}.get(name, ("float32", "bfloat16"))
        if kind not in fine:
            return f"{name} are {kind}, it takes {' or '.join(fine)}"
    return None


def _torch_square_sum(start, tensors):
    return start + torch.stack([t.to(accumulate_dtype(t.dtype)).square().sum() for t in tensors]).sum().float()


def _cpu_square_sum(start, tensors):
    numels = [t.numel() for t in tensors]
    found = tables.pointers("clip_factor", "grads", tensors, numels, start.device)
    sizes, where = (to_numpy(torch.tensor(x, dtype=torch.int64)) for x in (numels, found))
    return start + _host.square_sum(sizes, where, _HOST_KINDS[tensors[0].dtype], torch.get_num_threads())


_op = define(
    "adamw_step",
    "(Tensor(a!) step, Tensor(b!)[] params, Tensor(c!)[] grads, Tensor(d!)[] exp_avgs, Tensor(e!)[] exp_avg_sqs, "
    "Tensor(f!)[] copies, float[] weight_decay, Tensor lr, float beta1, float beta2, float eps, Tensor? grad_scale, "
    "Tensor? kept, bool zero_grads, int seed) -> ()",
    fake=lambda *args: None,
    facts=_facts,
    cpu=Backend(_cpu, None, on_cpu, _host_takes),
    triton=jit("adamw", "adamw_step"),
    torch=Backend(_torch, None, anywhere),
)
_square_sum = define(
    "square_sum",
    "(Tensor start, Tensor[] tensors) -> Tensor",
    fake=lambda start, tensors: torch.empty_like(start),
    facts=lambda start, tensors: {"grads": str(tensors[0].dtype).removeprefix("torch.")},
    cpu=Backend(_cpu_square_sum, None, on_cpu, _host_takes),
    triton=jit("adamw", "square_sum"),
    torch=Backend(_torch_square_sum, None, anywhere),
)
