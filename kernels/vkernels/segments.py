"""Rows sorted by where they are to be added: the tables of a segmented sum, made on the host or on the device.

Their shapes follow from the number of rows and destinations alone, so a captured graph can replay with other contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vkernels import _host
from vkernels.host import to_numpy

# Longest run of rows that one program adds. 64 keeps the longest chain of dependent loads at 16 tiles of 4 rows; all
# 32768 rows of a step at one destination are 512 pieces, which a second pass joins in 16 tiles of 32.
CHUNK = 64


class Segments(NamedTuple):
    """The rows of every destination, in the order in which they are added; all int32.

    order[N]: the entries sorted by destination, stable; those without a destination come last.
    pieces[P, 4]: (begin, end, destination, to): order[begin:end] are at most CHUNK entries of one segment. Their sum is
    that of the segment number ~to, or the partial sum number `to` where the segment has several pieces.
    joins[J, 4]: (first, last + 1, destination, to) of those partial sums, for the segment number ~to.
    rows[U]: the destination of each segment, ascending. counts[3]: how many pieces, joins and segments there are; what
    the tables hold beyond that is zero.
    """

    order: torch.Tensor
    pieces: torch.Tensor
    joins: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        return Segments(*(t.to(device, non_blocking=non_blocking) for t in self))


def _bounds(entries: int, destinations: int) -> tuple[int, int, int]:
    """The most pieces, joins and segments that so many entries can make."""
    rows = min(entries, destinations)
    return min(entries, rows + entries // CHUNK), entries // (CHUNK + 1), rows


def most_partial_sums(entries: int) -> int:
    """A segment in several pieces has at least CHUNK + 1 entries, and at most 2 pieces for as many."""
    return 2 * entries // (CHUNK + 1)


def empty_segments(entries: int, destinations: int, device: torch.device | str = "cpu") -> Segments:
    """Tables of the right shapes, with nothing in them."""
    pieces, joins, rows = _bounds(entries, destinations)
    shapes = (entries,), (pieces, 4), (joins, 4), (rows,), (3,)
    return Segments(*(torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes))


def sort_segments(keys: torch.Tensor, destinations: int) -> Segments:
    """keys int[N], the destination of each entry, in [0, destinations) or none -> the tables, on the keys' device.

    Without a copy to the host, and with no shape that depends on the data.
    """
    n = keys.shape[0]
    if n == 0:
        return empty_segments(n, destinations, keys.device)
    keys, order = torch.sort(torch.where((keys >= 0) & (keys < destinations), keys, destinations).int(), stable=True)
    at = torch.arange(n, dtype=torch.int32, device=keys.device)
    begin = torch.searchsorted(keys, keys, out_int32=True)
    end = torch.searchsorted(keys, keys, right=True, out_int32=True)
    opens = (keys < destinations) & ((at - begin) % CHUNK == 0)
    first, several = opens & (at == begin), end - begin > CHUNK
    marks = torch.stack([opens, first & several, first, opens & several])
    number = torch.cumsum(marks, 1, dtype=torch.int32) - 1
    segment, slot = number[2:]
    pieces = torch.stack([at, torch.minimum(at + CHUNK, end), keys, torch.where(several, slot, ~segment)], 1)
    joins = torch.stack([slot, slot + (end - begin + CHUNK - 1) // CHUNK, keys, ~segment], 1)
    tables = zip((pieces, joins, keys), marks, number, _bounds(n, destinations))
    return Segments(order.int(), *(_pack(*t) for t in tables), counts=number[:3, -1] + 1)


def _pack(values: torch.Tensor, marked: torch.Tensor, number: torch.Tensor, size: int) -> torch.Tensor:
    """The marked values, in order, zeros after them; the others all go to one more place, which is cut off."""
    table = values.new_zeros(size + 1, *values.shape[1:])
    return table.index_put((torch.where(marked, number, size).long(),), values)[:size]


def order_segments(
    indices: Sequence[torch.Tensor], which: Sequence[int], bases: Sequence[int], sizes: Sequence[int]
) -> Segments:
    """On the host, for the ranges of `destinations`: the tables of the entries of all index vectors, int[T] each."""
    indices = [v.int().contiguous() for v in indices]
    found = empty_segments(sum(v.shape[0] for v in indices), sum(sizes))
    order = torch.empty_like(found.order)
    _host.embed_order(
        [to_numpy(v) for v in indices], which, bases, sizes, CHUNK, to_numpy(order), *map(to_numpy, found[1:])
    )
    return found._replace(order=order)


def destinations(
    indices: Sequence[torch.Tensor], which: Sequence[int], bases: Sequence[int], sizes: Sequence[int]
) -> torch.Tensor:
    """-> int[vectors * T], the number of every entry's row, -1 where no range has it.

    Range i holds the ids [bases[i], bases[i] + sizes[i]) of the vector indices[which[i]]; its rows are numbered after
    those of the ranges before.
    """
    keys = [torch.full_like(v, -1) for v in indices]
    start = 0
    for i, base, size in zip(which, bases, sizes, strict=True):
        local = indices[i] - base
        keys[i] = torch.where((local >= 0) & (local < size), local + start, keys[i])
        start += size
    return torch.cat(keys)
