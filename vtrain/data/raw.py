"""Raw packs: stored samples laid end to end with their segments, loss runs and keys, for other people's trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vtrain._host import lay_documents
from vtrain.batch import Take, fresh, seqlen_bucket
from vtrain.data.assemble import chosen_documents, groups
from vtrain.data.format import SEGMENT_SPAN
from vtrain.data.samples import cumulative, pack_runs, ragged, unpack_runs

if TYPE_CHECKING:
    from vtrain.data.mix import Source
    from vtrain.data.plan import PlannedStep

Ragged = tuple[np.ndarray, np.ndarray]  # (flat, cu)
RUN = np.dtype(np.uint32)


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


@dataclass(slots=True)
class RawPacks(Sequence):
    """The A bins of a step in one piece, so that a step can be copied to a device at once; `[a]` is a `RawPack`.

    ids: int32[A,T]; cu_seqlens: int32[A,S+1]; tokens: int64[A]. The documents of all bins in order, bin a has
    bin_cu[a]:bin_cu[a+1] of them: lengths, keys, segments with segment_cu int64[n+1], runs with run_cu int64[n+1].
    """

    ids: torch.Tensor
    cu_seqlens: torch.Tensor
    tokens: np.ndarray
    bin_cu: np.ndarray
    lengths: np.ndarray
    keys: np.ndarray
    segments: np.ndarray
    segment_cu: np.ndarray
    runs: np.ndarray
    run_cu: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, a: int) -> RawPack:
        a = range(len(self))[a]
        first, last = self.bin_cu[a : a + 2].tolist()
        segment_cu, run_cu = self.segment_cu[first : last + 1], self.run_cu[first : last + 1]
        lengths, tokens = self.lengths[first:last], int(self.tokens[a])
        return RawPack(
            ids=self.ids[a],
            cu_seqlens=self.cu_seqlens[a],
            # the tail is a document, too
            max_seqlen=seqlen_bucket(max(int(lengths.max(initial=0)), self.ids.shape[1] - tokens)),
            lengths=lengths,
            keys=self.keys[first:last],
            segments=self.segments[segment_cu[0] : segment_cu[-1]],
            segment_cu=segment_cu - segment_cu[0],
            runs=self.runs[run_cu[0] : run_cu[-1]],
            run_cu=run_cu - run_cu[0],
            tokens=tokens,
        )


class RawAssembler:
    """Makes `RawPack`s; no composer is asked."""

    def __init__(self, sources: Sequence[Source], *, pack_tokens: int, max_documents: int) -> None:
        self.sources, self.pack_tokens, self.max_documents = sources, pack_tokens, max_documents

    def __call__(self, step: PlannedStep, bins: Sequence[int | None], take: Take = fresh) -> RawPacks:
        """The packs of the bins of a step, all padding for None. `take` gives their memory."""
        documents, counts = chosen_documents(step, bins)
        A, T, n = len(counts), self.pack_tokens, len(documents)
        lengths, first = step.length[documents].astype(np.int64), cumulative(counts)
        ids, id_tensor = take((A, T), np.int32)
        bounds, cu_tensor = take((A, self.max_documents + 1), np.int32)
        rows, tokens = lay_documents(lengths, counts, bounds, ids)
        flat = ids.reshape(-1)

        keys = np.empty(n, dtype=np.uint64)
        segments: list[tuple[np.ndarray, Ragged]] = []
        runs: list[tuple[np.ndarray, Ragged]] = []
        begin = step.start[documents].astype(np.int64)
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
        (all_segments, segment_cu), (all_runs, run_cu) = _merged(segments, n, SEGMENT_SPAN), _merged(runs, n, RUN)
        return RawPacks(id_tensor, cu_tensor, tokens, first, lengths, keys, all_segments, segment_cu, all_runs, run_cu)


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
