"""Records of JSON lists and JSONL files by number, whatever their size: an index of every 1024th record's byte.

Indexing reads the file once; reading a range decodes it alone, one record at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtrain._host import crc32c
from vtrain.data.json_list import BOM, elements, elements_from, is_list

GRAIN = 1024  # records between two entries of the index
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Broken:
    """A record that is not JSON or not UTF-8, and why."""

    reason: str


class JsonRecords:
    """`len`, and `read(first, last)` -> (number, name for messages, value or Broken) of each.

    A file that begins with `[` is a list, which has to be whole: ValueError names the first element that is not JSON.
    Any other is JSONL: a record is a line, blank ones too (they are not given), and a broken one is for the caller.
    crc: crc32c of all bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        self.crc = 0
        self._starts: list[int] = []  # byte of records 0, GRAIN, 2 * GRAIN, ...
        self.is_list = is_list(self.path)
        self._length = self._index_list() if self.is_list else self._index_lines()

    def __len__(self) -> int:
        return self._length

    def read(self, first: int, last: int) -> Iterator[tuple[int, str, Any]]:
        if first >= last:
            return
        with open(self.path, "rb") as file:
            file.seek(self._starts[first // GRAIN])
            records = elements_from(file, self.path) if self.is_list else file
            for number, record in enumerate(records, first // GRAIN * GRAIN):
                if number >= last:
                    return
                if number < first:
                    continue
                if self.is_list:
                    yield number, f"{self.path.name}: element {number}", _value(record[1])
                elif record.strip():
                    yield number, f"{self.path.name}:{number + 1}", _value(record)

    def _index_lines(self) -> int:
        lines, position, at_start = 0, 0, True
        with open(self.path, "rb") as file:
            while chunk := file.read(_CHUNK):
                self.crc = crc32c(chunk, self.crc)
                starts = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + 1
                if at_start:
                    starts = np.concatenate([[0], starts])
                at_start = chunk.endswith(b"\n")
                if at_start:
                    starts = starts[:-1]  # belongs to the next chunk, if there is one
                self._starts += (starts[-lines % GRAIN :: GRAIN] + position).tolist()
                lines += len(starts)
                position += len(chunk)
        return lines

    def _index_list(self) -> int:
        count = 0
        with open(self.path, "rb") as file:
            while chunk := file.read(_CHUNK):
                self.crc = crc32c(chunk, self.crc)
            file.seek(0)
            for start, _ in elements(file, self.path):
                if count % GRAIN == 0:
                    self._starts.append(start)
                count += 1
        return count


def _value(line: bytes) -> Any:
    try:
        return json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        return Broken(f"not JSON: {error}")
