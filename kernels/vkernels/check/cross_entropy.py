"""Checks of the ops over the output head: ranges, classes, lists of rows, every term of the loss, awkward sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any
from unittest import mock

import torch

import vkernels
from vkernels import head, oracle
from vkernels.check.judge import Check, Finding, error, judge

# float32: of sums of a few hundred terms; bf16: of gradients that went through bf16 twice.
FLOOR = {torch.float64: 1e-13, torch.float32: 3e-7, torch.bfloat16: 1.5e-3, torch.float16: 2e-4}
WIDE = 3e-5  # float32, of 1e5 columns: dh is the label's row and 1e5 others of 1e-5 each, in one chain of additions
LOSS = {torch.float32: 1e-6, torch.bfloat16: 1e-5}  # the loss itself: logits are never rounded to bf16


def eager_head(h, weights, bases, labels, sizes, row_class, softcap=0.0, temperature=1.0):
    """As a user writes it: -> (logits [T, V], -inf where hidden; the label's column; its range)."""
    logits = (h @ torch.cat([w[:n] for w, n in zip(weights, sizes)]).T).float()
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    column, kind, start = torch.zeros_like(labels).long(), torch.full_like(labels, -1), 0
    for i, (base, size) in enumerate(zip(bases, sizes)):
        inside = (labels >= base) & (labels < base + size)
        column, kind = torch.where(inside, labels - base + start, column).long(), torch.where(inside, i, kind)
        if row_class is not None:
            hidden = torch.zeros_like(logits, dtype=torch.bool)
            hidden[:, start : start + size] = ((row_class >= 0) & (row_class != i))[:, None]
            logits = logits.masked_fill(hidden, float("-inf"))
        start += size
    return logits, column, kind


def eager_loss(h, weights, bases, labels, *, sizes, row_weight=None, row_class=None, rows=None, class_cu=None,
               z_loss=0.0, label_smoothing=0.0, softcap=0.0, joint=False, metrics=False):  # fmt: skip
    if rows is not None:
        row_weight, row_class = _listed(labels, row_weight, rows, class_cu, len(sizes))
    x, column, kind = eager_head(h, weights, bases, labels, sizes, row_class, softcap)
    weight = torch.ones_like(x[:, 0]) if row_weight is None else row_weight
    lse, label, seen = x.logsumexp(-1), x.gather(1, column[:, None])[:, 0], x > float("-inf")
    mean = torch.where(seen, x, 0).sum(-1) / seen.sum(-1)
    loss = (1 - label_smoothing) * (lse - label) + label_smoothing * (lse - mean) + z_loss * lse.square()
    right = (x.argmax(-1) == column).float()
    mine = [(kind == i) & (weight != 0) for i in range(len(sizes))]
    table = [torch.stack([torch.where(m, v, 0).sum() for m in mine])
             for v in (loss * weight, weight, torch.ones_like(weight), right)]  # fmt: skip
    sums = (table[0].sum(), table[1].sum()) if joint else (table[0], table[1])
    return (*sums, *(t.detach() for t in table)) if metrics else sums


def eager_logprob(h, weights, bases, labels, *, sizes, row_class=None, rows=None, class_cu=None, temperature=1.0,
                  softcap=0.0, entropy=False):  # fmt: skip
    listed = None
    if rows is not None:
        listed, row_class = _listed(labels, None, rows, class_cu, len(sizes))
    x, column, kind = eager_head(h, weights, bases, labels, sizes, row_class, softcap, temperature)
    p, scored = x.log_softmax(-1), kind >= 0
    scored = scored if listed is None else scored & (listed != 0)
    logprob = torch.where(scored, p.gather(1, column[:, None])[:, 0], 0)
    spread = torch.where(scored, -(p.exp() * p.clamp(min=-1e30)).sum(-1), 0)
    return (logprob, spread) if entropy else logprob


def _listed(labels, row_weight, rows, class_cu, ranges):
    """rows and class_cu as a row_weight (0 for rows that are not listed) and a row_class."""
    T = labels.shape[0]
    weight, group = torch.zeros(T + 1, device=labels.device), rows.new_full((T + 1,), -1)
    for g, (a, b) in enumerate(pairwise(class_cu)):
        weight[rows[a:b].long()] = 1
        group[rows[a:b].long()] = g if g < ranges else -1
    return weight[:T] * (1 if row_weight is None else row_weight), group[:T]


def draw(sizes: Sequence[int], T: int, C: int, g: torch.Generator) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """-> [h, *weights] (with loud padding rows), {bases, labels, sizes}; every fourth row has no label."""
    bases = [3 + sum(sizes[:i]) for i in range(len(sizes))]
    weights = [torch.randn(n + 3, C, generator=g) * 2 * C**-0.5 for n in sizes]
    for w, n in zip(weights, sizes):
        w[n:] = 100.0
    labels = torch.randint(3, 3 + sum(sizes), (T,), generator=g, dtype=torch.int32)
    labels[1::4] = -100
    return [torch.randn(T, C, generator=g), *weights], {"bases": bases, "labels": labels, "sizes": list(sizes)}


def own_class(where: dict[str, Any]) -> torch.Tensor:
    """int32[T]: the range of every label, 0 where there is none."""
    later = torch.tensor(where["bases"][1:], dtype=torch.int32)
    return torch.bucketize(where["labels"], later, right=True).int()


def grouped(where: dict[str, Any], *, block: int = 8, whole: bool = False) -> dict[str, Any]:
    """rows and class_cu as the packer makes them: grouped by the label's range, filled up to blocks with T.

    whole: every third row is in the last group instead, that of all ranges.
    """
    T, own = where["labels"].shape[0], own_class(where)
    own = torch.where(where["labels"] < 0, -1, own)
    if whole:
        own[::3] = torch.where(own[::3] < 0, -1, len(where["sizes"]))
    rows, cu = [], [0]
    for group in range(len(where["sizes"]) + whole):
        mine = torch.nonzero(own == group)[:, 0].int()
        rows.append(torch.cat([mine, torch.full((-len(mine) % block,), T, dtype=torch.int32)]))
        cu.append(cu[-1] + len(rows[-1]))
    return {"rows": torch.cat([*rows, torch.full((block,), T, dtype=torch.int32)]), "class_cu": cu}


def _flat(outputs):
    """(sum, count, metrics) as one list of tensors."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    return [t for o in outputs for t in (o if isinstance(o, tuple) else (o,))]


def _check(op: str, eager: Callable, name: str, sizes: Sequence[int], T: int, C: int, make: Callable | None = None,
           small: bool = True, chunk: int = 0, **options: Any) -> Check:  # fmt: skip
    """make(drawn) -> further arguments, from {bases, labels, sizes}. chunk: bytes of logits at a time, 0 as always."""

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        inputs, where = draw(sizes, T, C, torch.Generator().manual_seed(2))
        others = {**where, **(make(where) if make else {}), **options}

        def of(function: Callable) -> Callable:
            def call(h, *weights, bases, labels, **rest):
                limits = dict.fromkeys(head.CHUNK_BYTES, chunk) if chunk else {}
                with mock.patch.dict(head.CHUNK_BYTES, limits):
                    return _flat(function(h, list(weights), bases, labels, **rest))

            return call

        ours, truth = of(getattr(vkernels, op)), of(getattr(oracle, op))
        floor = WIDE if dtype == torch.float32 and max(sizes) > 100_000 else FLOOR[dtype]
        findings = judge(ours, of(eager), truth, inputs, device, dtype, others=others, floor=floor)
        if dtype in LOSS and T:
            rounded = [x.to(dtype) for x in inputs]
            there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in others.items()}
            pair = ours(*(x.to(device) for x in rounded), **there), truth(*(x.double() for x in rounded), **others)
            mine, true = (o if isinstance(o, torch.Tensor) else o[0] for o in pair)
            findings.append(Finding("loss", error(mine, true), LOSS[dtype]))
        return findings

    return Check(op, f"{name}, {T}x{C}x{'+'.join(map(str, sizes))}", run, small=small)


def _loss(name: str, sizes: Sequence[int], T: int, C: int, *args: Any, **options: Any) -> Check:
    return _check("linear_cross_entropy", eager_loss, name, sizes, T, C, *args, **options)


def _logprob(name: str, sizes: Sequence[int], T: int, C: int, *args: Any, **options: Any) -> Check:
    return _check("linear_logprob", eager_logprob, name, sizes, T, C, *args, **options)


def _weighted(where: dict[str, Any]) -> dict[str, Any]:
    weight = torch.rand(where["labels"].shape, generator=torch.Generator().manual_seed(3)) * 3
    weight[::5] = 0
    return {"row_weight": weight}


def _classes(where: dict[str, Any]) -> dict[str, Any]:
    own = own_class(where)
    return {"row_class": torch.where(torch.arange(len(own)) % 3 == 0, -1, own)}


def _listed_whole(where: dict[str, Any]) -> dict[str, Any]:
    """All rows that have a label, against everything."""
    rows = torch.nonzero(where["labels"] >= 0)[:, 0].int()
    return {"rows": rows, "class_cu": [0] * (len(where["sizes"]) + 1) + [len(rows)]}


_ALL = {"z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 4.0}
CHECKS = [
    _loss("one row", [13], 1, 8),
    _loss("no row", [13, 5], 0, 8),
    _loss("primes", [1009], 37, 17),
    _loss("three ranges", [11, 7, 1], 61, 24),
    _loss("weighted, all terms", [11, 7], 61, 24, _weighted, **_ALL),
    _loss("joint, measured", [11, 70], 61, 24, _weighted, joint=True, metrics=True),
    _loss("classes", [130, 7], 61, 24, _classes, metrics=True, **_ALL),
    _loss("grouped", [130, 9], 61, 24, grouped, metrics=True, **_ALL),
    _loss("grouped, some whole", [130, 9], 61, 24, lambda w: {**grouped(w, whole=True), **_weighted(w)}),
    _loss("listed", [130, 9], 61, 24, _listed_whole, joint=True),
    _loss("a text model", [151936], 16, 64, small=False, joint=True, metrics=True),
    _loss("text and codes", [151936, 65536], 12, 64, small=False, joint=True, z_loss=1e-4),
    _loss("text and codes, grouped", [151936, 65536], 12, 64, grouped, small=False, z_loss=1e-4),
    _loss("many rows", [4096], 300, 64, small=False, chunk=2 << 20, joint=True),
    _logprob("one row", [13], 1, 8),
    _logprob("no row", [13, 5], 0, 8),
    _logprob("three ranges", [11, 7, 1], 61, 24),
    _logprob("hot, capped", [1009], 37, 17, temperature=0.7, softcap=4.0, entropy=True),
    _logprob("classes", [130, 7], 61, 24, _classes, temperature=1.5, entropy=True),
    _logprob("grouped", [130, 9], 61, 24, grouped, entropy=True),
    _logprob("a text model", [151936], 16, 64, small=False, temperature=0.9, entropy=True),
]
