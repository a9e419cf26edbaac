"""Updates of the rows of an embedding table that a step touched, and of no others: their gradients, and lazy AdamW.

For an untied input table that every rank holds whole. A table of 300k rows then costs what its few thousand touched
rows cost; dense AdamW reads and writes all of them, 30 bytes for each element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vkernels.arguments import require_floats, require_indices
from vkernels.registry import Backend, accumulate_dtype, anywhere, define, jit
from vkernels.segments import Segments, destinations, sort_segments


class Touched(NamedTuple):
    """rows int32[U], the touched rows, ascending; grads float32[U, C], the sum for each; count int32[1], how many.

    U is the bound min(T, size); what lies beyond count is zero in rows and undefined in grads.
    """

    rows: torch.Tensor
    grads: torch.Tensor
    count: torch.Tensor


@torch.no_grad()
def embed_touched(
    dy: torch.Tensor, ids: torch.Tensor, base: int, size: int, *, order: Segments | None = None
) -> Touched:
    """The gradient of a table of `size` rows by its touched rows: dy[T, C], ids int[T] as `embed` took them.

    To get dy, let the output be a leaf: `x = embed(ids, [table.detach()], ...).requires_grad_()`, and after the
    backward pass of the model x.grad is dy. order: `embed_order(ids, [base], [size])`, else the ids are sorted here.
    The same bits as the rows of `embed`'s own gradient in float32. No sync.
    """
    require_floats("embed_touched", dy=dy)
    require_indices("embed_touched", ids=ids)
    if size < 0:
        raise ValueError(f"embed_touched: size {size}, expected a number of rows")
    if ids.dim() != 1 or dy.shape[:1] != ids.shape or dy.dim() != 2:
        raise ValueError(f"embed_touched: dy is {list(dy.shape)}, ids {list(ids.shape)}; expected [T, C] and [T]")
    if order is not None and (order.order.shape[0], order.rows.shape[0]) != (len(ids), min(len(ids), size)):
        found = f"an order of {order.order.shape[0]} entries and up to {order.rows.shape[0]} rows"
        raise ValueError(f"embed_touched: {found}; expected embed_order of {len(ids)} ids and one range of {size}")
    if order is None:
        order = sort_segments(destinations([ids], [0], [base], [size]), size)
    return Touched(order.rows, _touched(dy, ids, base, size, *order), order.counts[2:])


@torch.no_grad()
def lazy_adamw_rows(
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    touched: Touched,
    *,
    step: int | torch.Tensor,
    lr: float | torch.Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: torch.Tensor | None = None,
) -> None:
    """AdamW of the touched rows of param[R, C], in place; param, exp_avg and exp_avg_sq are float32 and contiguous.

    step: updates made so far, by the step count of the whole training, not of the row. grad_scale: multiplies the
    gradients, the factor of `clip_factor`. step, lr and grad_scale may be tensors of one element on the device.
    This is lazy Adam, not AdamW: a row that a step does not touch keeps its weights and moments. Under AdamW its
    moments would decay, it would go on moving by its momentum, and it would be shrunk by the weight decay; so rare rows
    move less here, and their second moment remembers for longer. A row that every step touches gets the same updates.
    """
    require_floats("lazy_adamw_rows", param=param, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for name, x in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("param", param)):
        if x.dtype != torch.float32 or not x.is_contiguous() or x.shape != param.shape or x.dim() != 2:
            found = f"{x.dtype}{list(x.shape)}"
            raise ValueError(f"lazy_adamw_rows: {name} is {found}; expected contiguous float32 {list(param.shape)}")
    if touched.grads.shape[1] != param.shape[1]:
        found = list(touched.grads.shape)
        raise ValueError(f"lazy_adamw_rows: grads are {found}; expected [rows, {param.shape[1]}]")
    now = _scalar(step, param) + 1
    scale = _scalar(1.0 if grad_scale is None else grad_scale, param)
    scalars = torch.stack([1 - betas[0] ** now, (1 - betas[1] ** now).sqrt(), _scalar(lr, param), scale]).float()
    _update(param, exp_avg, exp_avg_sq, *touched, scalars, *betas, eps, weight_decay)


def _scalar(x: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x.reshape(()).double()
    return torch.full((), x, dtype=torch.float64, device=like.device)


def _touched_torch(dy, ids, base, size, order, pieces, joins, rows, counts):
    n, acc = rows.shape[0], accumulate_dtype(dy.dtype)
    ascending = torch.where(torch.arange(n, device=dy.device) < counts[2], rows, 2**31 - 1)
    inside = (ids >= base) & (ids < base + size)
    number = torch.where(inside, torch.searchsorted(ascending, (ids - base).int()), n)
    # One more row takes what is outside the range: no selection whose shape depends on the data.
    return torch.ops.aten.embedding_dense_backward(dy.to(acc), number, n + 1, n, False)[:n].clone()


def _update_torch(param, exp_avg, exp_avg_sq, rows, grads, count, scalars, beta1, beta2, eps, weight_decay):
    if rows.shape[0] == 0:
        return
    correction1, correction2, lr, scale = scalars
    used = torch.arange(rows.shape[0], device=rows.device) < count
    # Beyond the count the first row once more: what is written twice is the same both times.
    at = torch.where(used, rows, rows[0]).long()
    g = torch.where(used.unsqueeze(1), grads, grads[:1]).float() * scale
    p, m, v = param[at], exp_avg[at], exp_avg_sq[at]
    m_new = beta1 * m + (1 - beta1) * g
    v_new = beta2 * v + (1 - beta2) * g * g
    p_new = p * (1 - lr * weight_decay) - lr / correction1 * m_new / (v_new.sqrt() / correction2 + eps)
    for x, old, new in ((param, p, p_new), (exp_avg, m, m_new), (exp_avg_sq, v, v_new)):
        x.index_put_((at,), torch.where(count > 0, new, old))


_touched = define(
    "embed_touched",
    "(Tensor dy, Tensor ids, int base, int size, Tensor order, Tensor pieces, Tensor joins, Tensor rows, Tensor counts)"
    " -> Tensor",
    fake=lambda dy, ids, base, size, order, pieces, joins, rows, counts: dy.new_empty(
        rows.shape[0], dy.shape[1], dtype=accumulate_dtype(dy.dtype)
    ),
    triton=jit("touched", "embed_touched"),
    torch=Backend(_touched_torch, None, anywhere),
)
_update = define(
    "lazy_adamw_rows",
    "(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor rows, Tensor grads, Tensor count,"
    " Tensor scalars, float beta1, float beta2, float eps, float weight_decay) -> ()",
    fake=lambda *args: None,
    triton=jit("touched", "lazy_adamw_rows"),
    torch=Backend(_update_torch, None, anywhere),
)
