"""Twins of a shard: rows of features or blobs of bytes of its segments, in a file `<shard>.<name>.vtf` beside it.

A twin has the pages and checksums of a shard (format.py) and the uuid of its own. Segments are numbered as they are
stored in the shard, 0..M-1. dtype of feature rows: f4, f2, bf16, or i1 with a float32 scale per row.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vtrain._host import gather_rows, length_histogram, map_file
from vtrain.data.container import ContainerWriter, view
from vtrain.data.format import DTYPES, Footer, Kind, ShardError, canonical_json, read_pages
from vtrain.data.samples import cumulative
from vtrain.data.schema import check_name

# How a row is stored, by the name that META and manifests give it.
ROW_DTYPES = {"f4": DTYPES[7], "f2": DTYPES[9], "bf16": DTYPES[2], "i1": DTYPES[10]}
MAX_COUNT = 2**32 - 1  # rows or bytes of one segment: the footer's extremes are u32


@dataclass(frozen=True)
class TwinMeta:
    """What a twin is. kind: features or blobs; dim and dtype of its rows (0 and "" of blobs); producer: what made it,
    for instance a hash of the tower."""

    name: str
    kind: str
    dim: int
    dtype: str
    producer: str


@dataclass(frozen=True)
class TwinInfo:
    """A finished twin as manifests list it. uuid: hex, the shard's; rows: bytes of blobs; bytes: size of the file."""

    file: str
    uuid: str
    segments: int
    rows: int
    bytes: int
    footer_crc: int

    @classmethod
    def of(cls, file: str, footer: Footer) -> TwinInfo:
        return cls(file, footer.uuid.hex(), footer.samples, footer.tokens, footer.file_bytes, footer.crc)


def twin_path(shard: Path | str, name: str) -> Path:
    """Where the twin `name` of a shard lies."""
    shard = Path(shard)
    return shard.with_name(f"{shard.stem}.{check_name(name, 'twin')}.vtf")


def twin_info(path: Path | str) -> TwinInfo:
    """What a manifest lists, read from a finished twin."""
    return TwinInfo.of(Path(path).name, read_pages(path, Kind.FEATURES, Kind.BLOBS)[0])


