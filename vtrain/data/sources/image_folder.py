"""A folder of images and a JSONL of captions: {"image": path in the folder, "caption": str or list of str} per line."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_CAPTIONS = 256  # of an image: shards number caption variants with a u8


@dataclass(frozen=True, slots=True)
class Record:
    """One image. key: u64 (never 0) of its path as the JSONL names it; line: where it stands there, from 1."""

    key: int
    path: Path
    image: str
    captions: tuple[str, ...]
    line: int


class ImageFolder:
    """The records of a JSONL file in its order: `len`, `[i]`, slices and iteration. Images are not touched.

    Keys other than image and caption are ignored, blank lines too. ValueError names file and line where a line is
    broken or an image is listed twice.
    """

    def __init__(self, root: str | os.PathLike, captions_file: str | os.PathLike) -> None:
        self.root = Path(root)
        self.captions_file = Path(captions_file)
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder of images")
        if not self.captions_file.is_file():
            raise ValueError(f"{self.captions_file}: no such captions file")
        self.records = list(self._read())
        if not self.records:
            raise ValueError(f'{self.captions_file}: empty; expected lines of {{"image": ..., "caption": ...}}')

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def _read(self) -> Iterator[Record]:
        seen: dict[int, Record] = {}
        with open(self.captions_file, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = self._record(line, number)
                other = seen.setdefault(record.key, record)
                if other is not record:
                    what = "is already listed" if other.image == record.image else f"has the key of {other.image!r}"
                    raise ValueError(
                        f"{self.captions_file}:{number}: image {record.image!r} {what} in line {other.line}; "
                        "expected every image once (several captions: a list)"
                    )
                yield record

    def _record(self, line: bytes, number: int) -> Record:
        try:
            value = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.captions_file}:{number}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{self.captions_file}:{number}: {_shown(value)}; expected an object")
        image, captions = value.get("image"), value.get("caption")
        if not isinstance(image, str) or not image:
            raise ValueError(f"{self.captions_file}:{number}: image is {_shown(image)}; expected a path")
        if isinstance(captions, str):
            captions = [captions]
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise ValueError(
                f"{self.captions_file}:{number}: caption is {_shown(captions)}; expected a string or a list of strings"
            )
        if len(captions) > MAX_CAPTIONS:
            raise ValueError(
                f"{self.captions_file}:{number}: {len(captions)} captions; expected at most {MAX_CAPTIONS}"
            )
        image = posixpath.normpath(image)
        return Record(image_key(image), self.root / image, image, tuple(captions), number)


def image_key(image: str) -> int:
    """The u64 sample key of an image, from its path alone; 0 is what batches give to padding, so never that."""
    digest = hashlib.blake2b(image.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
