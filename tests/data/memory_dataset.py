"""An in-memory stand-in for `vtrain.data.Dataset`: the same methods over lists of samples, one Python loop each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vtrain.data.format import SEGMENT_SPAN, Modality, Role, Schema
from vtrain.rng import fold
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=200, visual=64)
SPECIALS = {"<|t2i|>": 196, "<|soi|>": 197, "<|eoi|>": 198, "<|pad|>": 199}
SCHEMA = Schema(VOCAB, SPECIALS, text_tokenizer="text-sha", image_tokenizer="image-sha")


@dataclass
class StoredSample:
    """segments: (length, modality, role) laid end to end over `ids`."""

    ids: list[int]
    key: int
    segments: list[tuple[int, Modality, Role]] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)


class MemoryDataset:
    def __init__(self, samples: list[StoredSample], name: str = "memory", schema: Schema = SCHEMA) -> None:
        self.samples, self.name, self.schema = samples, name, schema
        self.hash = f"hash of {name}"
        self.uuid64 = fold(0, name)

    def __len__(self) -> int:
        return len(self.samples)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.array([len(self.samples[i].ids) for i in indices], dtype=np.int32)

    def keys(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self.samples[i].key for i in indices], dtype=np.uint64)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _joined([self.samples[i].ids for i in indices], np.int32)

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
