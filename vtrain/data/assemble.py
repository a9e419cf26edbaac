"""From planned documents to packed batches: compose pieces, read them straight into the batches, finish the labels.

Everything is done for all bins of a step at once, in a handful of array operations and calls into C++; there is no
Python per document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vtrain._host import lay_pieces, spread_runs
from vtrain.batch import TABLES, Bins, PackedBatch, Slots, Take, fresh, seqlen_bucket, slot_table
from vtrain.data.compose import Composer
from vtrain.data.samples import cumulative, ragged
from vtrain.data.schema import Modality
from vtrain.vocab import Vocabulary

if TYPE_CHECKING:
    from vtrain.data.mix import Source
    from vtrain.data.plan import PlannedStep
    from vtrain.data.reader import Dataset

SEGMENT_FIELDS = 8  # first row, tokens, modality, role, t, h, w, document


class Spans(NamedTuple):
    """Pieces of samples and where they lie, int64 each. document: number among all documents of the bins."""

    sample: np.ndarray
    start: np.ndarray
    count: np.ndarray
    row: np.ndarray
    document: np.ndarray


class SlotRows(NamedTuple):
    """Slot rows of all bins: data float32[r, dim] at flat batch rows int64[r]; by segment first row and rows."""

    data: np.ndarray
    row: np.ndarray
    first: np.ndarray
    count: np.ndarray


def chosen_documents(step: PlannedStep, bins: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
    """(int64[d] numbers of the documents in those bins, in their order; int64[bins] how many each has; None has 0)."""
    numbers = np.array([-1 if b is None else b for b in bins], dtype=np.int64)
    first = step.bin_cu[numbers]
    counts = np.where(numbers < 0, 0, step.bin_cu[numbers + 1] - first)
    return ragged(first, counts), counts


def groups(step: PlannedStep, documents: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(source, epoch, int64 places among `documents`): documents that are composed by one call."""
    source, epoch = step.source[documents], step.epoch[documents]
    if not len(documents):
        return
    if (source == source[0]).all() and (epoch == epoch[0]).all():
        yield int(source[0]), int(epoch[0]), np.arange(len(documents))
        return
    order = np.lexsort((epoch, source))
    source, epoch = source[order], epoch[order]
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(source) != 0) | (np.diff(epoch) != 0)]))
    for places in np.split(order, starts[1:]):
        yield int(step.source[documents[places[0]]]), int(step.epoch[documents[places[0]]]), places


