"""SimpleAR's pictures: {"image_path": path, "caption": str or list of str} in JSON, JSONL, patterns and YAML mixes."""

from __future__ import annotations

import bisect
import os
import posixpath
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from vtrain.data.json_records import Broken
from vtrain.data.sources.captions import one_line
from vtrain.data.sources.record import (
    IndexedSource,
    Record,
    Skipped,
    Unit,
    distinct,
    inside,
    shown,
    stable_key,
    strings,
    texts,
)
from vtrain.data.sources.simplear_lists import open_lists

CAPTIONS = ("caption",)


class SimpleARImages(IndexedSource):
    """The entries of all lists that `records` names, one list after the other; nothing of them is held in memory.

    root: where relative image paths begin; None = in the folder of their list. Absolute paths are taken as they are, as
    SimpleAR's own lists have them. A picture is known by its path below root (or below what all lists have in common),
    so its key stays when the tree moves. Captions become one line; of a list all are kept, an empty one is none. An
    entry that is broken, or says nothing of a caption, is skipped.
    """

    def __init__(
        self,
        root: str | os.PathLike | None,
        records: str | os.PathLike,
        *,
        image: str = "image_path",
        captions: Sequence[str] = CAPTIONS,
    ) -> None:
        self.path, self.fields = Path(records), (image, tuple(captions))
        if root is not None and not os.path.isdir(root):
            raise ValueError(f"{root}: no such folder of images")
        self.lists = open_lists(records)
        self.roots = [file.path.absolute().parent if root is None else Path(root).absolute() for _, file in self.lists]
        self.cu = [0, *accumulate(len(file) for _, file in self.lists)]
        if not len(self):
            raise ValueError(f"{self.path}: empty; expected a list of {{{image}, {captions[0]}}}")
        self._common = os.path.commonpath(self.roots)

    def __len__(self) -> int:
        return self.cu[-1]

    def __getitem__(self, index: int) -> Record | Skipped:
        """One entry by its number. It decodes up to 1023 before it; a blank line of JSONL is a Skipped here alone."""
        number = bisect.bisect_right(self.cu, index) - 1
        found = next(self._read(number, index - self.cu[number], index - self.cu[number] + 1), None)
        return found or Skipped(f"{self.lists[number][0]}, record {index - self.cu[number]}", "a blank line")

    def read(self, unit: Unit, pictures: bool = True) -> Iterator[Record | Skipped]:
        for number, (begin, end) in enumerate(zip(self.cu, self.cu[1:])):
            yield from self._read(number, max(unit.first - begin, 0), min(unit.last, end) - begin)

    def fingerprint(self) -> dict:
        lists = [[name, *file.fingerprint] for name, file in self.lists]  # by name: `random` of a mix draws from it
        return {"kind": "simplear", "records": lists, "fields": list(self.fields)}

    def describe(self) -> str:
        return f"{len(self)} images of {self.path}"

    def _read(self, number: int, first: int, last: int) -> Iterator[Record | Skipped]:
        """The entries first..last-1 of a list."""
        listed, file = self.lists[number]
        for place, value in file.read(first, last) if first < last else ():
            name = listed.removesuffix(file.path.name) + place
            try:
                yield self._record(name, self.roots[number], value)
            except ValueError as error:
                yield Skipped(name, str(error))

    def _record(self, name: str, root: Path, value: object) -> Record:
        if isinstance(value, Broken):
            raise ValueError(value.reason)
        if not isinstance(value, dict):
            raise ValueError(f"{shown(value)}; expected an object")
        image, names = self.fields
        images = [path if os.path.isabs(path) else inside(root, path) for path in strings(value.get(image), "image")]
        captions = texts(value, names)
        if not captions:
            raise ValueError(f"{names[0]} is {shown(value.get(names[0]))}; expected a string or a list of strings")
        key = stable_key(*(self._below(path) for path in images))
        return Record(key, name, tuple(map(Path, images)), distinct(filter(None, map(one_line, captions))))

    def _below(self, path: str | Path) -> str:
        """The path from the folder that all lists share; a path outside of it as it is."""
        path = posixpath.normpath(path)
        return path.removeprefix(posixpath.join(self._common, ""))
