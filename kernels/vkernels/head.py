"""The output head, a chunk of rows at a time: what linear_cross_entropy and linear_logprob share.

A chunk's logits are made in float32, scored, turned into their gradients in the same memory and multiplied into the
gradients of h and of the weights before the next chunk is made: the logits of all rows never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from vkernels.registry import accumulate_dtype

# Of one chunk's logits. They are float32, since bf16 logits of size 16 err by 0.06, which is 1e-3 of a loss. On a GPU,
# 1.5 GiB are 2560 rows of 152k: each chunk reads and writes the float32 gradient of the weights once, 8 C V bytes
# beside its 6 t C V operations, which at t = 2560 and the H200's 184 operations a byte is 10 % if nothing overlaps.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 3 << 29}
_TILE = 128  # rows of a matrix product's tile: chunks are whole tiles
_ALIGN = 8  # columns: a range begins at a multiple of 16 bytes in bf16, too


class Layout(NamedTuple):
    """Where the columns of some ranges stand in a chunk: range i from starts[i] on; -inf between and after them."""

    starts: tuple[int, ...]
    width: int


class Group(NamedTuple):
    """The rows begin:end of the list, which are scored against these ranges of the vocabulary."""

    begin: int
    end: int
    ranges: tuple[int, ...]


class Rows(NamedTuple):
    """The list of n rows to score.

    index int64[n] or None: the row of h, T for padding; None = all T rows. column int32[n]: the label's, in the layout
    of the row's group; -1 where it has none there. kind int64[n]: the range of the label, the number of ranges if none.
    first, last int32[n] or None: the columns [first, last) that the row may choose from; None = all of its group.
    """

    index: torch.Tensor | None
    column: torch.Tensor
    kind: torch.Tensor
    first: torch.Tensor | None
    last: torch.Tensor | None
    groups: tuple[Group, ...]
    tokens: int  # T

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The entries of x[T, ...] in the order of the list; padding takes what the last row has."""
        return x if self.index is None else x.index_select(0, self.index.clamp(max=self.tokens - 1))

    def put(self, values: torch.Tensor) -> torch.Tensor:
        """values[n] of the list -> [T], 0 for rows that are not in it."""
        if self.index is None:
            return values
        return values.new_zeros(self.tokens + 1).index_copy_(0, self.index, values)[: self.tokens]