class Assembler:
    """Makes `PackedBatch`es of `pack_tokens` rows and `max_documents` sequences.

    composers: one per source. tables: what is made beside the batch, of batch.TABLES. caps: slot rows and slot segments
    of a batch; None = the next bucket of each.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        composers: Sequence[Composer],
        vocab: Vocabulary,
        *,
        pack_tokens: int,
        max_documents: int,
        tables: Sequence[str] = (),
        caps: tuple[int, int] | None = None,
    ) -> None:
        for table in tables:
            if table not in TABLES:
                raise ValueError(f"loader: table {table!r}; expected one of {', '.join(TABLES)}")
        self.sources, self.composers, self.vocab = sources, composers, vocab
        self.pack_tokens, self.max_documents, self.tables, self.caps = pack_tokens, max_documents, tables, caps
        self.weighted = any(c.weighted(s.dataset.schema) for s, c in zip(sources, composers))
        self.widths = _feature_widths(sources, composers)

    def __call__(self, step: PlannedStep, bins: Sequence[int | None], take: Take = fresh) -> list[PackedBatch]:
        """The batches of the bins of a step, all padding for None. `take` gives their memory."""
        documents, counts = chosen_documents(step, bins)
        lengths = step.length[documents].astype(np.int64)
        filled = Bins(lengths, counts, self.pack_tokens, self.max_documents, take)
        filled.sources[filled.bin_of, filled.place] = step.source[documents]
        segments: list[np.ndarray] = []
        slots: dict[str, list[SlotRows]] = {name: [] for name in self.widths}
        for source, epoch, places in groups(step, documents):
            self._fill(filled, step, documents[places], source, epoch, places, segments, slots)
        batches = filled.finish(self.vocab, self.weighted, self.tables)
        for name, rows in slots.items():
            for batch, table in zip(batches, self._slots(rows, self.widths[name], len(bins), take)):
                batch.slots[name] = table
        if "segments" in self.tables:
            for batch, table in zip(batches, self._segment_tables(filled, segments, take)):
                batch.segments = table
        return batches

    def _fill(
        self,
        filled: Bins,
        step: PlannedStep,
        numbers: np.ndarray,
        source: int,
        epoch: int,
        places: np.ndarray,
        segments: list[np.ndarray],
        slots: dict[str, list[SlotRows]],
    ) -> None:
        """Compose and read the documents of one source and epoch: `numbers` in the step, `places` in the bins."""
        dataset, index = self.sources[source].dataset, step.index[numbers]
        pieces = self.composers[source].compose(dataset, index, epoch)
        self._check_promise(self.sources[source], index, pieces.lengths(), step.full[numbers])
        found, by_runs, slot_spans = lay_pieces(
            pieces.cu,
            pieces.sample,
            pieces.start,
            pieces.count,
            pieces.token,
            pieces.weight,
            step.start[numbers],
            step.length[numbers],
            filled.rows[places],
            pieces.labels,
            filled.flat_ids,
            filled.flat_weights,
        )
        spans = Spans(*found)
        dataset.read_spans(spans.sample, spans.start, spans.count, filled.flat_ids, spans.row)
        if pieces.labels:
            filled.stored_labels[places] = 1
            dataset.read_spans(spans.sample, spans.start, spans.count, filled.flat_labels, spans.row, stream="labels")
        if by_runs.any():
            _weigh_by_runs(dataset, spans, by_runs, filled.flat_weights)
        filled.keys[filled.bin_of[places], filled.place[places]] = dataset.keys(index)
        slot_spans = Spans(*slot_spans)
        if len(slot_spans.sample):
            slots[pieces.features].append(_read_slots(dataset, pieces.features, slot_spans))
        if "segments" in self.tables:
            segments.append(_stored_segments(dataset, spans, places))
            if len(slot_spans.sample):
                segments.append(_slot_segments(dataset, pieces.features, slot_spans, places))

    def _check_promise(self, source: Source, index: np.ndarray, found: np.ndarray, promised: np.ndarray) -> None:
        wrong = found != promised
        if wrong.any():
            at = int(np.argmax(wrong))
            key = int(source.dataset.keys(index[at : at + 1])[0])
            raise RuntimeError(
                f"source {source.name!r}: sample {index[at]} (key {key:#x}) was composed to {found[at]} tokens, its "
                f"composer promised {promised[at]}"
            )

    def _slots(self, parts: list[SlotRows], width: int, bins: int, take: Take) -> Iterator[Slots]:
        """One table per bin, its segments in row order."""
        none = SlotRows(np.zeros((0, width), np.float32), *(np.zeros(0, np.int64) for _ in range(3)))
        data, row, first, count = (np.concatenate(columns) for columns in zip(none, *parts))
        T = self.pack_tokens
        for a in range(bins):
            own, of = np.flatnonzero(row // T == a), first // T == a
            own, order = own[np.argsort(row[own], kind="stable")], np.argsort(first[of], kind="stable")
            yield slot_table(data[own], row[own] - a * T, count[of][order], T, self.caps, take)

    def _segment_tables(self, filled: Bins, parts: list[np.ndarray], take: Take) -> Iterator[torch.Tensor]:
        """int32[M, 8] per bin in row order. M: room for one segment per document, or the bucket that holds them."""
        table = np.concatenate([np.zeros((0, SEGMENT_FIELDS), np.int64), *parts])
        table = table[np.argsort(table[:, 0], kind="stable")]
        bin_of = table[:, 0] // self.pack_tokens
        table[:, 0] -= bin_of * self.pack_tokens
        table[:, 7] = filled.place[table[:, 7]]
        for a in range(len(filled.documents)):
            own = table[bin_of == a]
            out, tensor = take((seqlen_bucket(max(len(own), self.max_documents)), SEGMENT_FIELDS), np.int32)
            out[: len(own)], out[len(own) :] = own, -1
            yield tensor


def _weigh_by_runs(dataset: Dataset, spans: Spans, chosen: np.ndarray, weights: np.ndarray) -> None:
    if not chosen.all():
        spans = Spans(*(column[chosen] for column in spans))
    runs, cu = dataset.loss_runs(spans.sample)
    if len(runs):
        classes = np.array(dataset.schema.loss_weights, dtype=np.float32)
        spread_runs(runs, cu, spans.start, spans.count, spans.row, classes, weights)


def _read_slots(dataset: Dataset, name: str, spans: Spans) -> SlotRows:
    column = dataset.features(name)
    samples, which = np.unique(spans.sample, return_inverse=True)
    counts, cu = column.counts(samples)
    rows, _ = column.read(samples)
    start = cumulative(counts)[cu[which]] + spans.start
    return SlotRows(
        rows[ragged(start, spans.count)], ragged(spans.row, spans.count), np.asarray(spans.row), np.asarray(spans.count)
    )


def _stored_segments(dataset: Dataset, spans: Spans, places: np.ndarray) -> np.ndarray:
    """int64[m, 8]: what the spans hold of the stored segments."""
    stored, cu = dataset.segments(spans.sample)
    span = np.repeat(np.arange(len(spans.sample)), np.diff(cu))
    low = np.maximum(stored["start"].astype(np.int64), spans.start[span])
    high = np.minimum(stored["start"].astype(np.int64) + stored["length"], (spans.start + spans.count)[span])
    row = spans.row[span] + low - spans.start[span]
    kept = high > low
    return _rows_of(stored, row, high - low, places[spans.document[span]])[kept]


def _slot_segments(dataset: Dataset, name: str, spans: Spans, places: np.ndarray) -> np.ndarray:
    """int64[m, 8]: slot rows as segments of modality FEATURE, with the grid of their stored segment."""
    stored, _ = dataset.segments(spans.sample)
    counts, cu = dataset.features(name).counts(spans.sample)
    ends = cumulative(counts)
    at = np.searchsorted(ends, ends[cu[:-1]] + spans.start, side="right") - 1  # the segment that holds the first row
    table = _rows_of(stored[at], spans.row, spans.count, places[spans.document])
    table[:, 2] = Modality.FEATURE
    return table


def _rows_of(stored: np.ndarray, row: np.ndarray, count: np.ndarray, document: np.ndarray) -> np.ndarray:
    names = ("modality", "role", "t", "h", "w")
    return np.stack([row, count, *(stored[name].astype(np.int64) for name in names), document], axis=1)


def _feature_widths(sources: Sequence[Source], composers: Sequence[Composer]) -> dict[str, int]:
    """Width of every slot; ValueError where sources disagree."""
    widths: dict[str, int] = {}
    for source, composer in zip(sources, composers):
        name = getattr(composer, "features", "")
        if name:
            width = source.dataset.features(name).dim
            if widths.setdefault(name, width) != width:
                raise ValueError(f"source {source.name!r}: features {name} have {width} columns, others {widths[name]}")
    return widths
