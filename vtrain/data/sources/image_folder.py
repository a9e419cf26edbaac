"""A folder of images, with or without a JSONL of captions.

A line is {"image": path in the folder or a list of paths, "caption": str or list of str}.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vtrain.data.sources.json_file import JsonFile
from vtrain.data.sources.record import (
    IMAGE_SUFFIXES,
    IndexedSource,
    Record,
    Skipped,
    file_digest,
    inside,
    shown,
    stable_key,
    strings,
    texts,
)

CAPTIONS = ("caption", "captions")


class ImageFolder(IndexedSource):
    """The records of a JSONL file in its order, or every image below a folder by name. Images are not touched.

    Other keys of a line are ignored, blank lines too. ValueError names file and line where a line is broken or an image
    is listed twice; an image outside the folder is skipped.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        captions_file: str | os.PathLike | None = None,
        *,
        image: str = "image",
        captions: Sequence[str] = CAPTIONS,
    ) -> None:
        self.root, self.fields = Path(root), (image, tuple(captions))
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder of images")
        self.lines = None if captions_file is None else JsonFile(captions_file)
        self.listing = _images_below(self.root) if self.lines is None else []
        if not len(self):
            expected = "images" if self.lines is None else f'lines of {{"{image}": ..., "{captions[0]}": ...}}'
            raise ValueError(f"{self._place}: empty; expected {expected}")
        if self.lines is not None:
            self._check()

    @property
    def _place(self) -> Path:
        return self.root if self.lines is None else self.lines.path

    def __len__(self) -> int:
        return len(self.listing) if self.lines is None else len(self.lines)

    def __getitem__(self, index: int) -> Record | Skipped:
        if self.lines is None:
            name = self.listing[index]
            return Record(stable_key(name), name, (self.root / name,))
        names, captions = self._line(index)
        try:
            images = tuple(inside(self.root, name) for name in names)
        except ValueError as error:
            return Skipped(self.lines.name(index), str(error))
        return Record(stable_key(*names), self.lines.name(index), images, captions)

    def fingerprint(self) -> dict:
        if self.lines is not None:
            return {"kind": "image_folder", "records": file_digest(self.lines.path), "fields": list(self.fields)}
        names = "\n".join(self.listing).encode("utf-8", "surrogateescape")
        return {"kind": "image_folder", "listing": hashlib.sha256(names).hexdigest()}

    def describe(self) -> str:
        return f"{len(self)} images of {self._place}"

    def _check(self) -> None:
        """Read every line once; ValueError for the first that is broken or that lists an image again."""
        keys = np.empty(len(self), dtype=np.uint64)
        for index in range(len(self)):
            try:
                keys[index] = stable_key(*self._line(index)[0])
            except ValueError as error:
                raise ValueError(f"{self.lines.path.parent / self.lines.name(index)}: {error}") from None
        order = np.argsort(keys, kind="stable")
        again = order[1:][keys[order[1:]] == keys[order[:-1]]]
        if not len(again):
            return
        second = int(again.min())
        first = int(np.flatnonzero(keys == keys[second])[0])
        raise ValueError(
            f"{self.lines.path.parent / self.lines.name(second)}: image {shown(self._line(second)[0][0])} is already "
            f"listed at {self.lines.name(first)}; expected every image once (several captions: a list)"
        )

    def _line(self, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(image names, captions) of a line."""
        value = self.lines.object(index)
        image, names = self.fields
        images = strings(value.get(image), "image")
        if not all(images):
            raise ValueError(f"image is {shown(value[image])}; expected a path or a list of paths")
        captions = texts(value, names)
        if not captions:
            raise ValueError(f"{names[0]} is {shown(value.get(names[0]))}; expected a string or a list of strings")
        return tuple(map(posixpath.normpath, images)), captions


def _images_below(root: Path) -> list[str]:
    """The images of a folder and of those in it, as sorted paths from it; hidden files and folders are left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1][1:].lower() in IMAGE_SUFFIXES:
                found.append(posixpath.normpath(posixpath.join(os.path.relpath(folder, root), name)))
    return sorted(found)
