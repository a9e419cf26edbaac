"""Tables of pictures and captions: Parquet, Arrow IPC files and streams, folders of Hugging Face's `save_to_disk`."""

from __future__ import annotations

import base64
import binascii
import bisect
import json
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow
import pyarrow.parquet

from vtrain.data.sources.file_patterns import find_files
from vtrain.data.sources.llava import ROLES, conversation, turn_captions
from vtrain.data.sources.record import (
    Record,
    Skipped,
    Unit,
    cut,
    ends_digest,
    inside,
    shown,
    stable_key,
    texts,
)

SUFFIXES = (".parquet", ".arrow")
CAPTIONS = ("caption", "captions", "text", "prompt", "gpt")
TURNS = "conversations"  # LLaVA's, where a table has them
LONGEST_PATH = 4096  # PATH_MAX: a longer string is a picture in base64
ROWS_AT_A_TIME = 64  # pictures are large


class Table:
    """The rows of one or many tables, in the order of the files' names.

    image: the column of pictures: bytes, {bytes, path}, paths below `root`, base64, or lists of these. captions: the
    columns of captions, those that are there; and the speakers of a `conversations` column, as in `llava`. Rows that
    cannot be used are skipped; a file that cannot be opened or has no such column is a ValueError.
    """

    def __init__(
        self,
        tables: str | os.PathLike,
        root: str | os.PathLike | None = None,
        *,
        image: str = "image",
        captions: Sequence[str] = CAPTIONS,
    ) -> None:
        self.path = Path(tables)
        self.fields = (image, tuple(captions))
        self.files = _files_of(self.path)
        self.root = Path(root) if root is not None else self.files[0][1].parent
        columns, counts = set(), []
        for _, path in self.files:
            file = _Rows(path)
            columns.update(file.columns)
            counts.append(file.rows)
            if image not in file.columns:
                has = ", ".join(file.columns)
                raise ValueError(f"{path}: no column {image!r} of images among {has}; set input.fields.image")
        self.columns = [name for name in dict.fromkeys((image, *captions, TURNS)) if name in columns]
        missing = [name for name in captions if name not in columns and name not in ROLES]
        if missing and tuple(captions) != CAPTIONS:
            raise ValueError(f"{self.path}: no column {missing[0]!r} of captions among {', '.join(sorted(columns))}")
        self.cu = [0, *accumulate(counts)]
        if not self.total():
            raise ValueError(f"{self.path}: no rows; expected pictures")

    def total(self) -> int:
        return self.cu[-1]

    def units(self, size: int) -> list[Unit]:
        return [unit for file in range(len(self.files)) for unit in cut(file, self.cu[file + 1] - self.cu[file], size)]

    def read(self, unit: Unit, pictures: bool = True) -> Iterator[Record | Skipped]:
        name, path = self.files[unit.file]
        columns = [name for name in self.columns if pictures or name != self.fields[0]]
        row = unit.first
        try:
            for values in _Rows(path).read(columns, unit.first, unit.last):
                yield self._record(f"{name}:{row}", values)
                row += 1
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's or the network's, not the file's
                raise
            reason = " ".join(str(error).split())
            yield Skipped(f"{name}:{row}", f"the file is damaged here, rows up to {unit.last} are left out: {reason}")

    def _record(self, name: str, values: dict) -> Record | Skipped:
        image, names = self.fields
        try:
            cell = values.get(image)
            cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
            turns = conversation(values[TURNS]) if values.get(TURNS) else ()
            captions = texts(values, (n for n in names if n not in ROLES)) or turn_captions(turns, names)
            return Record(stable_key(name), name, tuple(map(self._picture, cells)), captions, turns)
        except ValueError as error:
            return Skipped(name, str(error))

    def _picture(self, cell: object) -> Path | bytes:
        if isinstance(cell, dict):  # Hugging Face's Image: the bytes, or where they are
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return cell
        if not isinstance(cell, str) or not cell:
            raise ValueError(f"image is {shown(cell)}; expected bytes or a path")
        if len(cell) <= LONGEST_PATH:
            return inside(self.root, cell)
        try:
            return base64.b64decode(cell, validate=True)
        except binascii.Error as error:
            raise ValueError(f"image is a text of {len(cell)} letters, and not base64: {error}") from None

    def fingerprint(self) -> dict:
        return {"kind": "parquet", "records": ends_digest(self.files), "fields": list(self.fields)}

    def describe(self) -> str:
        return f"{self.total()} rows of {self.path}, columns {', '.join(self.columns)}"


class _Rows:
    """One file: its columns, number of rows, and any range of them. Only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.suffix == ".parquet":
                self._parquet = pyarrow.parquet.ParquetFile(path, memory_map=True)
                counts = [self._parquet.metadata.row_group(i).num_rows for i in range(self._parquet.num_row_groups)]
                schema = self._parquet.schema_arrow
            else:
                self._parquet = None
                self._batches, schema = _arrow_batches(path)
                counts = [batch.num_rows for batch in self._batches]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: cannot read the table: {' '.join(str(error).split())}") from None
        self.columns = schema.names
        self.cu = [0, *accumulate(counts)]
        self.rows = self.cu[-1]

    def read(self, columns: Sequence[str], first: int, last: int) -> Iterator[dict]:
        """The rows first..last-1, as {column: value}."""
        columns = [name for name in columns if name in self.columns]
        group = bisect.bisect_right(self.cu, first) - 1
        while group + 1 < len(self.cu) and self.cu[group] < last:
            begin = self.cu[group]
            for batch in self._group(group, columns):
                low, high = max(first - begin, 0), min(last - begin, batch.num_rows)
                for start in range(low, high, ROWS_AT_A_TIME):
                    yield from batch.slice(start, min(ROWS_AT_A_TIME, high - start)).to_pylist()
                begin += batch.num_rows
            group += 1

    def _group(self, group: int, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        if self._parquet is None:
            batch = self._batches[group].select(columns)
            batch.validate(full=True)  # the file is mapped: offsets in it are checked by nobody else
            yield batch
        else:
            yield from self._parquet.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=columns)


def _arrow_batches(path: Path) -> tuple[list[pyarrow.RecordBatch], pyarrow.Schema]:
    """The record batches of an IPC file or stream: views of the mapped file."""
    source = pyarrow.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)], reader.schema
    source.seek(0)
    reader = pyarrow.ipc.open_stream(source)
    return list(reader), reader.schema


def _files_of(path: Path) -> list[tuple[str, Path]]:
    """(name, path) of the tables that are meant, in the order of their rows."""
    state = path / "state.json"
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if (p / "state.json").is_file()))
        raise ValueError(f"{path}: a folder of splits; take one of {splits}")
    if not state.is_file():
        return find_files(path, SUFFIXES)
    try:
        value = json.loads(state.read_bytes())
        names = [entry["filename"] for entry in value["_data_files"]]
        indices = value.get("_indices_data_files")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{state}: not what save_to_disk writes") from None
    if indices:
        raise ValueError(f"{state}: the rows are chosen by an indices file; save the dataset after flatten_indices()")
    if not names:
        raise ValueError(f"{state}: no data files")
    return [(name, inside(path, name)) for name in names]
