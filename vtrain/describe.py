"""A packed batch as the model sees it, in text: documents, and piece by piece id, text, label, weight, position."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from vtrain.batch import IGNORE, PackedBatch
from vtrain.data.reader import Dataset
from vtrain.text import load_text_tokenizer
from vtrain.vocab import Vocabulary

_ENDS = 4  # rows that are shown at either end of a stretch of codes, which may be 4,096 long


def describe_batch(batch: PackedBatch, dataset: Dataset, source_names: Sequence[str], documents: int = 4) -> str:
    """The batch's counts, a line per document, and every piece of the first `documents` documents.

    Text ids are decoded with the dataset's own tokenizer where it has one; other ranges show as `range[code]`. Of a
    stretch of codes that are alike in all but their ids the two ends are shown.
    """
    tokens, capacity = batch.tokens, batch.ids.numel()
    lines = [
        f"packed batch: {batch.documents} documents, {tokens} tokens of {capacity} "
        f"({100 * (1 - tokens / capacity):.1f}% padding), max_seqlen {batch.max_seqlen}, "
        f"cu_seqlens [{batch.cu_seqlens.numel()}], {'weighted' if batch.weights is not None else 'all weights 1'}",
        "scored: " + ", ".join(f"{name} {count:g}" for name, count in batch.counts.items()),
    ]
    name_of = _piece_names(dataset)
    bounds = batch.cu_seqlens.tolist()
    for n in range(batch.documents):
        start, stop = bounds[n], bounds[n + 1]
        key = batch.doc_keys[n].item() & (2**64 - 1)
        source = source_names[batch.sources[n]]
        rows = f"rows {start}..{stop - 1}" if stop > start else "no rows"
        lines.append(f"document {n}: {rows}, key {key:#018x}, source {source}")
        if n < documents and stop > start:
            lines += _rows(batch, start, stop, name_of, dataset.schema.vocab)
    return "\n".join(lines)


def _rows(batch: PackedBatch, start: int, stop: int, name_of, vocab: Vocabulary) -> list[str]:
    ids, labels, positions = (t[start:stop].tolist() for t in (batch.ids, batch.labels, batch.positions))
    weights = [1.0] * len(ids) if batch.weights is None else batch.weights[start:stop].tolist()
    lines = [f"  {'position':>8} {'id':>7}  {'piece':<18} {'label':>7}  {'predicts':<18} weight"]

    def likeness(n: int) -> tuple:
        name = "slots" if ids[n] < 0 else vocab.ranges[vocab.index_of(ids[n])].name
        return (name, n) if name == "text" else (name, positions[n] - n, weights[n], labels[n] == IGNORE)

    for (name, *_), alike in groupby(range(len(ids)), likeness):
        rows = [_row(positions[n], ids[n], labels[n], weights[n], name_of) for n in alike]
        if len(rows) > 2 * _ENDS + 1:
            rows[_ENDS:-_ENDS] = [f"  {'...':>8} {len(rows) - 2 * _ENDS} more rows of {name}"]
        lines += rows
    return lines


def _row(position: int, token: int, label: int, weight: float, name_of) -> str:
    if label == IGNORE:
        target, shown, weight_text = "-", "(not scored)", "-"
    else:
        target, shown, weight_text = str(label), name_of(label), f"{weight:g}"
    return f"  {position:>8} {token:>7}  {name_of(token):<18} {target:>7}  {shown:<18} {weight_text}"


def _piece_names(dataset: Dataset):
    folder = dataset.path / "text_tokenizer"
    specials = {number: name for name, number in dataset.schema.specials.items()}
    tokenizer = load_text_tokenizer(folder, specials=tuple(dataset.schema.specials)) if folder.is_dir() else None
    vocab: Vocabulary = dataset.schema.vocab

    def name_of(token: int) -> str:
        if token < 0:
            return "(slot)"
        r = vocab.ranges[vocab.index_of(token)]
        if token in specials:
            return specials[token]
        if r.name == "text" and tokenizer is not None:
            return repr(tokenizer.decode([token]))
        return f"{r.name}[{token - r.base}]"

    return name_of
