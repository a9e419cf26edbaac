"""PackedBatch: the one thing that data hands to models. Fixed shapes; what can be counted is counted on the host.

Legend: T tokens of the batch (padded), S sequences including the padding document and empty ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from vtrain.vocab import Vocabulary

IGNORE = -100  # a label that is not scored
PAD_KEY = 0  # document key of padding and empty documents


@dataclass
class Document:
    """One sequence as a composer or a rollout makes it, before packing.

    ids: int32[l], global ids, -1 at slot rows. key: u64 sample key (0 is reserved for padding).
    loss: float32[l], the weight of each token *as a target*; None scores every token but the first with weight 1.
    positions: int32[l] or None = 0..l-1. source: the number of the data source it came from. ValueError names the key
    where the lengths differ.
    """

    ids: np.ndarray
    key: int = 1
    loss: np.ndarray | None = None
    positions: np.ndarray | None = None
    source: int = 0

    def __post_init__(self) -> None:
        for name in ("loss", "positions"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.ids):
                raise ValueError(f"document {self.key:#x}: {name} has {len(values)} entries for {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class PackedBatch:
    """Documents laid end to end.

    ids int32[T] (-1 at slot rows and padding); labels int32[T], already shifted inside the document, -100 = ignored;
    weights float32[T] or None (all ones); positions int32[T]; cu_seqlens int32[S+1] with cu_seqlens[-1] == T: after
    the real documents comes one padding document (the tail), then empty ones up to the bucket's S; max_seqlen: an
    upper bound of the lengths, a host integer; kv_lo, kv_hi int32[T] or None: a query attends keys in [kv_lo, kv_hi),
    None = causal in the document; doc_keys int64[S] (the bits of u64 keys).
    Host only: lengths int64[documents] of the real documents; tokens, their sum; scored, the number of labels; counts
    {name: sum of label weights}: "next_token" over all labels and one entry per vocabulary range; sources int32[S] (-1
    for padding).
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
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tokens: int = 0
    scored: int = 0
    counts: dict[str, float] = field(default_factory=dict)
    sources: np.ndarray | None = None

    @staticmethod
    def build(
        documents: Sequence[Document],
        vocab: Vocabulary,
        *,
        pack_tokens: int | None = None,
        max_documents: int | None = None,
        weighted: bool = False,
    ) -> PackedBatch:
        """Lay documents end to end and pad to `pack_tokens` tokens and `max_documents` sequences (None = just enough).

        ValueError where they do not fit, or naming the document that has an id outside the vocabulary. `weighted` keeps
        the weights tensor even where all are 1, so that all micro-batches of a run have the same form.
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
        cu = np.full(S + 1, T, dtype=np.int32)
        cu[0] = 0
        cu[1 : len(documents) + 1] = np.cumsum(lengths)
        ids = np.full(T, -1, dtype=np.int32)
        if tokens:
            ids[:tokens] = _checked_ids(documents, cu, vocab)
        positions = np.zeros(T, dtype=np.int32)
        target = np.zeros(T, dtype=np.float32)  # weight of each token as a target
        for d, start, stop in zip(documents, cu[: len(documents)], cu[1:]):
            positions[start:stop] = np.arange(stop - start) if d.positions is None else d.positions
            target[start:stop] = 1.0 if d.loss is None else d.loss
        target[cu[: len(documents)][lengths > 0]] = 0.0  # nothing predicts the first token
        target[ids < 0] = 0.0
        positions[tokens:] = np.arange(T - tokens)
        labels = np.full(T, IGNORE, dtype=np.int32)
        weights = np.zeros(T, dtype=np.float32)
        labels[:-1] = np.where(target[1:] > 0, ids[1:], IGNORE)
        weights[:-1] = target[1:]
        counts = _label_counts(labels, weights, vocab)
        keys = np.zeros(S, dtype=np.uint64)
        keys[: len(documents)] = [d.key for d in documents]
        sources = np.full(S, -1, dtype=np.int32)
        sources[: len(documents)] = [d.source for d in documents]
        longest = max(int(lengths.max(initial=0)), T - tokens, 1)
        keep_weights = weighted or bool(np.any((weights != 1.0) & (labels >= 0)))
        return PackedBatch(
            ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(cu),
            max_seqlen=seqlen_bucket(longest),
            doc_keys=torch.from_numpy(keys.view(np.int64)),
            weights=torch.from_numpy(weights) if keep_weights else None,
            lengths=lengths,
            tokens=tokens,
            scored=int((labels >= 0).sum()),
            counts=counts,
            sources=sources,
        )

    @property
    def documents(self) -> int:
        """The number of real documents."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device` (asynchronously from pinned memory); host fields stay."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        pinned = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **pinned)


def seqlen_bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`: few distinct values, so few kernel shapes."""
    bucket = 16
    while bucket < length:
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def _checked_ids(documents: Sequence[Document], cu: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """All ids end to end, as wide as they come: a wider one must not wrap into the vocabulary unseen."""
    ids = np.concatenate([d.ids for d in documents])
    if ids.max() >= vocab.size or ids.min() < -1:
        at = int(np.argmax((ids >= vocab.size) | (ids < -1)))
        bad = documents[int(np.searchsorted(cu, at, side="right") - 1)]
        raise ValueError(f"document {bad.key:#x}: id {ids[at]} is outside the vocabulary 0..{vocab.size - 1}")
    return ids


def _label_counts(labels: np.ndarray, weights: np.ndarray, vocab: Vocabulary) -> dict[str, float]:
    scored = labels >= 0
    by_range = np.bincount(
        vocab.classify(labels[scored]), weights=weights[scored].astype(np.float64), minlength=len(vocab.ranges)
    )
    return {"next_token": float(by_range.sum()), **{n: float(c) for n, c in zip(vocab.names, by_range)}}
