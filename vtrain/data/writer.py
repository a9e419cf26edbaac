"""Writes one token shard: tokens are streamed, everything else follows at close, and only a whole file gets its name.

A killed writer leaves `.tmp-<uuid>` and nothing else; a shard of the same name is replaced only by a finished one.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from vtrain._host import crc32c, crc32c_blocks, crc32c_combine
from vtrain.data import format
from vtrain.data.format import Footer, Schema, Section, ShardError, ShardInfo
from vtrain.data.samples import Samples, check_samples
from vtrain.files import replace, sync, sync_folder, write


class BlockChecksums:
    """crc32c of every block of a byte stream that arrives in pieces of any size."""

    def __init__(self, block: int):
        self.block = block
        self.finished: list[np.ndarray] = []
        self.open_crc = 0
        self.open_bytes = 0

    def update(self, data: memoryview) -> None:
        head = min(len(data), (self.block - self.open_bytes) % self.block)
        self._extend(data[:head])
        whole = (len(data) - head) // self.block * self.block
        if whole:
            self.finished.append(crc32c_blocks(data[head : head + whole], self.block))
        self._extend(data[head + whole :])

    def _extend(self, data: memoryview) -> None:
        self.open_crc = crc32c_combine(self.open_crc, crc32c(data), len(data))
        self.open_bytes += len(data)
        if self.open_bytes == self.block:
            self.finished.append(np.array([self.open_crc], dtype=np.uint32))
            self.open_crc = self.open_bytes = 0

    def result(self) -> np.ndarray:
        tail = [np.array([self.open_crc], dtype=np.uint32)] if self.open_bytes else []
        return np.concatenate([np.zeros(0, dtype=np.uint32), *self.finished, *tail])


class ShardWriter:
    """`with ShardWriter(path, schema, uuid=...) as w: w.append_batch(...)`; `close` (or the end of `with`) finishes.

    uuid: 16 bytes, unique to the shard (derive it from the data to get reproducible files). id_dtype: u1, u2 or u4,
    None = the smallest that fits the vocabulary. An error inside `with` removes the temporary file.
    """

    def __init__(self, path: Path | str, schema: Schema, *, uuid: bytes, id_dtype: np.dtype | str | None = None):
        self.path = Path(path)
        self.schema = schema
        self.uuid = bytes(uuid)
        if len(self.uuid) != 16:
            raise ValueError(f"{path}: a shard's uuid has 16 bytes, found {len(self.uuid)}")
        self.id_dtype = format.id_dtype_for(schema.vocab.size) if id_dtype is None else np.dtype(id_dtype)
        if self.id_dtype not in format.ID_DTYPES or np.iinfo(self.id_dtype).max < schema.vocab.size - 1:
            raise ValueError(f"{path}: id dtype {self.id_dtype} does not hold ids up to {schema.vocab.size - 1}")
        self.info: ShardInfo | None = None
        self.samples = 0
        self.tokens = 0
        self._has_runs = False
        self._min_id, self._max_id = 2**32 - 1, 0
        self._columns = {"OFF": [], "SEG": [], "SEGO": [], "RUN": [], "RUNO": [], "KEY": []}
        self._rows = {"SEG": 0, "RUN": 0}
        self._sections: dict[str, Section] = {}
        self._blocks = BlockChecksums(1 << format.BLOCK_LOG2)
        self._token_crc = 0
        self._written = 0
        self._temporary = self.path.parent / f".tmp-{self.uuid.hex()}"
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by close or abort
        self._write(format.pack_header(self.uuid))

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
    ) -> None:
        """Append N samples. Sample i is ids[offsets[i]:offsets[i+1]] with segments[segment_offsets[i]:...[i+1]].

        ids: integers[T]; offsets, segment_offsets, run_offsets: integers[N+1], rising; segments: format.SEGMENT[M];
        keys: u64[N]; runs: u32[R] (samples.pack_runs), None = every token of these samples has weight 1.
        ShardError names the first sample that breaks a rule; nothing of a refused batch is written.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: the shard is closed")
        batch = self._window(ids, offsets, segments, segment_offsets, keys, runs, run_offsets)
        check_samples(self.schema, batch, str(self.path))
        self._check_room(batch)
        if len(batch.ids):
            self._min_id = min(self._min_id, int(batch.ids.min()))
            self._max_id = max(self._max_id, int(batch.ids.max()))
            stored = np.ascontiguousarray(batch.ids, dtype=self.id_dtype)
            self._token_crc = crc32c(stored, self._token_crc)
            self._write(stored)
        count = len(batch.keys)
        run_cu = np.zeros(count + 1, dtype=np.int64) if batch.runs is None else batch.run_cu
        self._columns["OFF"].append((batch.cu[1:] + self.tokens).astype("<u4"))
        self._columns["SEG"].append(np.array(batch.segments, dtype=format.SEGMENT))
        self._columns["SEGO"].append((batch.segment_cu[1:] + self._rows["SEG"]).astype("<u4"))
        self._columns["RUNO"].append((run_cu[1:] + self._rows["RUN"]).astype("<u4"))
        self._columns["KEY"].append(np.array(batch.keys, dtype="<u8"))
        if batch.runs is not None:
            self._columns["RUN"].append(np.array(batch.runs, dtype="<u4"))
            self._rows["RUN"] += len(batch.runs)
            self._has_runs = True
        self._rows["SEG"] += len(batch.segments)
        self.tokens += len(batch.ids)
        self.samples += count

    def _window(self, ids, offsets, segments, segment_offsets, keys, runs, run_offsets) -> Samples:
        """The arrays cut to what the offsets name, all cu arrays starting at 0."""
        keys = np.asarray(keys, dtype=np.uint64)
        segments = np.asarray(segments)
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu" and ids.size:
            raise ValueError(f"{self.path}: ids are {ids.dtype}, expected integers")
        if segments.dtype != format.SEGMENT:
            raise ValueError(f"{self.path}: segments are {segments.dtype}, expected format.SEGMENT")
        if (runs is None) != (run_offsets is None):
            raise ValueError(f"{self.path}: runs and run_offsets go together")
        ids, cu = self._cut("offsets", ids, offsets, len(keys))
        segments, segment_cu = self._cut("segment_offsets", segments, segment_offsets, len(keys))
        run_cu = None
        if runs is not None:
            runs, run_cu = self._cut("run_offsets", np.asarray(runs, dtype=np.uint32), run_offsets, len(keys))
        return Samples(ids, cu, segments, segment_cu, keys, runs, run_cu)

    def _cut(self, name: str, flat: np.ndarray, offsets: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        cu = np.asarray(offsets, dtype=np.int64)
        if flat.ndim != 1 or cu.shape != (count + 1,) or cu[0] < 0 or cu[-1] > len(flat) or (np.diff(cu) < 0).any():
            raise ValueError(
                f"{self.path}: {name}: {cu.size} numbers for {count} samples and {len(flat)} items; "
                f"expected {count + 1} rising ones in 0..{len(flat)}"
            )
        return flat[cu[0] : cu[-1]], cu - cu[0]

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
        if self._file is None:
            raise ValueError(f"{self.path}: the shard was abandoned after an error")
        try:
            self.info = self._finish()
        except BaseException:
            self.abort()
            raise
        return self.info

    def _finish(self) -> ShardInfo:
        self._record("TOK", self.id_dtype, self._token_crc, format.PAGE, self.tokens * self.id_dtype.itemsize)
        self._pad()
        zero = np.zeros(1, dtype="<u4")
        offsets = np.concatenate([zero, *self._columns["OFF"]])
        self._section("OFF", offsets)
        self._section("SEG", np.concatenate([np.zeros(0, dtype=format.SEGMENT), *self._columns["SEG"]]))
        self._section("SEGO", np.concatenate([zero, *self._columns["SEGO"]]))
        if self._has_runs:
            self._section("RUN", np.concatenate([zero[:0], *self._columns["RUN"]]))
            self._section("RUNO", np.concatenate([zero, *self._columns["RUNO"]]))
        self._section("KEY", np.concatenate([np.zeros(0, dtype="<u8"), *self._columns["KEY"]]))
        self._section("SCHEMA", np.frombuffer(format.canonical_json(self.schema.to_json()), dtype=np.uint8))
        self._section("BCRC", self._blocks.result().astype("<u4"))
        lengths = np.diff(offsets.astype(np.int64))
        page = format.pack_footer(
            Footer(
                uuid=self.uuid,
                file_bytes=self._written + format.PAGE,
                samples=self.samples,
                tokens=self.tokens,
                min_id=self._min_id if self.tokens else 0,
                max_id=self._max_id,
                min_length=int(lengths.min(initial=format.MAX_SAMPLE)) if self.samples else 0,
                max_length=int(lengths.max(initial=0)),
                schema_hash=self.schema.hash,
                histogram=length_histogram(lengths),
                sections=self._sections,
            )
        )
        self._write(page)
        sync(self._file, self.path)
        self._file.close()
        self._file = None
        replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        return format.shard_info(self.path)

    def _section(self, id: str, data: np.ndarray) -> None:
        self._record(id, data.dtype, crc32c(data.view(np.uint8)), self._written, data.nbytes)
        self._write(data)
        self._pad()

    def _record(self, id: str, dtype: np.dtype, crc: int, offset: int, size: int) -> None:
        self._sections[id] = Section(id, dtype, 0, crc, offset, size, size // dtype.itemsize)

    def _pad(self) -> None:
        self._write(bytes(format.padded(self._written) - self._written))

    def _write(self, data: np.ndarray | bytes) -> None:
        data = memoryview(data if isinstance(data, bytes) else data.view(np.uint8))
        try:
            write(self._file, data, self.path)
        except BaseException:  # a full disk: what is there is no longer what the checksums say
            self.abort()
            raise
        self._blocks.update(data)
        self._written += len(data)

    def abort(self) -> None:
        """Drop the unfinished shard and its temporary file."""
        if self._file is not None:
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                self._file.close()
            self._file = None
        if self.info is None:
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def length_histogram(lengths: np.ndarray) -> np.ndarray:
    """u64[64]: samples per bin of format.LENGTH_EDGES."""
    bins = np.searchsorted(format.LENGTH_EDGES, lengths, side="right") - 1
    return np.bincount(bins, minlength=len(format.LENGTH_EDGES)).astype(np.uint64)
