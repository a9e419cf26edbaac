"""An in-memory stand-in for `vtrain.data.Dataset`: the same methods over lists of samples, one Python loop each.

`documents` reads a composer's pieces token by token: the slow truth of what the loader assembles.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vtrain.batch import Document
from vtrain.data.compose import SLOT, STORED
from vtrain.data.format import SEGMENT_SPAN, Modality, Role, Schema
from vtrain.data.samples import unpack_runs
from vtrain.rng import fold
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=200, visual=64)
SPECIALS = {"<|t2i|>": 196, "<|soi|>": 197, "<|eoi|>": 198, "<|pad|>": 199}
SCHEMA = Schema(VOCAB, SPECIALS, text_tokenizer="text-sha", image_tokenizer="image-sha")


@dataclass
class StoredSample:
    """segments: (length, modality, role) laid end to end over `ids`; features: by twin, rows of each segment."""

    ids: list[int]
    key: int
    segments: list[tuple[int, Modality, Role]] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)


class MemoryDataset:
    def __init__(self, samples: list[StoredSample], name: str = "memory", schema: Schema = SCHEMA) -> None:
        self.samples, self.name, self.schema = samples, name, schema
        self.hash = f"hash of {name}"
        self.uuid64 = fold(0, name)
        self.wanted: list[int] = []
        self.left_out: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.array([len(self.samples[i].ids) for i in indices], dtype=np.int32)

    def keys(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self.samples[i].key for i in indices], dtype=np.uint64)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _joined([self.samples[i].ids for i in indices], np.int32)

    def read_spans(self, indices, starts, counts, out, at, stream: str = "ids") -> None:
        for i, start, count, row in zip(indices, starts, counts, at):
            tokens = getattr(self.samples[i], stream)
            assert 0 <= start <= start + count <= len(tokens), "a span outside its sample"
            assert 0 <= row <= row + count <= len(out), "a span outside the batch"
            out[row : row + count] = tokens[start : start + count]

    def features(self, name: str) -> MemoryFeatures:
        return MemoryFeatures(self.samples, name)

    def will_need(self, indices: np.ndarray) -> None:
        self.wanted += indices.tolist()

    def excluded(self, indices: np.ndarray) -> np.ndarray:
        return np.array([i in self.left_out for i in indices], dtype=bool)

    def loss_runs(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _joined([self.samples[i].runs for i in indices], np.uint32)

    def segments(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = [self._segments(self.samples[i]) for i in indices]
        return np.concatenate([np.zeros(0, SEGMENT_SPAN), *rows]), _cumulative(rows)

    @staticmethod
    def _segments(sample: StoredSample) -> np.ndarray:
        rows, start = np.zeros(len(sample.segments), SEGMENT_SPAN), 0
        for row, (length, modality, role) in zip(rows, sample.segments):
            row["start"], row["length"], row["modality"], row["role"] = start, length, modality, role
            start += length
        return rows


@dataclass
class MemoryFeatures:
    samples: list[StoredSample]
    name: str

    @property
    def dim(self) -> int:
        return next(part.shape[1] for s in self.samples for part in s.features.get(self.name, ()))

    def _parts(self, indices: np.ndarray) -> list[list[np.ndarray]]:
        none = np.zeros((0, self.dim), np.float32)
        samples = [self.samples[i] for i in indices]
        return [s.features.get(self.name, [none] * len(s.segments)) for s in samples]

    def counts(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = self._parts(indices)
        return np.array([len(rows) for sample in parts for rows in sample], dtype=np.int64), _cumulative(parts)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = [rows for sample in self._parts(indices) for rows in sample]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *rows]), _cumulative(rows)


def documents(composer, dataset: MemoryDataset, indices, epoch: int, cuts=None, source: int = 0) -> list[Document]:
    """The documents of a composer's pieces, token by token; cuts: (first row, rows) to keep of each."""
    pieces = composer.compose(dataset, np.asarray(indices, dtype=np.int64), epoch)
    made = []
    for i, index in enumerate(indices):
        rows = []  # (id, label, weight, feature row or None)
        for p in range(pieces.cu[i], pieces.cu[i + 1]):
            rows += _piece(pieces, p, dataset)
        start, count = cuts[i] if cuts is not None else (0, len(rows))
        rows = rows[start : start + count]
        ids, labels, weights = ([row[n] for row in rows] for n in range(3))
        slots, features = [], [(at, row[3]) for at, row in enumerate(rows) if row[3] is not None]
        for at, (segment, feature) in features:
            if slots and slots[-1][2] == segment and slots[-1][0] + len(slots[-1][1]) == at:
                slots[-1][1].append(feature)
            else:
                slots.append((at, [feature], segment))
        made.append(
            Document(
                np.array(ids, dtype=np.int32),
                key=dataset.samples[index].key,
                loss=np.array(weights, dtype=np.float32),
                source=source,
                labels=np.array(labels, dtype=np.int32) if pieces.labels else None,
                slots={pieces.features: [(at, np.array(part)) for at, part, _ in slots]} if slots else {},
            )
        )
    return made


def _piece(pieces, p: int, dataset: MemoryDataset) -> list[tuple]:
    token, weight = int(pieces.token[p]), float(pieces.weight[p])
    if token not in (STORED, SLOT):
        return [(token, 0, 0.0 if pieces.labels else weight, None)] * int(pieces.count[p])
    sample = dataset.samples[pieces.sample[p]]
    own = range(pieces.start[p], pieces.start[p] + pieces.count[p])
    if token == SLOT:
        parts = [((p, n), row) for n, part in enumerate(sample.features[pieces.features]) for row in part]
        return [(-1, 0, 0.0 if pieces.labels else weight, parts[i]) for i in own]
    weights = [weight] * len(sample.ids)
    if np.isnan(weight):
        lengths, classes = unpack_runs(np.array(sample.runs, dtype=np.uint32))
        table = dataset.schema.loss_weights
        weights = [table[c] for n, c in zip(lengths, classes) for _ in range(n)] or [1.0] * len(sample.ids)
    return [(sample.ids[i], sample.labels[i] if pieces.labels else 0, weights[i], None) for i in own]


def texts(lengths: list[int], name: str = "texts", schema: Schema = SCHEMA) -> MemoryDataset:
    """Samples of text ids of the given lengths; every id tells its sample (i % 190)."""
    return MemoryDataset([StoredSample([i % 190] * n, fold(7, name, i)) for i, n in enumerate(lengths)], name, schema)


def pictures(
    captions: list[list[int]], codes: int = 4, name: str = "pictures", schema: Schema = SCHEMA
) -> MemoryDataset:
    """One sample per list of caption lengths, with a picture of `codes` codes after its captions."""
    draw = np.random.default_rng(5)
    samples = []
    for i, lengths in enumerate(captions):
        ids = [int(x) for x in draw.integers(0, 190, sum(lengths))]
        ids += [VOCAB["visual"].base + int(x) for x in draw.integers(0, VOCAB["visual"].size, codes)]
        segments = [(n, Modality.TEXT, Role.INPUT) for n in lengths] + [(codes, Modality.IMAGE, Role.TARGET)]
        samples.append(StoredSample(ids, fold(11, name, i), segments))
    return MemoryDataset(samples, name, schema)


def _joined(rows: list[list[int]], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    return np.array([x for row in rows for x in row], dtype=dtype), _cumulative(rows)


def _cumulative(rows: list) -> np.ndarray:
    return np.cumsum([0, *map(len, rows)], dtype=np.int64)
