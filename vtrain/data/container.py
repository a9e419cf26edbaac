"""Writes and maps files of pages and checksummed sections (format.py): what shards and their twins have in common.

A killed writer leaves `.tmp-<...>` and nothing else; a file of the same name is replaced only by a finished one.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vtrain._host import crc32c, crc32c_blocks, crc32c_combine
from vtrain.data import format
from vtrain.data.format import Footer, Kind, Schema, Section, SectionFlag, ShardError
from vtrain.files import replace as rename
from vtrain.files import sync, sync_folder, write


class BlockChecksums:
    """crc32c of every block of a byte stream that arrives in pieces of any size; a piece is read once."""

    def __init__(self, block: int):
        self.block = block
        self.finished: list[np.ndarray] = []
        self.open_crc = 0
        self.open_bytes = 0

    def update(self, data: memoryview) -> int:
        """The crc32c of `data` alone."""
        head = min(len(data), (self.block - self.open_bytes) % self.block)
        crc = self._extend(data[:head])
        whole = (len(data) - head) // self.block * self.block
        if whole:
            blocks = crc32c_blocks(data[head : head + whole], self.block)
            self.finished.append(blocks)
            for block in blocks.tolist():
                crc = crc32c_combine(crc, block, self.block)
        tail = data[head + whole :]
        return crc32c_combine(crc, self._extend(tail), len(tail))

    def _extend(self, data: memoryview) -> int:
        crc = crc32c(data)
        self.open_crc = crc32c_combine(self.open_crc, crc, len(data))
        self.open_bytes += len(data)
        if self.open_bytes == self.block:
            self.finished.append(np.array([self.open_crc], dtype=np.uint32))
            self.open_crc = self.open_bytes = 0
        return crc

    def result(self) -> np.ndarray:
        tail = [np.array([self.open_crc], dtype=np.uint32)] if self.open_bytes else []
        return np.concatenate([np.zeros(0, dtype=np.uint32), *self.finished, *tail])


class ContainerWriter:
    """Header, sections in the order in which they come, checksums, footer; then the file gets its name.

    The temporary file is `.tmp-<label>` beside `path`. An error while writing removes it.
    """

    def __init__(self, path: Path | str, uuid: bytes, kind: Kind, label: str):
        self.path = Path(path)
        self.uuid = bytes(uuid)
        if len(self.uuid) != 16:
            raise ValueError(f"{path}: a uuid has 16 bytes, found {len(self.uuid)}")
        self.finished = False
        self._kind = kind
        self._sections: dict[str, Section] = {}
        self._blocks = BlockChecksums(1 << format.BLOCK_LOG2)
        self._written = 0
        self._temporary = self.path.parent / f".tmp-{label}"
        self._file = _open_locked(self._temporary)  # closed by finish or abort
        self._write(format.pack_header(self.uuid, kind))

    @property
    def open(self) -> bool:
        return self._file is not None

    def start(self, id: str, dtype: np.dtype, flags: SectionFlag | int = 0) -> None:
        """Begin a section on the next free page."""
        self._pad()
        self._sections[id] = Section(id, dtype, int(flags), 0, self._written, 0, 0)
        self._id = id

    def extend(self, data: np.ndarray) -> None:
        """Add items to the section that was started last."""
        section = self._sections[self._id]
        crc = self._write(np.ascontiguousarray(data, dtype=section.dtype).view(np.uint8))
        self._sections[self._id] = replace(
            section,
            crc=crc32c_combine(section.crc, crc, data.size * section.dtype.itemsize),
            bytes=section.bytes + data.size * section.dtype.itemsize,
            count=section.count + data.size,
        )

    def section(self, id: str, data: np.ndarray, flags: SectionFlag | int = 0) -> None:
        """A whole section."""
        self.start(id, data.dtype, flags)
        self.extend(data)

    def finish(self, **facts: object) -> Footer:
        """Checksums and footer (format.Footer's fields that are not known here), then make the file durable."""
        self._pad()
        self.section("BCRC", self._blocks.result().astype("<u4"))
        self._pad()
        footer = Footer(
            uuid=self.uuid,
            file_bytes=self._written + format.PAGE,
            sections=self._sections,
            kind=self._kind,
            **facts,
        )
        self._write(format.pack_footer(footer))
        sync(self._file, self.path)
        self._file.close()
        self._file = None
        rename(self._temporary, self.path)
        self.finished = True
        sync_folder(self.path.parent)
        return format.read_pages(self.path, self._kind)[0]

    def _pad(self) -> None:
        """Zeros up to the next page, at least format.SPARE after a section; nothing where they are written already."""
        if self._sections:
            last = self._sections[self._id]
            self._write(bytes(format.padded(last.offset + last.bytes) - self._written))

    def _write(self, data: np.ndarray | bytes) -> int:
        data = memoryview(data)
        try:
            write(self._file, data, self.path)
        except BaseException:  # a full disk: what is there is no longer what the checksums say
            self.abort()
            raise
        self._written += len(data)
        return self._blocks.update(data)

    def abort(self) -> None:
        """Drop the unfinished file."""
        if self._file is not None:
            with suppress(OSError):  # closing may fail again on a full disk
                self._file.close()
            self._file = None
        if not self.finished:
            self._temporary.unlink(missing_ok=True)


def _open_locked(path: Path) -> BinaryIO:
    """An empty file under a lock that ends with its writer, so that what a dead one has left can be told."""
    while True:
        file = open(path, "ab")  # noqa: SIM115  not "wb": it would empty what another process is writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ShardError(f"{path}: another process is writing this file") from None
        except OSError:  # a file system without locks: nobody can tell, and nobody removes it
            pass
        if os.fstat(file.fileno()).st_nlink:  # 0: it was removed as a leftover just before the lock
            file.truncate(0)
            return file
        file.close()


def view(data: np.ndarray, section: Section) -> np.ndarray:
    """The items of a section of a mapped file; read_pages has checked that they lie inside."""
    return data[section.offset : section.offset + section.bytes].view(section.dtype)


def read_schema(data: np.ndarray, footer: Footer, name: str) -> Schema:
    """The schema that a mapped shard carries; ShardError unless it is the one of the footer's hash."""
    text = view(data, footer.sections["SCHEMA"]).tobytes()
    try:
        schema = Schema.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{name}: SCHEMA: {error}") from None
    if schema.hash != footer.schema_hash:
        raise ShardError(f"{name}: SCHEMA: sha256 {schema.hash[:16]}..; the footer expects {footer.schema_hash[:16]}..")
    return schema
