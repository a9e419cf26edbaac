"""Writes one token shard: tokens are streamed, everything else follows at close, and only a whole file gets its name.

A killed writer leaves `.tmp-<uuid>` and nothing else; a shard of the same name is replaced only by a finished one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vtrain._host import PlaneBytes, length_histogram
from vtrain.data import format
from vtrain.data.container import ContainerWriter
from vtrain.data.format import Kind, Schema, SectionFlag, ShardError, ShardInfo, Store
from vtrain.data.samples import Samples, check_samples

PIECE = 1 << 17  # ids that are converted, written and summed at a time: they stay in the second cache


class ShardWriter:
    """`with ShardWriter(path, schema, uuid=...) as w: w.append_batch(...)`; `close` (or the end of `with`) finishes.

    uuid: 16 bytes, unique to the shard (derive it from the data to get reproducible files). id_store: a key of
    format.STORES, None = the smallest that fits the vocabulary. Labels, segments, runs, keys and columns wait in memory
    until the shard is closed. An error inside `with` removes the temporary file.
    """

    def __init__(self, path: Path | str, schema: Schema, *, uuid: bytes, id_store: str | None = None):
        self.path = Path(path)
        self.schema = schema
        self.store = _store(self.path, schema, id_store)
        self.info: ShardInfo | None = None
        self.samples = 0
        self.tokens = 0
        self._extremes: tuple[int, int] | None = None
        self._has_runs = False
        self._rows = {"SEG": 0, "RUN": 0}
        zero = np.zeros(1, dtype="<u4")
        self._parts: dict[str, list[np.ndarray]] = {
            "OFF": [zero],
            "SEG": [np.zeros(0, dtype=format.SEGMENT)],
            "SEGO": [zero],
            "RUN": [zero[:0]],
            "RUNO": [zero],
            "KEY": [np.zeros(0, dtype="<u8")],
            "LBL": [np.zeros(0, dtype=self.store.dtype)],
            **{f"COL.{name}": [np.zeros(0, dtype=dtype)] for name, dtype in schema.columns.items()},
        }
        for stream in ("TOK", "LBL") if self.store.plane else ():
            self._parts[self._plane_id(stream)] = [np.zeros(0, dtype=np.uint8)]
        self._planes = {stream: PlaneBytes(self.store.plane) for stream in ("TOK", "LBL") if self.store.plane}
        self._piece = np.empty(PIECE, dtype=self.store.dtype)
        self._out = ContainerWriter(self.path, uuid, Kind.SHARD, bytes(uuid).hex())
        self._out.start("TOK", self.store.dtype)

    def append_batch(
        self,
        ids: np.ndarray,
        offsets: np.ndarray,
        segments: np.ndarray,
        segment_offsets: np.ndarray,
        *,
        keys: np.ndarray,
        runs: np.ndarray | None = None,
        run_offsets: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        columns: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Append N samples. Sample i is ids[offsets[i]:offsets[i+1]] with segments[segment_offsets[i]:...[i+1]].

        ids: integers[T]; offsets, segment_offsets, run_offsets: integers[N+1], rising; segments: format.SEGMENT[M];
        keys: u64[N]; runs: u32[R] (samples.pack_runs), None = every token of these samples has weight 1.
        labels: integers[T], one of the vocabulary for each token, if the schema has labels. columns: numbers[N] for
        each column of the schema. ShardError names the first sample that breaks a rule; nothing of a refused batch is
        written.
        """
        if not self._out.open:
            raise ValueError(f"{self.path}: the shard is closed")
        batch = self._window(ids, offsets, segments, segment_offsets, keys, runs, run_offsets, labels)
        values = self._columns(columns or {}, len(batch.keys))
        extremes = check_samples(self.schema, batch, str(self.path))
        self._check_room(batch)
        if extremes:
            low, high = self._extremes or extremes
            self._extremes = min(low, extremes[0]), max(high, extremes[1])
        for piece in self._stored("TOK", batch.ids):
            self._out.extend(piece)
        if batch.labels is not None:
            self._parts["LBL"] += map(np.copy, self._stored("LBL", batch.labels))
        self._keep(batch, values)
        self.tokens += len(batch.ids)
        self.samples += len(batch.keys)

    def _keep(self, batch: Samples, columns: dict[str, np.ndarray]) -> None:
        """Copies of what is written at close."""
        run_cu = np.zeros(len(batch.keys) + 1, dtype=np.int64) if batch.runs is None else batch.run_cu
        self._parts["OFF"].append((batch.cu[1:] + self.tokens).astype("<u4"))
        self._parts["SEG"].append(np.array(batch.segments, dtype=format.SEGMENT))
        self._parts["SEGO"].append((batch.segment_cu[1:] + self._rows["SEG"]).astype("<u4"))
        self._parts["RUNO"].append((run_cu[1:] + self._rows["RUN"]).astype("<u4"))
        self._parts["KEY"].append(np.array(batch.keys, dtype="<u8"))
        for name, values in columns.items():
            self._parts[f"COL.{name}"].append(values)
        self._rows["SEG"] += len(batch.segments)
        if batch.runs is not None:
            self._parts["RUN"].append(np.array(batch.runs, dtype="<u4"))
            self._rows["RUN"] += len(batch.runs)
            self._has_runs = True

    def _stored(self, stream: str, ids: np.ndarray) -> Iterator[np.ndarray]:
        """What the section TOK or LBL gets of legal ids, PIECE at a time; the bits above go to its plane.

        A view, which holds until the next one is asked for.
        """
        dtype = self.store.dtype
        if not self.store.plane and ids.dtype in (dtype, np.dtype(f"<i{dtype.itemsize}")):
            yield ids.view(dtype)  # legal ids have no sign
            return
        for first in range(0, len(ids), PIECE):
            piece = ids[first : first + PIECE]
            stored = self._piece[: len(piece)]
            if self.store.plane:
                plane = self._planes[stream].split(np.ascontiguousarray(piece, dtype=np.int32), stored)
                self._parts[self._plane_id(stream)].append(plane)
            else:
                np.copyto(stored, piece, casting="unsafe")
            yield stored

    def _window(self, ids, offsets, segments, segment_offsets, keys, runs, run_offsets, labels) -> Samples:
        """The arrays cut to what the offsets name, all cu arrays starting at 0."""
        keys = np.ascontiguousarray(self._integers("keys", keys), dtype=np.uint64)
        segments = np.asarray(segments)
        if segments.dtype != format.SEGMENT:
            raise ValueError(f"{self.path}: segments are {segments.dtype}, expected format.SEGMENT")
        if (runs is None) != (run_offsets is None):
            raise ValueError(f"{self.path}: runs and run_offsets go together")
        if (labels is not None) != self.schema.labels:
            raise ValueError(
                f"{self.path}: labels {'missing' if self.schema.labels else 'given'}; "
                f"the schema says labels={self.schema.labels}"
            )
        tokens, cu = self._cut("offsets", self._integers("ids", ids), offsets, len(keys))
        segments, segment_cu = self._cut("segment_offsets", segments, segment_offsets, len(keys))
        run_cu = None
        if runs is not None:
            runs, run_cu = self._cut("run_offsets", np.asarray(runs, dtype=np.uint32), run_offsets, len(keys))
        if labels is not None:
            if np.shape(labels) != np.shape(ids):
                raise ValueError(
                    f"{self.path}: labels: {np.size(labels)} for {np.size(ids)} ids; expected one for each"
                )
            labels, _ = self._cut("offsets", self._integers("labels", labels), offsets, len(keys))
        return Samples(tokens, cu, segments, segment_cu, keys, runs, run_cu, labels)

    def _integers(self, name: str, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values)
        if values.dtype.kind not in "iu" and values.size:
            raise ValueError(f"{self.path}: {name} are {values.dtype}, expected integers")
        return values

    def _cut(self, name: str, flat: np.ndarray, offsets: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        cu = np.asarray(offsets, dtype=np.int64)
        if flat.ndim != 1 or cu.shape != (count + 1,) or cu[0] < 0 or cu[-1] > len(flat) or (cu[1:] < cu[:-1]).any():
            raise ValueError(
                f"{self.path}: {name}: {cu.size} numbers for {count} samples and {len(flat)} items; "
                f"expected {count + 1} rising ones in 0..{len(flat)}"
            )
        return flat[cu[0] : cu[-1]], cu - cu[0]

    def _columns(self, given: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        """Copies in the schema's dtypes."""
        if sorted(given) != list(self.schema.columns):
            raise ValueError(
                f"{self.path}: columns: found {', '.join(sorted(given)) or 'none'}; "
                f"the schema has {', '.join(self.schema.columns) or 'none'}"
            )
        return {name: self._column(name, np.asarray(given[name]), count) for name in self.schema.columns}

    def _column(self, name: str, values: np.ndarray, count: int) -> np.ndarray:
        dtype = np.dtype(self.schema.columns[name])
        whole = dtype.kind in "iu"
        if values.shape != (count,) or (values.dtype.kind not in ("iu" if whole else "iuf") and count):
            raise ValueError(
                f"{self.path}: column {name}: {values.dtype} of shape {values.shape}; "
                f"expected {'integers' if whole else 'numbers'} of shape ({count},)"
            )
        if whole and count and not (np.iinfo(dtype).min <= values.min() and values.max() <= np.iinfo(dtype).max):
            raise ValueError(
                f"{self.path}: column {name}: values {values.min()}..{values.max()}; expected those of {dtype}"
            )
        return np.array(values, dtype=dtype)

    def _check_room(self, batch: Samples) -> None:
        rows = {
            "TOK": self.tokens + len(batch.ids),
            "KEY": self.samples + len(batch.keys),
            "SEG": self._rows["SEG"] + len(batch.segments),
            "RUN": self._rows["RUN"] + (0 if batch.runs is None else len(batch.runs)),
        }
        for section, count in rows.items():
            if count > format.MAX_ROWS:
                raise ShardError(f"{self.path}: {section}: {count} items; a shard holds at most {format.MAX_ROWS}")

    def close(self) -> ShardInfo:
        """Write the other sections and the footer, make the file durable, give it its name. Idempotent."""
        if self.info is not None:
            return self.info
        if not self._out.open:
            raise ValueError(f"{self.path}: the shard was abandoned after an error")
        try:
            self.info = self._finish()
        except BaseException:
            self.abort()
            raise
        return self.info

    def _finish(self) -> ShardInfo:
        self._plane("TOK")
        if self.schema.labels:
            self._flush("LBL")
            self._plane("LBL")
        lengths = np.diff(np.concatenate(self._parts["OFF"]).astype(np.int64))
        for id in ("OFF", "SEG", "SEGO", *(("RUN", "RUNO") if self._has_runs else ()), "KEY"):
            self._flush(id)
        for name in self.schema.columns:
            self._flush(f"COL.{name}", SectionFlag.OPTIONAL)
        self._out.section("SCHEMA", np.frombuffer(format.canonical_json(self.schema.to_json()), dtype=np.uint8))
        min_id, max_id = self._extremes or (0, 0)
        footer = self._out.finish(
            samples=self.samples,
            tokens=self.tokens,
            min_id=min_id,
            max_id=max_id,
            min_length=int(lengths.min()) if self.samples else 0,
            max_length=int(lengths.max()) if self.samples else 0,
            schema_hash=self.schema.hash,
            histogram=length_histogram(lengths),
        )
        return ShardInfo.of(self.path.name, footer)

    def _flush(self, id: str, flags: SectionFlag | int = 0) -> None:
        """Write a section from its parts. What has one of every token is large: it is not copied together."""
        parts = self._parts.pop(id)
        self._out.start(id, parts[0].dtype, flags)
        for part in parts if id.startswith(("TOK", "LBL")) else [np.concatenate(parts)]:
            self._out.extend(part)

    def _plane(self, stream: str) -> None:
        if self.store.plane:
            self._parts[self._plane_id(stream)].append(self._planes[stream].rest())
            self._flush(self._plane_id(stream))

    def _plane_id(self, stream: str) -> str:
        return f"{stream}{self.store.plane}"

    def abort(self) -> None:
        """Drop the unfinished shard and its temporary file."""
        self._out.abort()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _store(path: Path, schema: Schema, name: str | None) -> Store:
    if name is None:
        return format.store_for(schema.vocab.size)
    if name not in format.STORES:
        raise ValueError(f"{path}: id store {name!r}; expected one of {', '.join(format.STORES)}")
    store = format.STORES[name]
    if store.capacity < schema.vocab.size:
        raise ValueError(f"{path}: id store {name} does not hold ids up to {schema.vocab.size - 1}")
    return store