class Terms(NamedTuple):
    """What a row's score is made of, see linear_cross_entropy and linear_logprob."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    softcap: float = 0.0
    temperature: float = 1.0
    correct: bool = False
    entropy: bool = False


class Scores(NamedTuple):
    """By row of the list, in the accumulation dtype: its loss; 1 where the label is the likeliest; the entropy.

    The latter two are None unless asked for. dh[T, C] and dweights: the gradients of the sum of factor * loss (and of
    entropy_factor * entropy), None where not wanted.
    """

    loss: torch.Tensor
    correct: torch.Tensor | None
    entropy: torch.Tensor | None
    dh: torch.Tensor | None
    dweights: list[torch.Tensor | None]


class Chunk(NamedTuple):
    """What a row pass gets of t rows: logits[t, width], -inf between the ranges; see Rows and Scores for the rest."""

    logits: torch.Tensor
    target: torch.Tensor
    first: torch.Tensor | None
    last: torch.Tensor | None
    factor: torch.Tensor
    entropy_factor: torch.Tensor | None
    loss: torch.Tensor
    correct: torch.Tensor | None
    entropy: torch.Tensor | None


# Scores a chunk of rows; with a dtype, also turns the logits into the gradients [t, width] in that dtype.
RowPass = Callable[[Chunk, Terms, "torch.dtype | None"], "torch.Tensor | None"]


def layout(sizes: Sequence[int]) -> Layout:
    starts, end = [], 0
    for size in sizes:
        starts.append(_round_up(end, _ALIGN))
        end = starts[-1] + size
    return Layout(tuple(starts), _round_up(end, _ALIGN))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def tabulate(bases, sizes, labels, row_class, rows, class_cu) -> Rows:
    """Resolve labels[T] and the list of rows, without a copy to the host."""
    T, everything = labels.shape[0], tuple(range(len(bases)))
    index, groups = None, (Group(0, T, everything),)
    if rows is not None:
        index = rows[: class_cu[-1] if T else 0].long()
        padding = (index < 0) | (index >= T)
        index = index.masked_fill(padding, T)
        labels = labels.index_select(0, index.clamp(max=T - 1))
        ranges = (*((r,) for r in everything), everything)
        groups = tuple(Group(a, b, r) for a, b, r in zip(class_cu, class_cu[1:], ranges) if T and a < b)
    starts, width = layout(sizes)
    column = torch.full_like(labels, -1, dtype=torch.int32)
    kind = torch.full_like(labels, len(bases), dtype=torch.int64)
    for i, (base, size) in enumerate(zip(bases, sizes)):
        inside = (labels >= base) & (labels < base + size)
        inside = inside if rows is None else inside & ~padding
        column = torch.where(inside, labels - (base - starts[i]), column).int()
        kind.masked_fill_(inside, i)
    for begin, end, ranges in groups:
        if len(ranges) < len(bases):
            part, [r] = slice(begin, end), ranges
            column[part] = torch.where(kind[part] == r, column[part] - starts[r], -1)
    first = last = None
    if row_class is not None:
        row_class = row_class if rows is None else row_class.index_select(0, index.clamp(max=T - 1))
        first, last = torch.zeros_like(column), torch.full_like(column, width)
        for i, (start, size) in enumerate(zip(starts, sizes)):
            first.masked_fill_(row_class == i, start)
            last.masked_fill_(row_class == i, start + size)
        column = torch.where((column >= first) & (column < last), column, -1).int()
    return Rows(index, column, kind, first, last, groups, T)


def score(
    row_pass: RowPass,
    h: torch.Tensor,
    weights: Sequence[torch.Tensor],
    sizes: Sequence[int],
    rows: Rows,
    terms: Terms,
    factor: torch.Tensor,
    entropy_factor: torch.Tensor | None = None,
    wanted: Sequence[bool] = (),
) -> Scores:
    """Score the rows of the list, in the order of its groups.

    factor acc[n]: what a unit of each row's loss is worth; a row that is worth nothing adds exactly 0, whatever it
    holds. wanted: whether the gradients of h and of each weight are.
    """
    n, (T, C), acc = rows.column.shape[0], h.shape, accumulate_dtype(h.dtype)
    loss, correct, entropy = (
        torch.empty(n, dtype=acc, device=h.device) if made else None for made in (True, terms.correct, terms.entropy)
    )
    want_h, *want_weights = wanted or [False] * (1 + len(weights))
    dweights = [torch.zeros_like(w, dtype=acc) if want else None for w, want in zip(weights, want_weights)]
    dh = h.new_zeros(T if rows.index is None else T + 1, C, dtype=acc) if want_h else None
    dead = factor == 0 if entropy_factor is None else (factor == 0) & (entropy_factor == 0)
    plans = [(g, layout([sizes[r] for r in g.ranges])) for g in rows.groups]
    steps = [_chunk_rows(h.device, g.end - g.begin, plan.width) for g, plan in plans]
    most = max((step * plan.width for step, (_, plan) in zip(steps, plans)), default=0)
    memory = torch.empty(most, dtype=acc, device=h.device)
    for (group, plan), step in zip(plans, steps):
        for begin in range(group.begin, group.end, step):
            part = slice(begin, min(begin + step, group.end))
            H = _live_rows(h, rows, part, dead)
            chunk = Chunk(
                _logits(H, weights, sizes, group.ranges, plan, memory), rows.column[part],
                *(None if x is None else x[part]
                  for x in (rows.first, rows.last, factor, entropy_factor, loss, correct, entropy)),
            )  # fmt: skip
            dlogits = row_pass(chunk, terms, h.dtype if any(wanted) else None)
            if dlogits is not None:
                _add_gradients(dlogits, H, weights, sizes, group.ranges, plan, rows, part, dh, dweights)
    return Scores(loss, correct, entropy, None if dh is None else dh[:T], dweights)


def _chunk_rows(device: torch.device, rows: int, width: int) -> int:
    """How many rows a chunk has: chunks of about the same size, of whole tiles where they hold one."""
    most = max(1, CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"] // (4 * max(width, 1)))
    most = most // _TILE * _TILE or most
    even = -(-rows // -(-rows // most)) if rows else 1
    return min(most, _round_up(even, _TILE), max(rows, 1))


def _live_rows(h: torch.Tensor, rows: Rows, part: slice, dead: torch.Tensor) -> torch.Tensor:
    """The chunk's rows of h, 0 where they are worth nothing: 0 times what they hold may be NaN."""
    if rows.index is None:
        return h[part].masked_fill(dead[part].unsqueeze(1), 0)
    some = h.index_select(0, rows.index[part].clamp(max=rows.tokens - 1))
    return some.masked_fill_(dead[part].unsqueeze(1), 0)


