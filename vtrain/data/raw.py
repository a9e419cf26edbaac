"""Raw packs: stored samples laid end to end with their segments, loss runs and keys, for other people's trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from vtrain.batch import Take, fresh, seqlen_bucket
from vtrain.data.assemble import chosen_documents, groups
from vtrain.data.format import SEGMENT_SPAN
from vtrain.data.samples import cumulative, pack_runs, ragged, unpack_runs

if TYPE_CHECKING:
    from vtrain.data.mix import Source
    from vtrain.data.plan import PlannedStep

Ragged = tuple[np.ndarray, np.ndarray]  # (flat, cu)


@dataclass(slots=True)
class RawPack:
    """One bin: no labels, no positions, nothing that a trainer of one's own would make again.

    ids: int32[T], -1 in the padding. cu_seqlens: int32[S+1] as in `PackedBatch`, and max_seqlen. lengths: int64[d] of
    the d real documents; keys: u64[d]. segments: format.SEGMENT_SPAN[m], those of document i are
    segments[segment_cu[i]:segment_cu[i+1]], `start` counted in the document. runs: u32[r] loss runs
    (samples.unpack_runs) with run_cu; a document without runs has weight 1 everywhere. tokens: the sum of lengths.
    """

    ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    lengths: np.ndarray
    keys: np.ndarray
    segments: np.ndarray
    segment_cu: np.ndarray
    runs: np.ndarray
    run_cu: np.ndarray
    tokens: int

    @property
    def documents(self) -> int:
        return len(self.lengths)


class RawAssembler:
    """Makes `RawPack`s; no composer is asked."""

    def __init__(self, sources: Sequence[Source], *, pack_tokens: int, max_documents: int) -> None:
        self.sources, self.pack_tokens, self.max_documents = sources, pack_tokens, max_documents

    def __call__(self, step: PlannedStep, bins: Sequence[int | None], take: Take = fresh) -> list[RawPack]:
        """The packs of the bins of a step, all padding for None. `take` gives their memory."""
        documents, counts = chosen_documents(step, bins)
        A, T, n = len(counts), self.pack_tokens, len(documents)
        lengths, first = step.length[documents].astype(np.int64), cumulative(counts)
        ends, bin_of = cumulative(lengths), np.repeat(np.arange(A), counts)
        starts = ends[:-1] - ends[first[bin_of]]
        tokens = ends[first[1:]] - ends[first[:-1]]
        ids, id_tensor = take((A, T), np.int32)
        bounds, cu_tensor = take((A, self.max_documents + 1), np.int32)
        flat = ids.reshape(-1)
        flat[ragged(np.arange(A) * T + tokens, T - tokens)] = -1
        bounds[...] = T
        bounds[:, 0] = 0
        bounds[bin_of, np.arange(n) - first[bin_of] + 1] = starts + lengths

        keys = np.empty(n, dtype=np.uint64)
        segments: list[tuple[np.ndarray, Ragged]] = []
        runs: list[tuple[np.ndarray, Ragged]] = []
        begin, rows = step.start[documents].astype(np.int64), starts + bin_of * T
        cut = (step.full != step.length)[documents]
        for source, _, places in groups(step, documents):
            dataset, index = self.sources[source].dataset, step.index[documents[places]]
            dataset.read_spans(index, begin[places], lengths[places], flat, rows[places])
            keys[places] = dataset.keys(index)
            found, found_runs = dataset.segments(index), dataset.loss_runs(index)
            if cut[places].any():
                found = _cut_segments(found, begin[places], lengths[places])
                found_runs = _cut_runs(found_runs, begin[places], lengths[places])
            segments.append((places, found))
            runs.append((places, found_runs))
        longest = T - tokens  # the tail is a document, too
        np.maximum.at(longest, bin_of, lengths)
        parts = (
            id_tensor.unbind(),
            cu_tensor.unbind(),
            map(seqlen_bucket, longest.tolist()),
            _split(lengths, first),
            _split(keys, first),
            *_split_ragged(_merged(segments, n, SEGMENT_SPAN), first),
            *_split_ragged(_merged(runs, n, np.dtype(np.uint32)), first),
            tokens.tolist(),
        )
        return [RawPack(*pack) for pack in zip(*parts)]


def _split(rows: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
    return [rows[start:stop] for start, stop in pairwise(first.tolist())]


def _split_ragged(table: Ragged, first: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per bin its items, and the bounds of its documents among them, from 0."""
    flat, cu = table
    counts = np.diff(first) + 1  # bounds of a bin: one more than documents
    bounds = cu[ragged(first[:-1], counts)] - np.repeat(cu[first[:-1]], counts)
    return _split(flat, cu[first]), _split(bounds, cumulative(counts))


def _merged(parts: list[tuple[np.ndarray, Ragged]], n: int, dtype: np.dtype) -> Ragged:
    """Ragged rows of groups of documents in the order of all documents."""
    if len(parts) == 1:
        return parts[0][1]
    counts = np.zeros(n, dtype=np.int64)
    for places, (_, cu) in parts:
        counts[places] = np.diff(cu)
    cu = cumulative(counts)
    flat = np.empty(cu[-1], dtype=dtype)
    for places, (rows, _) in parts:
        flat[ragged(cu[places], counts[places])] = rows
    return flat, cu


def _kept(start: np.ndarray, stop: np.ndarray, cu: np.ndarray, begin: np.ndarray, length: np.ndarray):
    """(flags, new starts, new lengths, new cu) of items that tile documents of which begin..begin+length remain."""
    document = np.repeat(np.arange(len(begin)), np.diff(cu))
    low, high = np.maximum(start, begin[document]), np.minimum(stop, (begin + length)[document])
    kept = high > low
    return kept, (low - begin[document])[kept], (high - low)[kept], cumulative(kept)[cu]


def _cut_segments(found: Ragged, begin: np.ndarray, length: np.ndarray) -> Ragged:
    segments, cu = found
    start = segments["start"].astype(np.int64)
    kept, starts, lengths, cu = _kept(start, start + segments["length"], cu, begin, length)
    segments = segments[kept]
    segments["start"], segments["length"] = starts, lengths
    return segments, cu


def _cut_runs(found: Ragged, begin: np.ndarray, length: np.ndarray) -> Ragged:
    runs, cu = found
    lengths, classes = unpack_runs(runs)
    ends = cumulative(lengths)
    start = ends[:-1] - np.repeat(ends[cu[:-1]], np.diff(cu))
    kept, _, lengths, cu = _kept(start, start + lengths, cu, begin, length)
    return pack_runs(lengths, classes[kept]), cu
