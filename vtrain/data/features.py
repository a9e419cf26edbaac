"""Feature rows and blobs that twins (twins.py) hold for the segments of a dataset: one column over all its shards.

n requested samples with m segments in all, in the order of `Dataset.segments`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from vtrain.data.format import ShardError
from vtrain.data.samples import cumulative
from vtrain.data.twins import Twin

if TYPE_CHECKING:
    from vtrain.data.reader import Dataset


class _TwinColumn:
    """The twins of one name over all shards of a dataset. A file is opened when it is first asked."""

    kind: str

    def __init__(self, dataset: Dataset, name: str):
        listed = dataset.manifest.twins.get(name)
        if listed is None or listed["kind"] != self.kind:
            known = ", ".join(f"{n} ({t['kind']})" for n, t in sorted(dataset.manifest.twins.items())) or "none"
            raise ValueError(f"{dataset.path}: no {self.kind} {name!r}; expected one of its twins: {known}")
        self.dataset = dataset
        self.name = name
        self.listed = listed
        self._twins: dict[int, Twin] = {}

    def _twin(self, number: int) -> Twin:
        """The twin of a shard. Two threads may both open it: the same file, and the last one stays."""
        if number not in self._twins:
            listed, info = self.listed["files"][number], self.dataset.manifest.shards[number]
            if listed is None:
                raise ShardError(f"{self.dataset.path}: twin {self.name}: shard {info.file} has none")
            twin = Twin(self.dataset.path / listed["file"])
            if asdict(twin.info) != listed or twin.info.uuid != info.uuid:
                raise ShardError(f"{twin.path}: footer: {twin.info}; the manifest expects {listed} beside {info.file}")
            facts = {key: getattr(twin.meta, key) for key in ("kind", "dim", "dtype")}
            if any(self.listed[key] != value for key, value in facts.items()):
                raise ShardError(f"{twin.path}: META: {facts}; the manifest lists {self.listed['kind']} of "
                                 f"{self.listed['dim']} {self.listed['dtype']}")  # fmt: skip
            self._twins[number] = twin
        return self._twins[number]

    def _groups(self, numbers: np.ndarray) -> list[tuple[Twin, np.ndarray, np.ndarray]]:
        """[(twin, places in the answer, segments of its shard)], one entry per shard that is asked."""
        shards = numbers >> 32
        order = np.argsort(shards, kind="stable")
        asked, first = np.unique(shards[order], return_index=True)
        places = np.split(order, first[1:]) if len(asked) else []
        return [(self._twin(s), at, numbers[at] & 0xFFFFFFFF) for s, at in zip(asked.tolist(), places)]

    def counts(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(int64[m] rows, or bytes, of each segment of the samples; cu of segments per sample)."""
        numbers, cu = self.dataset.segment_numbers(indices)
        counts = np.zeros(len(numbers), dtype=np.int64)
        for twin, places, segments in self._groups(numbers):
            counts[places] = twin.counts(segments)
        return counts, cu


class FeatureColumn(_TwinColumn):
    """Rows of floats: dim of them each."""

    kind = "features"

    @property
    def dim(self) -> int:
        return self.listed["dim"]

    def read(self, indices: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(float32[R, dim] rows of all segments of the samples end to end, cu of rows per segment).

        out: float32[at least R, dim] to fill; its first R rows are returned.
        """
        numbers, _ = self.dataset.segment_numbers(indices)
        groups = self._groups(numbers)
        counts = np.zeros(len(numbers), dtype=np.int64)
        for twin, places, segments in groups:
            counts[places] = twin.counts(segments)
        cu = cumulative(counts)
        rows = self._room(out, int(cu[-1]))
        for twin, places, segments in groups:
            twin.read_rows(segments, rows, cu[places])
        return rows, cu

    def _room(self, out: np.ndarray | None, count: int) -> np.ndarray:
        if out is None:
            return np.empty((count, self.dim), dtype=np.float32)
        if out.dtype != np.float32 or out.ndim != 2 or out.shape[1] != self.dim or len(out) < count:
            raise ValueError(
                f"{self.dataset.path}: twin {self.name}: out is {out.dtype}{list(out.shape)}; "
                f"expected float32[>= {count}, {self.dim}]"
            )
        return out[:count]


class BlobColumn(_TwinColumn):
    """Bytes, for instance of pictures."""

    kind = "blobs"

    def read(self, indices: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """(bytes of every segment of the samples, cu of segments per sample)."""
        numbers, cu = self.dataset.segment_numbers(indices)
        found: list[bytes] = [b""] * len(numbers)
        for twin, places, segments in self._groups(numbers):
            for place, content in zip(places.tolist(), twin.blobs(segments)):
                found[place] = content
        return found, cu
