"""What every source yields: records of pictures and their texts, or the reason why one is left out."""

from __future__ import annotations

import hashlib
import json
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vtrain.files import naming
from vtrain.text.chat import Turn

MAX_CAPTIONS = 256  # of a record: shards number caption variants with a u8
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
END_BYTES = 65536  # of both ends of a large file that its fingerprint looks at


@dataclass(frozen=True, slots=True)
class Record:
    """Pictures (a file's path, or its bytes) and texts. key: u64, never 0; name: where it stands, for messages."""

    key: int
    name: str
    images: tuple[Path | bytes, ...] = ()
    captions: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()

    def only_image(self) -> Path | bytes:
        """The picture of a record that has just one; ValueError for the others."""
        if len(self.images) != 1:
            raise ValueError(f"{self.name}: {len(self.images) or 'no'} images; expected one")
        return self.images[0]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that cannot be had, or the rest of a damaged file, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work: what lies from `first` up to `last` in file number `file`. The source knows what it counts."""

    file: int
    first: int
    last: int


class Source(Protocol):
    """Pictures with texts, in a fixed order, read piece by piece.

    `units` and `fingerprint` depend on what the source holds only: neither on the machine nor on who asks, and no path
    is in them. A mistake in how the source is named or made is a ValueError at opening; what is wrong with one record
    is a `Skipped` in its place. Without `pictures`, those inside the source are not read: records lack them.
    """

    def units(self, size: int) -> list[Unit]: ...  # of about `size` records each
    def read(self, unit: Unit, pictures: bool = True) -> Iterator[Record | Skipped]: ...
    def fingerprint(self) -> dict: ...  # fits JSON; changes where records do
    def describe(self) -> str: ...  # "1797 records of data/train.jsonl"
    def total(self) -> int | None: ...  # records with the skipped ones; None where counting means reading it all


class IndexedSource(ABC):
    """The part of a source that follows from `len` and `[i]`, which do not fail for a record: it is then a Skipped."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record | Skipped: ...

    def __iter__(self) -> Iterator[Record | Skipped]:
        return (self[i] for i in range(len(self)))

    def total(self) -> int:
        return len(self)

    def units(self, size: int) -> list[Unit]:
        return cut(0, len(self), size)

    def read(self, unit: Unit, pictures: bool = True) -> Iterator[Record | Skipped]:
        return (self[i] for i in range(unit.first, unit.last))


def cut(file: int, count: int, size: int) -> list[Unit]:
    """Units of `size` records, the last one shorter."""
    return [Unit(file, first, min(first + size, count)) for first in range(0, count, size)]


def stable_key(*parts: str | bytes) -> int:
    """The u64 key of what a record is known by; never 0, which batches give to padding."""
    known_by = b"\0".join(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts)
    return int.from_bytes(hashlib.blake2b(known_by, digest_size=8).digest(), "little") or 1


def inside(root: Path, name: str) -> Path:
    """The file `name` of a folder; ValueError where it would be outside."""
    path = posixpath.normpath(name)
    if posixpath.isabs(path) or path.split("/", 1)[0] == "..":
        raise ValueError(f"path {name!r} leads out of its folder")
    return root / path


def strings(value: object, what: str) -> tuple[str, ...]:
    """A string or a list of strings as a tuple; ValueError for anything else and for nothing."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not found or not all(isinstance(one, str) for one in found):
        kind, plural = ("path", "paths") if what == "image" else ("string", "strings")
        raise ValueError(f"{what} is {shown(value)}; expected a {kind} or a list of {plural}")
    return found


def texts(value: Mapping, names: Iterable[str]) -> tuple[str, ...]:
    """The captions under these names, those that are there, without repeats; ValueError if one is no text."""
    return distinct(text for name in names if value.get(name) is not None for text in strings(value[name], name))


def distinct(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions without repeats; ValueError where a shard could not number them."""
    found = tuple(dict.fromkeys(captions))
    if len(found) > MAX_CAPTIONS:
        raise ValueError(f"{len(found)} captions; expected at most {MAX_CAPTIONS}")
    return found


def shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."


def file_digest(path: Path) -> str:
    """sha256 of a whole file."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ends_digest(files: Iterable[tuple[str, Path]]) -> str:
    """sha256 of names, sizes, and the first and last 64 KiB of files that are too large to be read for this."""
    digest = hashlib.sha256()
    for name, path in files:
        with naming(path), open(path, "rb") as file:
            size = file.seek(0, 2)
            digest.update(json.dumps([name, size]).encode())
            for start in (0, max(0, size - END_BYTES)):
                file.seek(start)
                digest.update(file.read(END_BYTES))
    return digest.hexdigest()
