"""Reads token shards: memory-mapped, vectorised over index arrays, every number checked before it is used.

`Shard` is one file, `Dataset` the shards of a folder's manifest seen as one array of samples. n requested samples, in
any order and as often as one likes; `cu` arrays are int64[n+1] starting at 0: sample i of the answer is
flat[cu[i]:cu[i+1]]. Reading releases the GIL and may be done from many threads.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from vtrain._host import ShardTable, crc32c, map_file
from vtrain.data import manifest
from vtrain.data.container import read_schema
from vtrain.data.features import BlobColumn, FeatureColumn
from vtrain.data.format import PAGE, SEGMENT_SPAN, Footer, Schema, ShardInfo, read_pages

KEYS = {"KEY": np.dtype("<u8")}


def _integers(values: np.ndarray, name: str) -> np.ndarray:
    """int64[n] of any 1-d array of integers; IndexError otherwise."""
    found = np.atleast_1d(np.asarray(values))
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise IndexError(f"{name}: numbers are {found.dtype}[{found.ndim}-d]; expected a 1-d array of integers")
    return np.ascontiguousarray(found, dtype=np.int64)


class SampleReader:
    """What can be asked of a shard and of a dataset, by sample number. IndexError for samples that are not there."""

    path: Path
    schema: Schema

    _columns: dict[str, np.dtype]  # section id -> dtype of what is stored once per sample
    _table: ShardTable

    def _new_table(self, starts: list[int]) -> ShardTable:
        """starts: the first sample of each shard, and the end."""
        return ShardTable(str(self.path), starts, [(id, dtype.itemsize) for id, dtype in self._columns.items()])

    def _asked(self, indices: np.ndarray) -> np.ndarray:
        """int64[n] sample numbers that the table can answer."""
        return _integers(indices, str(self.path))

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """int32[n] tokens of each sample."""
        return self._table.lengths(self._asked(indices))

    def keys(self, indices: np.ndarray) -> np.ndarray:
        """u64[n] sample keys."""
        return self._column("KEY", indices)

    def column(self, name: str, indices: np.ndarray) -> np.ndarray:
        """[n] of a column of the schema, in its dtype."""
        if f"COL.{name}" not in self._columns:
            known = ", ".join(sorted(id.removeprefix("COL.") for id in self._columns.keys() - KEYS)) or "none"
            raise ValueError(f"{self.path}: no column {name!r}; expected one of: {known}")
        return self._column(f"COL.{name}", indices)

    def _column(self, id: str, indices: np.ndarray) -> np.ndarray:
        place = list(self._columns).index(id)
        return self._table.column(place, self._asked(indices)).view(self._columns[id])

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32[sum of lengths], cu): the tokens of the samples, laid end to end."""
        rows, cu = self._table.read(self._asked(indices), labels=False)
        return rows.view(np.int32), cu

    def labels(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(labels int32[sum of lengths], cu): what the model is to predict at each token, not to be shifted again."""
        rows, cu = self._table.read(self._asked(indices), labels=self._stream("labels"))
        return rows.view(np.int32), cu

    def read_spans(
        self,
        indices: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        out: np.ndarray,
        at: np.ndarray,
        stream: Literal["ids", "labels"] = "ids",
    ) -> None:
        """Put tokens starts[j]..starts[j]+counts[j] of sample indices[j] at out[at[j]:], int32 and contiguous."""
        name = str(self.path)
        starts, counts, at = (_integers(values, name) for values in (starts, counts, at))
        self._table.read_spans(self._asked(indices), starts, counts, out, at, labels=self._stream(stream))

    def _stream(self, name: str) -> bool:
        """Whether it is the labels that are asked for."""
        if name not in ("ids", "labels"):
            raise ValueError(f"{self.path}: stream {name!r}; expected ids or labels")
        if name == "labels" and not self.schema.labels:
            raise ValueError(f"{self.path}: its schema stores no labels: they are the ids that follow")
        return name == "labels"

    def segments(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(segments format.SEGMENT_SPAN[m], cu): `start` counts in the sample, `length` is the number of tokens."""
        rows, cu = self._table.segments(self._asked(indices))
        return rows.view(SEGMENT_SPAN), cu

    def loss_runs(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(runs u32[r], cu) as stored (samples.unpack_runs); a sample without runs has weight 1 everywhere."""
        rows, cu = self._table.loss_runs(self._asked(indices))
        return rows.view(np.uint32), cu

    def will_need(self, indices: np.ndarray) -> None:
        """Have the kernel read ahead what reading these samples will touch; returns once that is under way."""
        self._table.will_need(self._asked(indices))


class Shard(SampleReader):
    """One `*.vts` file. Opening checks both pages and the section table, and maps the file without keeping it open.

    pages: what `read_pages` has found already.
    """

    def __init__(self, path: Path | str, pages: tuple[Footer, int] | None = None):
        self.path = Path(path)
        self.footer, self.block = pages or read_pages(self.path)
        self.data = map_file(str(self.path), self.footer.file_bytes)

    @cached_property
    def _columns(self) -> dict[str, np.dtype]:
        columns = {s.id: s.dtype for s in self.footer.sections.values() if s.id.startswith("COL.") and s.dtype}
        return {**KEYS, **columns}

    @cached_property
    def _table(self) -> ShardTable:
        table = self._new_table([0, self.footer.samples])
        self.attach_to(table, 0)
        return table

    def attach_to(self, table: ShardTable, number: int) -> None:
        """Make it shard `number` of a table; ShardError if a section that readers use is not what it must be."""
        known = [s for s in self.footer.sections.values() if s.dtype is not None]
        sections = [(s.id, s.offset, s.bytes, s.dtype.itemsize) for s in known]
        table.attach(number, str(self.path), self.data, sections, self.footer.max_id)

    def __reduce__(self) -> tuple:
        return Shard, (self.path,)

    def __len__(self) -> int:
        return self.footer.samples

    @property
    def tokens(self) -> int:
        return self.footer.tokens

    @cached_property
    def schema(self) -> Schema:
        return read_schema(self.data, self.footer, str(self.path))


class Dataset(SampleReader):
    """The samples of all shards of a dataset's manifest, numbered in its order.

    Open a folder (its latest generation) or one manifest file. path: the folder; hash: the manifest's; uuid64: the
    identity that all generations share. Opening compares the footer page of every shard with the manifest (10 us); the
    rest of its pages is checked, and the file mapped, when it is first asked (50 us).
    """

    def __init__(self, path: Path | str):
        self.manifest = manifest.load(path)
        self.path = self.manifest.folder
        self.schema = self.manifest.schema
        for info in self.manifest.shards:
            if not _is_listed(f"{self.path}/{info.file}", info):
                manifest.check_listed(self.path / info.file, info, self.schema)  # tells what is wrong
        columns = {f"COL.{name}": np.dtype(dtype) for name, dtype in self.schema.columns.items()}
        self._columns = {**KEYS, **columns}
        self._table = self._new_table(self.manifest.starts.tolist())
        self._shards: dict[int, Shard] = {}
        self._twins: dict[tuple[str, str], FeatureColumn | BlobColumn] = {}

    def __reduce__(self) -> tuple:
        """Pickled as the manifest that is open: a worker process of another loader opens the same generation."""
        return Dataset, (self.manifest.path,)

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def hash(self) -> str:
        return self.manifest.hash

    @property
    def uuid64(self) -> int:
        return self.manifest.dataset

    def shard(self, number: int) -> Shard:
        """The shard at a place of the manifest. Two threads may both open it, and one of the two stays: a lock could be
        held for ever in a process that is forked meanwhile."""
        if number not in self._shards:
            info = self.manifest.shards[number]
            path = self.path / info.file
            shard = Shard(path, manifest.check_listed(path, info, self.schema))
            shard.attach_to(self._table, number)
            self._shards.setdefault(number, shard)
        return self._shards[number]

    @property
    def shards(self) -> list[Shard]:
        return [self.shard(number) for number in range(len(self.manifest.shards))]

    def _asked(self, indices: np.ndarray) -> np.ndarray:
        found = super()._asked(indices)
        for number in self._table.missing(found):
            self.shard(number)
        return found

    def excluded(self, indices: np.ndarray) -> np.ndarray:
        """bool[n]: whether the manifest takes the sample out. Its number stays, and it can still be read."""
        edges = self.manifest.excluded.ravel()  # [first, last) pairs that rise: inside = past an odd number of edges
        return np.searchsorted(edges, _integers(indices, str(self.path)), side="right") % 2 == 1

    def segment_numbers(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(int64[m], cu): by which twins know the segments: number of the shard * 2**32 + number in the shard."""
        return self._table.segment_numbers(self._asked(indices))

    def features(self, name: str) -> FeatureColumn:
        """The rows that the twins called `name` hold for the segments."""
        return self._twins.setdefault(("features", name), FeatureColumn(self, name))

    def blobs(self, name: str) -> BlobColumn:
        """The bytes that the twins called `name` hold for the segments."""
        return self._twins.setdefault(("blobs", name), BlobColumn(self, name))


def _is_listed(path: str, info: ShardInfo) -> bool:
    """Whether the footer of the file at `path` is the one that the manifest lists: its size, its crc, its bytes."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        page = os.pread(file, PAGE, max(0, info.bytes - PAGE))
        same_size = os.fstat(file).st_size == info.bytes
    finally:
        os.close(file)
    stored = int.from_bytes(page[-4:], "little")
    return same_size and len(page) == PAGE and stored == info.footer_crc == crc32c(memoryview(page)[:-4])
