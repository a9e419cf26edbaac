"""PackedBatch: the one thing that data hands to models. Fixed shapes; what can be counted is counted on the host.

Legend: A bins, each T tokens (padded) and S sequences including the padding document and empty ones; R vocabulary
ranges. Rows are numbered over all bins where arrays are flat: bin a has the rows a*T .. a*T+T-1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from vtrain._host import finish_bins, lay_documents, rows_by_class
from vtrain.vocab import Vocabulary

IGNORE = -100  # a label that is not scored
PAD_KEY = 0  # document key of padding and empty documents
CLASS_BLOCK = 512  # groups of rows_by_class are padded to whole blocks
TABLES = ("segments", "rows_by_class")  # what is made only where it is asked for

# Uninitialised memory for (shape, numpy dtype), as an array to fill and a tensor to hand out.
Take = Callable[[tuple[int, ...], type], tuple[np.ndarray, torch.Tensor]]


def fresh(shape: tuple[int, ...], dtype: type) -> tuple[np.ndarray, torch.Tensor]:
    """Memory for batches that are not made in a loader."""
    array = np.empty(shape, dtype)
    return array, torch.from_numpy(array)


@dataclass
class Document:
    """One sequence as a rollout or a test makes it, before packing.

    ids: int32[l], global ids, -1 at slot rows. key: u64 sample key (0 is reserved for padding).
    loss: float32[l], the weight of each token *as a target*; None scores every token but the first with weight 1.
    positions: int32[l] or None = 0..l-1. source: the number of the data source it came from. labels: int32[l], what the
    model is to predict *at* each row, where that is not the next token; loss then weighs the label of the row.
    slots: {name: [(first row, float32[K, dim])]}, the contents of slot rows. ValueError names the key where the lengths
    differ.
    """

    ids: np.ndarray
    key: int = 1
    loss: np.ndarray | None = None
    positions: np.ndarray | None = None
    source: int = 0
    labels: np.ndarray | None = None
    slots: Mapping[str, Sequence[tuple[int, np.ndarray]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("loss", "positions", "labels"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.ids):
                raise ValueError(f"document {self.key:#x}: {name} has {len(values)} entries for {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Slots:
    """Continuous rows of a batch (features, latents): data float32[N, dim] belongs to the batch rows index int32[N].

    Padding rows come last and have index T, a scratch row. cu: int32[F+2], the rows of each of at most F slot segments
    (a picture, a frame): after the real ones comes one padding segment, then empty ones, so cu[-1] == N. role: replace
    (the row's embedding), add (to it) or target (never seen by the input).
    """

    data: torch.Tensor
    index: torch.Tensor
    cu: torch.Tensor
    role: str = "replace"


@dataclass
class PackedBatch:
    """Documents laid end to end.

    ids int32[T] (-1 at slot rows and padding); labels int32[T], already shifted inside the document, -100 = ignored;
    weights float32[T] or None (all ones); positions int32[T]; cu_seqlens int32[S+1] with cu_seqlens[-1] == T: after
    the real documents comes one padding document (the tail), then empty ones up to the bucket's S; max_seqlen: an
    upper bound of the lengths, a host integer; kv_lo, kv_hi int32[T] or None: a query attends keys in [kv_lo, kv_hi),
    None = causal in the document; doc_keys int64[S] (the bits of u64 keys); slots by name.
    segments int32[M, 8] or None: first row, tokens, modality, role, t, h, w, document; -1 where there are fewer.
    rows_by_class int32 or None: the scored rows grouped by the vocabulary range of their label, range r at class_cu[r]:
    class_cu[r+1], each group filled up to whole blocks of 512 with T, as is the rest.
    kernel_tables: {argument of an op: int32 tensors}, work lists that the loader's `prepare` made on the host.
    Host only: lengths int64[documents] of the real documents; tokens, their sum; scored, the number of labels; counts
    {name: sum of label weights}: "next_token" over all labels and one entry per vocabulary range; sources int32[S] (-1
    for padding); class_cu int32[R+1], with rows_by_class.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    doc_keys: torch.Tensor
    weights: torch.Tensor | None = None
    kv_lo: torch.Tensor | None = None
    kv_hi: torch.Tensor | None = None
    slots: dict[str, Slots] = field(default_factory=dict)
    segments: torch.Tensor | None = None
    rows_by_class: torch.Tensor | None = None
    kernel_tables: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tokens: int = 0
    scored: int = 0
    counts: dict[str, float] = field(default_factory=dict)
    sources: np.ndarray | None = None
    class_cu: np.ndarray | None = None

    @staticmethod
    def build(
        documents: Sequence[Document],
        vocab: Vocabulary,
        *,
        pack_tokens: int | None = None,
        max_documents: int | None = None,
        weighted: bool = False,
        caps: tuple[int, int] | None = None,
        tables: Sequence[str] = (),
    ) -> PackedBatch:
        """Lay documents end to end and pad to `pack_tokens` tokens and `max_documents` sequences (None = just enough).

        ValueError where they do not fit, or naming the document that has an id outside the vocabulary. `weighted` keeps
        the weights tensor even where all are 1, so that all micro-batches of a run have the same form. caps: slot rows
        and slot segments of the batch. tables: "rows_by_class" or nothing.
        """
        lengths = np.array([len(d) for d in documents], dtype=np.int64)
        tokens = int(lengths.sum())
        T = tokens if pack_tokens is None else pack_tokens
        S = len(documents) + (tokens < T) if max_documents is None else max_documents
        if tokens > T or len(documents) + (tokens < T) > S:
            raise ValueError(
                f"{len(documents)} documents with {tokens} tokens do not fit a batch of {T} tokens and {S} sequences "
                "(the padding document takes one)"
            )
        bins = Bins(lengths, np.array([len(documents)]), T, S)
        bins.keys[0, : len(documents)] = [d.key for d in documents]
        bins.sources[0, : len(documents)] = [d.source for d in documents]
        bins.stored_labels[:] = [d.labels is not None for d in documents]
        if tokens:
            bins.flat_ids[:tokens] = _checked_ids(documents, bins.rows, vocab)
        for d, start in zip(documents, bins.rows.tolist()):
            own = slice(start, start + len(d))
            bins.flat_weights[own] = 1.0 if d.loss is None else d.loss
            if d.labels is not None:
                bins.flat_labels[own] = d.labels
        [batch] = bins.finish(vocab, weighted, tables)
        for d, start in zip(documents, bins.rows.tolist()):
            if d.positions is not None:
                batch.positions[start : start + len(d)] = torch.from_numpy(np.asarray(d.positions, dtype=np.int32))
        batch.slots = _document_slots(documents, bins.rows, T, caps)
        return batch

    @property
    def documents(self) -> int:
        """The number of real documents."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device` (asynchronously from pinned memory); host fields stay."""

        def moved(owner: Any) -> dict[str, torch.Tensor]:
            values = {f.name: getattr(owner, f.name) for f in fields(owner)}
            return {n: v.to(device, non_blocking=True) for n, v in values.items() if isinstance(v, torch.Tensor)}

        return replace(
            self,
            **moved(self),
            slots={name: replace(s, **moved(s)) for name, s in self.slots.items()},
            kernel_tables={
                name: tuple(t.to(device, non_blocking=True) for t in tables)
                for name, tables in self.kernel_tables.items()
            },
        )


class Bins:
    """A bins while they are filled: the caller writes ids, weights as targets, keys and sources, `finish` the rest.

    lengths: int64[D] of the documents in bin order; documents: int64[A], how many lie in each bin. rows: int64[D], the
    first flat row of each document; bin_of: int64[D]; place: int64[D], its number in the bin. flat_* are flat views.
    stored_labels: u8[D], 1 where the document's labels were written too, row by row (0 shifts the ids).
    """

    def __init__(
        self, lengths: np.ndarray, documents: np.ndarray, pack_tokens: int, max_documents: int, take: Take = fresh
    ) -> None:
        A, T, S = len(documents), pack_tokens, max_documents
        self.lengths, self.documents, self.T = lengths, documents.astype(np.int64), T
        self.first = np.concatenate([[0], np.cumsum(self.documents)])
        self.bin_of = np.repeat(np.arange(A), self.documents)
        self.place = np.arange(len(lengths)) - self.first[self.bin_of]
        self._take = take
        ids, self._ids = take((A, T), np.int32)
        labels, self._labels = take((A, T), np.int32)
        weights, self._weights = take((A, T), np.float32)
        self.flat_ids, self.flat_labels, self.flat_weights = ids.reshape(-1), labels.reshape(-1), weights.reshape(-1)
        self._positions_array, self._positions = take((A, T), np.int32)
        keys, self._keys = take((A, S), np.int64)
        self.keys = keys.view(np.uint64)
        self.keys[...] = PAD_KEY
        self.sources = np.full((A, S), -1, dtype=np.int32)
        self.stored_labels = np.zeros(len(lengths), dtype=np.uint8)
        self.cu, self._cu = take((A, S + 1), np.int32)
        self.rows, self.tokens = lay_documents(lengths, self.documents, self.cu, ids)

    def finish(self, vocab: Vocabulary, weighted: bool, tables: Sequence[str] = ()) -> list[PackedBatch]:
        """The batches; ValueError names the document that has an id or a label outside the vocabulary."""
        bad, counts, scored, odd = finish_bins(
            self.flat_ids,
            self.flat_weights,
            self.flat_labels,
            self._positions_array.reshape(-1),
            self.cu.reshape(-1),
            self.documents,
            self.stored_labels,
            vocab.bases,
            vocab.size,
        )
        if bad >= 0:
            raise ValueError(self._outside(bad, vocab))
        columns = {
            "ids": self._ids,
            "labels": self._labels,
            "positions": self._positions,
            "cu_seqlens": self._cu,
            "doc_keys": self._keys,
            "weights": self._weights,
        }
        class_cu = [None] * len(self.documents)
        if "rows_by_class" in tables:
            columns["rows_by_class"], class_cu = self._rows_by_class(vocab)
        longest = self.T - self.tokens  # the tail is a document, too
        np.maximum.at(longest, self.bin_of, self.lengths)
        first, names, sums = self.first.tolist(), ("next_token", *vocab.names), np.c_[counts.sum(axis=1), counts]
        batches = []
        each = zip(*(c.unbind() for c in columns.values()), strict=True)
        numbers = zip(longest.tolist(), self.tokens.tolist(), scored.tolist(), sums.tolist(), odd.tolist())
        for a, (tensors, (length, tokens, labels, found, uneven)) in enumerate(zip(each, numbers)):
            own = dict(zip(columns, tensors))
            if not (weighted or uneven):
                own["weights"] = None
            batches.append(
                PackedBatch(
                    **own,
                    max_seqlen=seqlen_bucket(length),
                    lengths=self.lengths[first[a] : first[a + 1]],
                    tokens=tokens,
                    scored=labels,
                    counts=dict(zip(names, found)),
                    sources=self.sources[a],
                    class_cu=class_cu[a],
                )
            )
        return batches

    def _rows_by_class(self, vocab: Vocabulary) -> tuple[torch.Tensor, np.ndarray]:
        A, ranges = len(self.documents), len(vocab.ranges)
        room = -(-(self.T + ranges * (CLASS_BLOCK - 1)) // CLASS_BLOCK) * CLASS_BLOCK
        rows, tensor = self._take((A, room), np.int32)
        cu = np.empty((A, ranges + 1), np.int32)
        rows_by_class(self.flat_labels, self.T, vocab.bases, rows.reshape(-1), cu.reshape(-1))
        return tensor, cu

    def _outside(self, document: int, vocab: Vocabulary) -> str:
        own = slice(self.rows[document], self.rows[document] + self.lengths[document])
        key = int(self.keys[self.bin_of[document], self.place[document]])
        ids, what = self.flat_ids[own], "id"
        if not ((ids >= vocab.size) | (ids < -1)).any():
            ids, what = self.flat_labels[own], "label"
        found = ids[np.argmax((ids >= vocab.size) | ((ids < -1) & (what == "id")))]
        return f"document {key:#x}: {what} {found} is outside the vocabulary 0..{vocab.size - 1}"


def slot_table(
    rows: np.ndarray,
    index: np.ndarray,
    counts: np.ndarray,
    pack_tokens: int,
    caps: tuple[int, int] | None = None,
    take: Take = fresh,
) -> Slots:
    """Slots of one batch. rows: float32[r, dim]; index: their batch rows; counts: rows of each slot segment.

    Padded to caps = (slot rows, slot segments), or to the next bucket of each.
    """
    r, frames = len(rows), len(counts)
    N, F = caps or (seqlen_bucket(r), seqlen_bucket(frames))
    if r > N or frames > F:
        raise ValueError(f"{r} slot rows in {frames} segments; a batch takes {N} rows in {F} segments")
    (data, data_tensor), (at, at_tensor) = take((N, rows.shape[1]), np.float32), take((N,), np.int32)
    cu, cu_tensor = take((F + 2,), np.int32)
    data[:r], data[r:] = rows, 0
    at[:r], at[r:] = index, pack_tokens
    cu[0], cu[frames + 1 :] = 0, N
    cu[1 : frames + 1] = np.cumsum(counts)
    return Slots(data_tensor, at_tensor, cu_tensor)


def seqlen_bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`: few distinct values, so few kernel shapes."""
    power = 1 << max(length - 1, 15).bit_length()
    return power * 3 // 4 if 16 < length <= power * 3 // 4 else power


def _checked_ids(documents: Sequence[Document], rows: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """All ids end to end, as wide as they come: a wider one must not wrap into the vocabulary unseen."""
    ids = np.concatenate([d.ids for d in documents])
    if ids.max() >= vocab.size or ids.min() < -1:
        at = int(np.argmax((ids >= vocab.size) | (ids < -1)))
        bad = documents[int(np.searchsorted(rows, at, side="right") - 1)]
        raise ValueError(f"document {bad.key:#x}: id {ids[at]} is outside the vocabulary 0..{vocab.size - 1}")
    return ids


def _document_slots(
    documents: Sequence[Document], rows: np.ndarray, pack_tokens: int, caps: tuple[int, int] | None
) -> dict[str, Slots]:
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for d, first in zip(documents, rows.tolist()):
        for name, parts in d.slots.items():
            found.setdefault(name, []).extend((first + at, part) for at, part in parts)
    return {
        name: slot_table(
            np.concatenate([part for _, part in parts]),
            np.concatenate([at + np.arange(len(part)) for at, part in parts]),
            np.array([len(part) for _, part in parts]),
            pack_tokens,
            caps,
        )
        for name, parts in found.items()
    }
