"""Output head with cross-entropy, over the whole vocabulary and restricted to a row's own range; log-probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Cost, Judged, On, Problem, case, compiled

import vkernels

ROWS = 8  # that are judged
VISUAL = 0.7  # share of rows whose label is a visual code
CHUNK = 4096  # rows whose logits the chunked peers hold at once
SIZES = {"T": 16384, "C": 2048}
TOY = {"T": 512, "C": 128}


def plain(h, weight, labels):
    return F.cross_entropy(F.linear(h, weight).float(), labels, reduction="sum")


def joined(function: Callable[..., torch.Tensor], labels: torch.Tensor) -> Callable:
    """A peer that knows one table only."""
    return lambda h, *weights: function(h, weights[0] if len(weights) == 1 else torch.cat(weights), labels)


def torch_chunks(labels: torch.Tensor) -> Callable:
    """Rows in chunks, recomputed in the backward pass: what saves the memory in plain torch."""

    def build() -> Callable:
        from torch.utils.checkpoint import checkpoint

        part = torch.compile(plain, dynamic=False)

        def run(h, *weights):
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            parts = zip(h.split(CHUNK), labels.split(CHUNK))
            return sum(checkpoint(part, x, weight, y, use_reentrant=False) for x, y in parts)

        return run

    return build


def liger(labels: torch.Tensor) -> Callable:
    def build() -> Callable:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        return joined(lambda h, w, y: fused(h, w, y, reduction="sum", accum_dtype=torch.float32), labels)

    return build


def cut(labels: torch.Tensor) -> Callable:
    """Without dropping small gradients, which is what the others compute."""

    def build() -> Callable:
        from cut_cross_entropy import linear_cross_entropy

        return joined(lambda h, w, y: linear_cross_entropy(h, w, y, reduction="sum", filter_eps=None), labels)

    return build


def torch_fused(labels: torch.Tensor) -> Callable:
    """Of torch 2.13 and later."""

    def build() -> Callable:
        return joined(lambda h, w, y, f=F.linear_cross_entropy: f(h, w, y, reduction="sum"), labels)

    return build


def drawn_labels(on: On, T: int, sizes: list[int]) -> torch.Tensor:
    """int32[T]: of all ids, or 70 % in the second range where there are two."""
    if len(sizes) == 1:
        return on.randint(0, sizes[0], T)
    text, visual = on.randint(0, sizes[0], T), on.randint(sizes[0], sum(sizes), T)
    picked = torch.rand(T, generator=on.generator, device=on.device) < VISUAL
    return torch.where(picked, visual, text)


def head(on: On, T: int, C: int, sizes: list[int]) -> tuple[torch.Tensor, list[torch.Tensor], list[int], torch.Tensor]:
    """h, weights, bases, labels."""
    h, weights = on.randn(T, C), [on.randn(V, C, scale=C**-0.5) for V in sizes]
    return h, weights, [sum(sizes[:i]) for i in range(len(sizes))], drawn_labels(on, T, sizes)


@case("linear_cross_entropy", "152k", value=97, full={**SIZES, "sizes": [151936]}, small={**TOY, "sizes": [8192]})
@case("linear_cross_entropy", "152k + 16k", value=90, full={**SIZES, "sizes": [151936, 16384]},
      small={**TOY, "sizes": [8192, 1024]})  # fmt: skip
@case("linear_cross_entropy", "152k + 16k, restricted", value=96,
      full={**SIZES, "sizes": [151936, 16384], "restricted": True},
      small={**TOY, "sizes": [8192, 1024], "restricted": True})  # fmt: skip
def linear_cross_entropy(on: On, T: int, C: int, sizes: list[int], restricted: bool = False) -> Problem:
    h, weights, bases, labels = head(on, T, C, sizes)
    y, options = labels.long(), {}
    groups = [torch.nonzero((y >= base) & (y < base + size))[:, 0] for base, size in zip(bases, sizes)]
    if restricted:
        class_cu = [0, *itertools.accumulate(map(len, groups))]
        options = {"rows": torch.cat(groups).int(), "class_cu": class_cu}
        peers = {"torch eager": lambda: by_class(y, groups, bases)}
        pairs = sum(len(rows) * size for rows, size in zip(groups, sizes))
    else:
        peers = {
            "torch eager": lambda: joined(plain, y), "torch.compile chunks": torch_chunks(y),
            "torch linear_cross_entropy": torch_fused(y), "Liger": liger(y), "cut-cross-entropy": cut(y),
        }  # fmt: skip
        pairs = T * sum(sizes)

    def ours(h, *weights):
        return vkernels.linear_cross_entropy(h, weights, bases, labels, sizes=sizes, joint=True, **options)[0]

    judged = [rows[rows < ROWS] for rows in groups]
    truth = by_class(y, judged, bases) if restricted else joined(plain, y[:ROWS])
    size, table = on.dtype.itemsize, sum(sizes) * C
    return Problem(
        [h, *weights], ours, peers, judged=Judged(truth, [h[:ROWS], *weights], ROWS, outputs=False),
        forward=Cost(2.0 * pairs * C, size * (table + T * C)),
        backward=Cost(4.0 * pairs * C, 2 * size * (table + T * C)), more={"pairs": pairs}, passes=("both",),
    )  # fmt: skip


def by_class(labels: torch.Tensor, groups: list[torch.Tensor], bases: list[int]) -> Callable:
    """The restricted head in plain torch: the rows of each class against its own table."""

    def run(h, *weights):
        return sum(plain(h[rows], w, labels[rows] - base) for rows, w, base in zip(groups, weights, bases))

    return run


@case("linear_logprob", value=75, full={**SIZES, "V": 151936}, small={**TOY, "V": 8192})
def linear_logprob(on: On, T: int, C: int, V: int) -> Problem:
    h, (weight,), bases, labels = head(on, T, C, [V])
    y = labels.long()[:, None]

    def whole(h, weight):
        return F.linear(h, weight).float().log_softmax(-1).gather(1, y)[:, 0]

    def chunks(part: Callable) -> Callable:
        def run(h, weight):
            return torch.cat([part(x, weight, i) for x, i in zip(h.split(CHUNK), y.split(CHUNK))])

        return run

    def rows(h, weight, y):
        logits = F.linear(h, weight).float()
        return logits.gather(1, y)[:, 0] - logits.logsumexp(-1)

    @torch.no_grad()
    def ours(h, weight):
        return vkernels.linear_logprob(h, [weight], bases, labels, sizes=[V])

    peers = {
        "torch eager": lambda: torch.no_grad()(whole), "torch eager chunks": lambda: torch.no_grad()(chunks(rows)),
        "torch.compile chunks": lambda: torch.no_grad()(chunks(compiled(rows)())),
    }  # fmt: skip
    judged = Judged(lambda h, w: rows(h, w, y[:ROWS]), [h[:ROWS], weight], ROWS)
    cost = Cost(2.0 * T * V * C, on.dtype.itemsize * (V * C + T * C))
    return Problem([h, weight], ours, peers, judged=judged, forward=cost)
