"""The objects of a JSON file: lines of JSON are found by byte offset and parsed when asked for; a list is loaded."""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path

from vtrain.data.sources.record import shown

BOM = b"\xef\xbb\xbf"


class JsonFile:
    """`len` and `[i]` of a JSON Lines file or of a file that is one JSON list (`.json` only, told by its first letter).

    `[i]` is the value, ValueError (one line, without the file's name) where it is not JSON. Blank lines do not count.
    Threads may share it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file of records")
        self._list: list | None = _load_list(self.path)
        self._starts, self._ends, self._numbers = array("Q"), array("Q"), array("Q")
        if self._list is None:
            self._find_lines()

    def _find_lines(self) -> None:
        self._file = open(self.path, "rb")  # noqa: SIM115 it is read from as long as this object lives
        offset = 0
        for number, line in enumerate(self._file, 1):
            end = offset + len(line)
            if line.strip() not in (b"", BOM):
                self._starts.append(offset)
                self._ends.append(end)
                self._numbers.append(number)
            offset = end

    def __len__(self) -> int:
        return len(self._starts) if self._list is None else len(self._list)

    def __getitem__(self, index: int) -> object:
        if self._list is not None:
            return self._list[index]
        start = self._starts[index]
        line = os.pread(self._file.fileno(), self._ends[index] - start, start)
        return _parse(line)

    def name(self, index: int) -> str:
        """Where a record stands: train.jsonl:17 (a line, from 1) or train.json[16] (of a list, from 0)."""
        return f"{self.path.name}[{index}]" if self._list is not None else f"{self.path.name}:{self._numbers[index]}"

    def object(self, index: int) -> dict:
        """`[index]`, ValueError where it is not a JSON object."""
        value = self[index]
        if not isinstance(value, dict):
            raise ValueError(f"{shown(value)}; expected an object")
        return value


def _load_list(path: Path) -> list | None:
    """The values of a file that is one JSON list; None where it is lines of JSON."""
    if path.suffix != ".json":
        return None
    with open(path, "rb") as file:
        if not file.read(4096).removeprefix(BOM).lstrip().startswith(b"["):
            return None
        file.seek(0)
        data = file.read()
    try:
        return _parse(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(data: bytes) -> object:
    try:
        return json.loads(data.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