class _TwinWriter:
    """Streams the items of the segments in order; all segments of the shard must have been given at the end."""

    kind: Kind
    section: str

    def __init__(self, path: Path | str, shard: object, name: str, meta: TwinMeta, item: np.dtype):
        path, owner = Path(path), Path(getattr(shard, "path", shard))
        if path.name != twin_path(owner, name).name:
            raise ValueError(f"{path}: name: expected {twin_path(owner, name).name}, the twin {name} of {owner.name}")
        footer, _ = read_pages(owner)
        self.meta = meta
        self.segments = footer.sections["SEG"].count
        self.info: TwinInfo | None = None
        self._owner = owner
        self._counts: list[np.ndarray] = []
        self._given = 0
        self._out = ContainerWriter(path, footer.uuid, self.kind, f"{footer.uuid.hex()}.{name}")
        self._out.start(self.section, item)

    def _count(self, counts: np.ndarray, items: int) -> np.ndarray:
        """int64[m], checked: what the next m segments get of `items` items."""
        found = np.asarray(counts)
        if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise ValueError(f"{self._out.path}: counts are {found.dtype}[{found.ndim}-d]; expected integers[m]")
        found = found.astype(np.int64)
        if len(found) and (found.min() < 0 or found.max() > MAX_COUNT):
            raise ValueError(f"{self._out.path}: counts {found.min()}..{found.max()}; expected 0..{MAX_COUNT}")
        if found.sum() != items:
            raise ValueError(f"{self._out.path}: counts of {found.sum()} in all; expected {items}, what is given")
        if self._given + len(found) > self.segments:
            raise ShardError(
                f"{self._out.path}: {self._given + len(found)} segments; expected {self.segments} as {self._owner.name}"
            )
        return found

    def _note(self, counts: np.ndarray) -> None:
        self._counts.append(counts)
        self._given += len(counts)

    def close(self) -> TwinInfo:
        """Write the other sections and the footer, make the file durable, give it its name. Idempotent."""
        if self.info is not None:
            return self.info
        if not self._out.open:
            raise ValueError(f"{self._out.path}: the twin was abandoned after an error")
        try:
            if self._given != self.segments:
                raise ShardError(
                    f"{self._out.path}: {self._given} segments; expected {self.segments} as {self._owner.name}"
                )
            self.info = self._finish()
        except BaseException:
            self.abort()
            raise
        return self.info

    def _finish(self) -> TwinInfo:
        counts = np.concatenate([np.zeros(0, dtype=np.int64), *self._counts])
        offsets = cumulative(counts)
        meta = canonical_json(asdict(self.meta))
        self._out.section("ROWO", offsets.astype("<u8"))
        self._more()
        self._out.section("META", np.frombuffer(meta, dtype=np.uint8))
        footer = self._out.finish(
            samples=self.segments,
            tokens=int(offsets[-1]),
            min_id=0,
            max_id=0,
            min_length=int(counts.min()) if len(counts) else 0,
            max_length=int(counts.max()) if len(counts) else 0,
            schema_hash=hashlib.sha256(meta).hexdigest(),
            histogram=length_histogram(counts),
        )
        return TwinInfo.of(self._out.path.name, footer)

    def _more(self) -> None:
        """The sections of the kind between ROWO and META."""

    def abort(self) -> None:
        """Drop the unfinished twin and its temporary file."""
        self._out.abort()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class FeatureWriter(_TwinWriter):
    """`with FeatureWriter(path, shard, name, dim=.., dtype=.., producer=..) as w: w.append(rows, counts)`.

    shard: the Shard or its path. dtype: a key of ROW_DTYPES. After `close` (or the end of `with`) `info` is the
    TwinInfo.
    """

    kind = Kind.FEATURES
    section = "ROW"

    def __init__(self, path: Path | str, shard: object, name: str, *, dim: int, dtype: str, producer: str):
        if dim < 1 or dtype not in ROW_DTYPES:
            raise ValueError(f"{path}: rows of {dim} {dtype!r}; expected at least 1 of {', '.join(ROW_DTYPES)}")
        meta = TwinMeta(name, self.kind.name.lower(), int(dim), dtype, producer)
        self._scales: list[np.ndarray] = []
        super().__init__(path, shard, name, meta, ROW_DTYPES[dtype])

    def append(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Rows of the next m segments. rows: float32[R, dim], end to end; counts: integers[m], R in all."""
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != self.meta.dim or rows.dtype.kind != "f":
            raise ValueError(
                f"{self._out.path}: rows are {rows.dtype}{list(rows.shape)}; expected float32[R, {self.meta.dim}]"
            )
        counts = self._count(counts, len(rows))
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        self._check_held(np.isfinite(rows), counts)
        stored, scales = encode_rows(rows, self.meta.dtype)
        self._check_held(_is_finite(stored, self.meta.dtype), counts)
        self._out.extend(stored.reshape(-1))
        if scales is not None:
            self._scales.append(scales)
        self._note(counts)

    def _check_held(self, finite: np.ndarray, counts: np.ndarray) -> None:
        if not finite.all():
            row = np.argmin(finite.all(axis=1))
            segment = self._given + int(np.searchsorted(counts.cumsum(), row, side="right"))
            raise ValueError(
                f"{self._out.path}: segment {segment}: a row of numbers that {self.meta.dtype} cannot hold; "
                f"expected finite ones"
            )

    def _more(self) -> None:
        if self.meta.dtype == "i1":
            self._out.section("SCALE", np.concatenate([np.zeros(0, dtype="<f4"), *self._scales]))


class BlobWriter(_TwinWriter):
    """`with BlobWriter(path, shard, name, producer=..) as w: w.append(data, sizes)`; else as FeatureWriter."""

    kind = Kind.BLOBS
    section = "BYTES"

    def __init__(self, path: Path | str, shard: object, name: str, *, producer: str):
        super().__init__(path, shard, name, TwinMeta(name, self.kind.name.lower(), 0, "", producer), DTYPES[1])

    def append(self, data: bytes, sizes: np.ndarray) -> None:
        """Bytes of the next m segments. data: end to end; sizes: integers[m]."""
        content = np.frombuffer(data, dtype=np.uint8)
        sizes = self._count(sizes, len(content))
        self._out.extend(content)
        self._note(sizes)


def encode_rows(rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(rows as stored, f4[R] scales of i1) of finite float32[R, dim]; rounded to the nearest, ties to even.

    Too large ones become infinite, in i1 none is.
    """
    if dtype == "bf16":
        bits = rows.view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2"), None
    if dtype == "i1":
        scales = (np.abs(rows).max(axis=1) / 127).astype("<f4")
        steps = rows / np.where(scales > 0, scales, 1)[:, None]
        return np.rint(steps).clip(-127, 127).astype("i1"), scales  # a scale below 1e-38 is not exact: more than 127
    with np.errstate(over="ignore"):
        return rows.astype(ROW_DTYPES[dtype]), None


def _is_finite(stored: np.ndarray, dtype: str) -> np.ndarray:
    """bool[R, dim]: whether stored numbers are finite; those of bf16 are the upper halves of f4."""
    return (stored & 0x7F80) != 0x7F80 if dtype == "bf16" else np.isfinite(stored)


class Twin:
    """One `*.vtf` file. Opening checks its pages and META and maps it without keeping it open.

    segments: integers[m], numbers of segments in the shard; IndexError for those that are not there.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.footer, self.block = read_pages(self.path, Kind.FEATURES, Kind.BLOBS)
        self.data = map_file(str(self.path), self.footer.file_bytes)
        self.meta = read_meta(self.data, self.footer, str(self.path))
        self._offsets = self._items("ROWO")

    def __len__(self) -> int:
        return self.footer.samples

    @property
    def info(self) -> TwinInfo:
        return TwinInfo.of(self.path.name, self.footer)

    def _items(self, section: str) -> np.ndarray:
        return view(self.data, self.footer.sections[section])

    def _bounds(self, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(starts int64[m], counts int64[m]), checked."""
        asked = np.atleast_1d(np.asarray(segments))
        if asked.ndim != 1 or (asked.size and asked.dtype.kind not in "iu"):
            raise IndexError(f"{self.path}: segments are {asked.dtype}[{asked.ndim}-d]; expected integers[m]")
        if asked.size and (asked.min() < 0 or asked.max() >= len(self)):
            raise IndexError(f"{self.path}: segment {asked.min()}..{asked.max()} asked for; it has {len(self)}")
        asked = asked.astype(np.int64)
        starts, stops = self._offsets[asked], self._offsets[asked + 1]
        bad = (stops < starts) | (stops > self.footer.tokens)
        if bad.any():
            at = int(np.argmax(bad))
            raise ShardError(
                f"{self.path}: ROWO: segment {asked[at]} spans {starts[at]}..{stops[at]}; "
                f"expected a rising span within {self.footer.tokens}"
            )
        return starts.astype(np.int64), (stops - starts).astype(np.int64)

    def _expect(self, kind: Kind) -> None:
        if self.footer.kind != kind:
            raise ValueError(f"{self.path}: a twin of {self.meta.kind}; expected {kind.name.lower()}")

    def counts(self, segments: np.ndarray) -> np.ndarray:
        """int64[m]: rows, or bytes, of each segment."""
        return self._bounds(segments)[1]

    def rows(self, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32[R, dim], cu int64[m+1]): the rows of the segments, end to end."""
        self._expect(Kind.FEATURES)
        cu = cumulative(self.counts(segments))
        out = np.empty((cu[-1], self.meta.dim), dtype=np.float32)
        self.read_rows(segments, out, cu[:-1])
        return out, cu

    def read_rows(self, segments: np.ndarray, out: np.ndarray, at: np.ndarray) -> None:
        """Put the rows of segments[i] at out[at[i]:]. out: float32[any, dim], contiguous; at: int64[m]."""
        self._expect(Kind.FEATURES)
        if out.shape[1:] != (self.meta.dim,):
            raise ValueError(f"{self.path}: rows into {list(out.shape)}; expected [any, {self.meta.dim}]")
        starts, counts = self._bounds(segments)
        scales = self._items("SCALE") if self.meta.dtype == "i1" else None
        gather_rows(self._items("ROW").view(np.uint8), self.meta.dtype, scales, starts, counts, out, at)

    def blobs(self, segments: np.ndarray) -> list[bytes]:
        """The bytes of each segment."""
        self._expect(Kind.BLOBS)
        content = self._items("BYTES")
        starts, counts = self._bounds(segments)
        return [content[a : a + n].tobytes() for a, n in zip(starts.tolist(), counts.tolist())]


def read_meta(data: np.ndarray, footer: Footer, name: str) -> TwinMeta:
    """What a mapped twin says of itself; ShardError unless it is sealed in the footer and fits the sections."""
    text = view(data, footer.sections["META"]).tobytes()
    if hashlib.sha256(text).hexdigest() != footer.schema_hash:
        raise ShardError(f"{name}: META: expected the text of sha256 {footer.schema_hash[:16]}..; found another")
    try:
        meta = TwinMeta(**json.loads(text))
        check_name(meta.name, "twin")
        if [type(value) for value in asdict(meta).values()] != [str, str, int, str, str]:
            raise TypeError(f"found {meta}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ShardError(f"{name}: META: {error}; expected the keys of a twin") from None
    kind, rows = footer.kind.name.lower(), footer.sections.get("ROW")
    if meta.kind != kind:
        raise ShardError(f"{name}: META: kind {meta.kind!r}; the header says {kind}")
    if rows and (rows.dtype != ROW_DTYPES.get(meta.dtype) or rows.count != footer.tokens * meta.dim or meta.dim < 1):
        raise ShardError(
            f"{name}: section ROW: {rows.count} items of {rows.dtype}; "
            f"expected {footer.tokens} rows of {meta.dim} {meta.dtype}"
        )
    return meta
