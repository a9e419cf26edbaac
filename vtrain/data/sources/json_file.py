"""The objects of a JSON file, lines of JSON or one list: found by byte offset, and parsed when they are asked for."""

from __future__ import annotations

import json
import os
from array import array
from pathlib import Path

from vtrain.data.json_list import BOM, elements, is_list
from vtrain.data.sources.record import shown


class JsonFile:
    """`len` and `[i]` of a JSON Lines file or of a file that is one JSON list (told by its first letter).

    `[i]` is the value, ValueError (one line, without the file's name) where it is not JSON; of a list all has to be
    JSON. Blank lines do not count. Threads may share it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file of records")
        self.is_list = is_list(self.path)
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        self._file = open(self.path, "rb")  # noqa: SIM115 it is read from as long as this object lives
        if self.is_list:
            for start, element in elements(self._file, self.path):
                self._starts.append(start)
                self._ends.append(start + len(element))
        else:
            self._find_lines()

    def _find_lines(self) -> None:
        offset = 0
        for number, line in enumerate(self._file, 1):
            end = offset + len(line)
            if line.strip() not in (b"", BOM):
                self._starts.append(offset)
                self._ends.append(end)
                self._lines.append(number)
            offset = end

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> object:
        start = self._starts[index]
        data = os.pread(self._file.fileno(), self._ends[index] - start, start)
        try:
            return json.loads(data.removeprefix(BOM))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None

    def name(self, index: int) -> str:
        """Where a record stands: train.jsonl:17 (a line, from 1) or train.json[16] (of a list, from 0)."""
        return f"{self.path.name}[{index}]" if self.is_list else f"{self.path.name}:{self._lines[index]}"

    def object(self, index: int) -> dict:
        """`[index]`, ValueError where it is not a JSON object."""
        value = self[index]
        if not isinstance(value, dict):
            raise ValueError(f"{shown(value)}; expected an object")
        return value