def _logits(H, weights, sizes, ranges, plan: Layout, memory) -> torch.Tensor:
    """H @ weights.T of the group's ranges, each at its start."""
    t = H.shape[0]
    logits = memory[: t * plan.width].view(t, plan.width)
    for r, start, following in zip(ranges, plan.starts, (*plan.starts[1:], plan.width)):
        end = start + sizes[r]
        multiply(H, weights[r][: sizes[r]].t(), logits[:, start:end])
        if end < following:
            logits[:, end:following] = float("-inf")
    return logits


def _add_gradients(dlogits, H, weights, sizes, ranges, plan: Layout, rows: Rows, part, dh, dweights) -> None:
    rows_dh = None
    if dh is not None:
        rows_dh = dh[part] if rows.index is None else torch.zeros_like(H, dtype=dh.dtype)
    for r, start in zip(ranges, plan.starts):
        own = dlogits[:, start : start + sizes[r]]
        if dweights[r] is not None:
            multiply(own.t(), H, dweights[r][: sizes[r]], add=True)
        if rows_dh is not None:
            multiply(own, weights[r][: sizes[r]], rows_dh, add=True)
    if rows_dh is not None and rows.index is not None:
        dh.index_copy_(0, rows.index[part], rows_dh)  # all padding goes to the row after the last


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
    """Write a @ b to `out`, or add it: summed, and stored, in out's dtype."""
    wider = {}
    if a.dtype != out.dtype and a.is_cuda:
        wider["out_dtype"] = out.dtype
    elif a.dtype != out.dtype:
        a, b = a.to(out.dtype), b.to(out.dtype)
    torch.addmm(out, a, b, beta=int(add), out=out, **wider)


def score_rows(c: Chunk, terms: Terms, dtype: torch.dtype | None) -> torch.Tensor | None:
    """The row pass in plain torch."""
    x, slope = _shaped(c, terms, dtype is not None)
    target, has_target = c.target.long().clamp(min=0).unsqueeze(1), c.target >= 0
    lse = torch.logsumexp(x, 1)
    label = torch.where(has_target, x.gather(1, target).squeeze(1), float("-inf"))
    if c.correct is not None:
        c.correct.copy_((x.argmax(1) == target.squeeze(1)) & has_target)
    e, z = terms.label_smoothing, terms.z_loss
    loss = (lse - label).mul_(1 - e).add_(lse.square(), alpha=z)
    if e:
        visible = x > float("-inf")
        among = visible.sum(1)
        loss += e * (lse - torch.where(visible, x, 0).sum(1) / among)
    c.loss.copy_(loss)
    if c.entropy is not None:
        c.entropy.copy_(lse - torch.linalg.vecdot((x - lse.unsqueeze(1)).exp_(), x.clamp(min=-1e30)))
    if dtype is None:
        return None
    if c.entropy_factor is not None:
        surprise = (lse.unsqueeze(1) - x).clamp_(max=1e30)
    g = x.sub_(lse.unsqueeze(1)).exp_()
    if c.entropy_factor is not None:
        around = surprise.sub_(torch.linalg.vecdot(g, surprise).unsqueeze(1)).mul_(c.entropy_factor.unsqueeze(1))
        around.mul_(g)
    g.mul_((c.factor * (1 + 2 * z * lse)).unsqueeze(1))
    g.scatter_add_(1, target, torch.where(has_target, (e - 1) * c.factor, 0).unsqueeze(1))
    if e:
        g.sub_(visible * (c.factor * e / among).unsqueeze(1))
    if c.entropy_factor is not None:
        g.add_(around)
    if slope is not None:
        g.mul_(slope)
    if terms.temperature != 1:
        g.div_(terms.temperature)
    return g.to(dtype)


def _shaped(c: Chunk, terms: Terms, sloped: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> (the logits as they are scored, made in place: -inf where hidden; the slope of the soft-cap)."""
    x, slope = c.logits, None
    if terms.softcap:
        between = x == float("-inf")
        x.div_(terms.softcap).tanh_()
        slope = 1 - x.square() if sloped else None
        x.mul_(terms.softcap).masked_fill_(between, float("-inf"))
    if terms.temperature != 1:
        x.div_(terms.temperature)
    if c.first is not None:
        at = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        x.masked_fill_((at < c.first.unsqueeze(1)) | (at >= c.last.unsqueeze(1)), float("-inf"))
    return x, slope
