"""Token embeddings: ids of a long tail with hot specials, one table and two, order from the host or the device."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from cases import Cost, Judged, On, Problem, case, compiled, eager

import vkernels

ROWS = 64
SPECIALS = 0.3  # share of rows that are one of four ids (begin, end, padding, newline)


def drawn_ids(T: int, V: int) -> np.ndarray:
    """int32[T] by Zipf's law over V ids, with 30 % specials."""
    random = np.random.default_rng(5)
    ids = np.minimum(random.zipf(1.2, T) + 3, V - 1)
    return np.where(random.random(T) < SPECIALS, random.integers(0, 4, T), ids).astype(np.int32)


class IndexAdd(torch.autograd.Function):
    """A lookup whose gradient is an index_add: atomics, in an order that changes from run to run."""

    @staticmethod
    def forward(ctx, ids, table):
        ctx.save_for_backward(ids)
        ctx.rows = table.shape[0]
        return table[ids]

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        return None, dy.new_zeros(ctx.rows, dy.shape[1]).index_add_(0, ids, dy)


FULL = {"T": 32768, "C": 2048}
TOY = {"T": 4096, "C": 256}


@case("embed", "152k, order from the host", value=80, full={**FULL, "sizes": [151936], "order": "host"},
      small={**TOY, "sizes": [8192], "order": "host"})  # fmt: skip
@case("embed", "152k, sorted on the device", value=48, full={**FULL, "sizes": [151936], "order": "device"},
      small={**TOY, "sizes": [8192], "order": "device"})  # fmt: skip
@case("embed", "152k + 16k, order from the host", value=47, full={**FULL, "sizes": [151936, 16384], "order": "host"},
      small={**TOY, "sizes": [8192, 1024], "order": "host"})  # fmt: skip
def embed(on: On, T: int, C: int, sizes: list[int], order: str) -> Problem:
    on_host = torch.from_numpy(drawn_ids(T, sum(sizes)))
    ids, tables = on_host.to(on.device), [on.randn(V, C) for V in sizes]
    bases = [sum(sizes[:i]) for i in range(len(sizes))]
    sorted_ids = None
    if order == "host":
        found = vkernels.embed_order(on_host, bases, sizes)
        sorted_ids = type(found)(*(x.to(on.device) for x in found))
    long = ids.long()

    def ours(*tables):
        return vkernels.embed(ids, tables, bases, sizes=sizes, order=sorted_ids)

    def plain(*tables):
        if len(tables) == 1:
            return F.embedding(long, tables[0])
        second = long >= bases[1]
        text = F.embedding(torch.where(second, 0, long), tables[0])
        return torch.where(second[:, None], F.embedding((long - bases[1]).clamp(min=0), tables[1]), text)

    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain)}
    if len(sizes) == 1:
        peers["index_add"] = lambda: lambda table: IndexAdd.apply(long, table)
    judged = Judged(lambda *t: F.embedding(long[:ROWS], torch.cat(t)), tables, ROWS, gradient=False)
    size, touched = on.dtype.itemsize * C, len(np.unique(on_host))
    return Problem(
        tables, ours, peers, judged=judged,
        forward=Cost(0.0, 2 * T * size), backward=Cost(0.0, (T + touched) * size), more={"touched": touched},
    )  # fmt: skip
