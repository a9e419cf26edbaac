"""Checks of the embedding: vocabularies, codes with a projection, slots, positions and modalities, in many mixtures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, judge


def zipf(tokens: int, size: int, generator: torch.Generator, specials: float = 0.3) -> torch.Tensor:
    """Ids as text has them: frequency ~ 1 / rank, and a share of specials (begin, newline, padding) at the first 3."""
    rank = torch.exp(torch.rand(tokens, generator=generator) * torch.log(torch.tensor(float(size + 1)))).long() - 1
    special = torch.rand(tokens, generator=generator) < specials
    return torch.where(special, torch.randint(3, (tokens,), generator=generator), rank).clamp(0, size - 1).int()


def eager(ids, tables, bases, *, sizes, projections=None, terms=(), slots=(), order=None):
    """As a user writes it: F.embedding of each range, a matrix product for codes, masks, additions."""
    out = 0
    for table, base, size, projection in zip(tables, bases, sizes, projections or [None] * len(tables)):
        inside = (ids >= base) & (ids < base + size)
        rows = F.embedding(torch.where(inside, ids - base, 0).long(), table)
        if projection is not None:
            rows = F.linear(rows, *(projection if isinstance(projection, tuple) else (projection,)))
        out = out + torch.where(inside[:, None], rows, 0)
    for rows, index, role in slots:
        place = torch.where((index >= 0) & (index < ids.shape[0]), index, ids.shape[0]).long()
        held = torch.cat([out, out.new_zeros(1, out.shape[1])])
        out = (held.index_copy(0, place, rows) if role == "replace" else held.index_add(0, place, rows))[:-1]
    for index, table in terms:
        inside = (index >= 0) & (index < table.shape[0])
        out = out + torch.where(inside[:, None], F.embedding(torch.where(inside, index, 0).long(), table), 0)
    return out


def _check(name: str, ids: torch.Tensor, sizes: Sequence[int], C: int, *, small: bool = True, code_dim: int = 0,
           bias: bool = False, positions: int = 0, slots: int = 0, ordered: bool = False) -> Check:  # fmt: skip
    """Ranges of those sizes from 0 on; code_dim > 0: the last table is a codebook of that width with a projection."""

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(1)
        bases = [sum(sizes[:i]) for i in range(len(sizes))]
        T, n = ids.shape[0], len(sizes)
        inputs = [torch.randn(size + 3, C, generator=g) for size in sizes]
        if code_dim:
            inputs[-1] = torch.randn(sizes[-1] + 3, code_dim, generator=g)
            inputs += [torch.randn(C, code_dim, generator=g)] + [torch.randn(C, generator=g)] * bias
        marks = torch.arange(T) % max(positions, 1)  # by document position, and two modalities
        inputs += [torch.randn(r, C, generator=g) for r in (positions, 2) if positions]
        place = torch.randperm(T, generator=g)[:slots].int()
        place = torch.where(torch.arange(slots) % 7 == 3, T, place)  # padding
        inputs += [torch.randn(slots, C, generator=g)] * (slots > 0)
        kept = torch.where(torch.isin(torch.arange(T), place), -1, ids)

        def of(op: Callable, there: torch.device) -> Callable:
            def call(*x):
                rest = list(x[n:])
                projection = [rest.pop(0) for _ in range(1 + bias)] if code_dim else [None]
                last = tuple(projection) if bias else projection[0]
                terms = [(marks, rest.pop(0)), (marks % 2, rest.pop(0))] if positions else []
                order = None
                if ordered:
                    order = vkernels.embed_order(kept, bases, sizes, terms=[(i, len(t)) for i, t in terms])
                    order = order.to(there)
                return op(kept.to(there), x[:n], bases, sizes=sizes, projections=[None] * (n - 1) + [last], order=order,
                          terms=[(i.to(there), t) for i, t in terms],
                          slots=[(rest.pop(0), place.to(there), "replace")] if slots else [])  # fmt: skip

            return call

        ours, theirs = of(vkernels.embed, device), of(eager, device)
        truth = oracle.embed if small else eager  # in float64; the oracle's gradients cost a table for every token
        return judge(ours, theirs, of(truth, torch.device("cpu")), inputs, device, dtype)

    return Check("embed", name, run, small=small)


def _checks() -> list[Check]:
    g = torch.Generator().manual_seed(0)

    def some(tokens: int, end: int) -> torch.Tensor:
        return torch.randint(-1, end + 1, (tokens,), generator=g)

    one = torch.full((150,), 6)
    return [
        _check("empty", some(0, 9), [5, 4], 6),
        _check("one token", torch.tensor([3]), [5], 1),
        _check("3 tables", some(83, 15), [5, 7, 3], 17),
        _check("3 tables, host order", some(83, 15), [5, 7, 3], 17, ordered=True),
        _check("none in range", torch.full((30,), 99), [5, 4], 16),
        _check("all the same", one, [5, 4], 40),
        _check("all the same, host order", one, [5, 4], 40, ordered=True),
        _check("all distinct", torch.randperm(40, generator=g), [30, 10], 33, ordered=True),
        _check("zipf", zipf(220, 40, g), [30, 10], 24, ordered=True),
        _check("codes", some(80, 30), [20, 10], 48, code_dim=5),
        _check("codes, bias, host order", some(70, 30), [20, 10], 130, code_dim=24, bias=True, ordered=True),
        _check("codes alone", some(80, 20), [20], 17, code_dim=4, bias=True),
        _check("wide codes", some(40, 30), [20, 10], 20, code_dim=83),
        _check("positions, modalities", some(90, 30), [20, 10], 24, positions=13),
        _check("slots", some(40, 30), [20, 10], 24, slots=20),
        _check("everything", some(90, 30), [20, 10], 24, code_dim=8, bias=True, positions=13, slots=30, ordered=True),
        _check("zipf 16k x 2048", zipf(16384, 22000, g), [20000, 2000], 2048, ordered=True, small=False),
        _check("zipf 16k x 2048, device order", zipf(16384, 22000, g), [20000, 2000], 2048, small=False),
        _check("zipf 8k x 4100", zipf(8192, 5000, g), [4000, 1000], 4100, small=False),
        _check("codes 8k x 2048", some(8192, 20000), [3616, 16384], 2048, code_dim=8, positions=1024, small=False),
    ]


CHECKS = _checks()
