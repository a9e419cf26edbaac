"""WebDataset: tars in which the files of a record stand together and share the name up to its first dot."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from vtrain.data.sources.file_patterns import find_files
from vtrain.data.sources.record import (
    IMAGE_SUFFIXES,
    IndexedSource,
    Record,
    Skipped,
    Unit,
    distinct,
    ends_digest,
    stable_key,
    texts,
)

TARS = (".tar", ".tar.gz", ".tgz")
CAPTIONS = ("caption", "captions")
TEXT_SUFFIXES = ("txt", "caption")
NO_END = 2**62  # beyond every tar
GZIP_BYTES = 2**16  # inflated at a time; what stands this close before damage is lost with it
MAX_FILE = 1 << 30  # bytes of a file of a record: a sparse or compressed one may claim to have any number
MIN_RECORD = 2 * tarfile.BLOCKSIZE  # a header and data
PROBED = 100  # records whose size tells about how many a tar holds
# What tarfile and gzip raise at broken bytes, such as a header that tells of 2**70 bytes. No OSError of the disk.
DAMAGE = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error,
          ValueError, OverflowError, MemoryError, RecursionError)  # fmt: skip


class WebDataset:
    """The records of tars, in order. A plain tar is cut into units by bytes; a compressed one is one unit.

    image: the ending of the picture's file ("" = jpg, jpeg, png, webp, bmp). captions: keys of the `.json` file; with
    the default ones the `.txt` and `.caption` files count, too. A file that is cut off or broken ends its tar: that is
    a Skipped, and the records before it are kept.
    """

    def __init__(self, tars: str | os.PathLike, *, image: str = "", captions: Sequence[str] = CAPTIONS) -> None:
        self.pattern, self.fields = os.fspath(tars), (image, tuple(captions))
        self.files = find_files(tars, TARS)
        self.images = (image,) if image else IMAGE_SUFFIXES
        self.texts = TEXT_SUFFIXES if tuple(captions) == CAPTIONS else ()

    def total(self) -> None:
        return None

    def units(self, size: int) -> list[Unit]:
        size *= self._bytes_per_record()
        return [unit for file in range(len(self.files)) for unit in self._cut(file, size)]

    def _cut(self, file: int, size: int) -> Iterator[Unit]:
        """Units of about `size` bytes."""
        path = self.files[file][1]
        whole = path.stat().st_size
        pieces = 1 if _compressed(path) else max(1, round(whole / size))
        for piece in range(pieces):
            last = whole * (piece + 1) // pieces if piece + 1 < pieces else NO_END
            yield Unit(file, whole * piece // pieces, last)

    def _bytes_per_record(self) -> int:
        """Of the first records of the first plain tar that has some; where none has, no tar is cut."""
        for _, path in self.files:
            if not _compressed(path):
                groups = _groups(path, 0, NO_END, wanted=frozenset())
                starts = [group.start for group in islice(groups, PROBED + 1) if isinstance(group, _Group)]
                if len(starts) > 1:
                    return max(MIN_RECORD, (starts[-1] - starts[0]) // (len(starts) - 1))
        return NO_END

    def read(self, unit: Unit, pictures: bool = True, begin: int = 0) -> Iterator[Record | Skipped]:
        """begin: of a plain tar, where a record is known to begin that is not behind the unit."""
        name, path = self.files[unit.file]
        wanted = frozenset({*self.texts, "json", *(self.images if pictures else ())})
        with closing(_groups(path, unit.first, unit.last, wanted, begin)) as groups:
            for group in groups:
                if isinstance(group, _Group):
                    yield self._record(name, group)
                else:
                    yield Skipped(f"{name}:{group[0]}", group[1])

    def _record(self, tar: str, group: _Group) -> Record | Skipped:
        name = f"{tar}:{group.key}"
        files = group.files
        if group.problem:
            return Skipped(name, group.problem)
        try:
            captions = [files[ending].decode("utf-8-sig").strip() for ending in self.texts if ending in files]
            if "json" in files:
                value = json.loads(files["json"])
                captions += texts(value if isinstance(value, dict) else {}, self.fields[1])
            captions = distinct(captions)
        except (ValueError, RecursionError) as error:
            return Skipped(name, f"not what its captions should be: {error}")
        images = tuple(data for ending, data in files.items() if ending in self.images)
        return Record(stable_key(tar, group.key), name, images, captions)

    def fingerprint(self) -> dict:
        return {"kind": "webdataset", "records": ends_digest(self.files), "fields": list(self.fields)}

    def describe(self) -> str:
        return f"{len(self.files)} tars of {self.pattern}"

    def indexed(self) -> IndexedSource:
        """The same records in any order, of plain tars; finds all of them first, at about 20 us a file in a tar."""
        return _TarIndex(self)


class _TarIndex(IndexedSource):
    """Where each record of plain tars begins."""

    def __init__(self, source: WebDataset) -> None:
        self.source = source
        self._files, self._starts = array("I"), array("Q")
        self._damaged: dict[int, Skipped] = {}
        for number, (name, path) in enumerate(source.files):
            if _compressed(path):
                raise ValueError(f"{path}: a compressed tar is read in order only; expected .tar")
            for group in _groups(path, 0, NO_END, wanted=frozenset()):
                if not isinstance(group, _Group):
                    self._damaged[len(self)] = Skipped(f"{name}:{group[0]}", group[1])
                self._files.append(number)
                self._starts.append(group.start if isinstance(group, _Group) else 0)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record | Skipped:
        if index in self._damaged:
            return self._damaged[index]
        start = self._starts[index]
        return next(self.source.read(Unit(self._files[index], start, start + 1), begin=start))

    def fingerprint(self) -> dict:
        return self.source.fingerprint()

    def describe(self) -> str:
        return f"{len(self)} records in {self.source.describe()}"


@dataclass(slots=True)
class _Group:
    """The files of a record. start: where its first header stands in the tar; files: ending -> bytes, as wanted;
    problem: why one that is wanted was not read."""

    key: str
    start: int
    files: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""


def _groups(path: Path, first: int, last: int, wanted: Set[str], begin: int = 0) -> Iterator[_Group | tuple[str, str]]:
    """The records that begin at bytes first..last-1 of a tar, with the files whose endings are wanted.

    Where the tar is damaged, (key, reason) of the record that it happens in comes last: that one is not whole. Other
    data, and what belongs to records before `first`, is jumped over in a plain tar.
    """
    group = None
    try:
        with _opened(path, begin) as tar:
            at = begin
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep them all
                if member.size < 0 or member.offset < at:  # it would go round for ever
                    raise tarfile.ReadError(f"{member.size} bytes at byte {member.offset}")
                at = member.offset_data
                key, ending = _split(member.name) if member.isfile() else ("", "")
                if not key:
                    continue
                if group is None or key != group.key:
                    if group is not None and group.start >= first:
                        yield group
                    group = None
                    if member.offset >= last:
                        return
                    group = _Group(key, member.offset)
                if group.start < first or ending not in wanted:
                    continue
                if member.size > MAX_FILE:
                    group.problem = f"{ending}: {member.size} bytes; expected at most {MAX_FILE}"
                else:
                    group.files[ending] = tar.extractfile(member).read()
            _check_end(tar, path)
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if (group.start if group else begin) >= first:
            yield (group.key if group else "", f"the tar is damaged here, the rest is left out: {reason}")
        return
    if group is not None and group.start >= first:
        yield group


def _split(member: str) -> tuple[str, str]:
    """(key, ending) of a file in a tar: a.b/000.seg.PNG -> a.b/000, seg.png. No key: .hidden, and names without dot."""
    folder, slash, file = member.rpartition("/")
    stem, _, ending = file.partition(".")
    return (folder + slash + stem, ending.lower()) if stem and ending else ("", "")


@contextmanager
def _opened(path: Path, begin: int) -> Iterator[tarfile.TarFile]:
    if not _compressed(path):
        with open(path, "rb") as file:
            file.seek(begin)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield tar
        return
    with gzip.open(path) as stream:
        # As a stream: a seek back, however small, could mean to inflate all that was read once more.
        with tarfile.open(fileobj=stream, mode="r|", bufsize=GZIP_BYTES) as tar:
            yield tar


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """tarfile takes a header that is cut off or broken for the end; the true one is a block of zeros."""
    if _compressed(path):
        whole = tar.fileobj.tell() > tar.offset
    else:
        tar.fileobj.seek(tar.offset)
        whole = tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    if not whole:
        raise tarfile.ReadError(f"no end mark at byte {tar.offset}")


def _compressed(path: Path) -> bool:
    return not path.name.endswith(".tar")
