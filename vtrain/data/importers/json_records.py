"""Records of JSON lists and JSONL files by number, whatever their size: an index of every 1024th record's byte.

Indexing reads the file once; reading a range decodes it alone, one record at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vtrain._host import crc32c

GRAIN = 1024  # records between two entries of the index
MAX_ELEMENT = 1 << 26  # bytes of a list's element: a file that is no JSON must not be read whole to tell
_CHUNK = 1 << 22
_DECODER = json.JSONDecoder()
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


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
        with open(self.path, "rb") as file:
            head = file.read(4096)
        self.is_list = head.removeprefix(_BOM).lstrip(_BLANK).startswith(b"[")
        self._length = self._index_list() if self.is_list else self._index_lines()

    def __len__(self) -> int:
        return self._length

    def read(self, first: int, last: int) -> Iterator[tuple[int, str, Any]]:
        if first >= last:
            return
        with open(self.path, "rb") as file:
            file.seek(self._starts[first // GRAIN])
            records = self._elements(_Text(file)) if self.is_list else file
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
            text = _Text(file)
            text.drop(_BOM.decode("latin-1"))
            text.blanks()
            text.drop("[")
            for start, _ in self._elements(text):
                if count % GRAIN == 0:
                    self._starts.append(start)
                count += 1
            text.blanks()
            if text.peek():
                raise ValueError(f"{self.path}: byte {text.position}: more after the list; expected its end")
        return count

    def _elements(self, text: _Text) -> Iterator[tuple[int, bytes]]:
        """(first byte, JSON) of each element from here to the list's end, which is consumed."""
        text.blanks()
        more = not text.drop("]")
        while more:
            start = text.position
            try:
                element = text.value()
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path}: byte {start}: not JSON: {error}") from None
            yield start, element.encode("latin-1")
            text.blanks()
            more = text.drop(",")
            if not more and not text.drop("]"):
                found = repr(text.peek()) if text.peek() else "the end of the file"
                raise ValueError(f"{self.path}: byte {text.position}: {found}; expected , or ] in the list")
            text.blanks()


class _Text:
    """The bytes of a file from where it stands, as latin-1: characters and bytes count alike."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.start = file.tell()  # the byte of the file that is buffer[0]
        self.buffer = ""
        self.at = 0

    @property
    def position(self) -> int:
        return self.start + self.at

    def more(self) -> bool:
        chunk = self.file.read(_CHUNK)
        self.start += self.at
        self.buffer = self.buffer[self.at :] + chunk.decode("latin-1")
        self.at = 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character, empty at the end."""
        if self.at == len(self.buffer):
            self.more()
        return self.buffer[self.at : self.at + 1]

    def drop(self, expected: str) -> bool:
        while len(self.buffer) - self.at < len(expected) and self.more():
            pass
        found = self.buffer.startswith(expected, self.at)
        self.at += len(expected) * found
        return found

    def blanks(self) -> None:
        while (letter := self.peek()) and letter in " \t\r\n":
            self.at += 1

    def value(self) -> str:
        """The text of the JSON value that begins here; ValueError where there is none."""
        while True:
            try:
                size = _DECODER.raw_decode(self.buffer, self.at)[1] - self.at
            except ValueError:
                if len(self.buffer) - self.at > MAX_ELEMENT or not self.more():
                    raise
                continue
            if self.at + size < len(self.buffer) or not self.more():  # a number may go on behind the buffer's end
                break
        text = self.buffer[self.at : self.at + size]
        self.at += size
        return text


def _value(line: bytes) -> Any:
    try:
        return json.loads(line.removeprefix(_BOM))
    except (ValueError, RecursionError) as error:
        return Broken(f"not JSON: {error}")
