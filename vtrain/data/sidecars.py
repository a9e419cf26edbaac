"""The small files of a dataset beside its shards (tokenizers, what was skipped, how it was made): their checksums.

A manifest lists them under `files`: name below the folder -> crc32c in hex. So a flip of any byte of them is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from vtrain._host import crc32c
from vtrain.data.format import ShardError


def measure(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """What a manifest lists of files and of all files in subfolders; names that are not there are passed over."""
    found = {}
    for name in names:
        path = folder / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found |= {file.relative_to(folder).as_posix(): _checksum(file) for file in files if file.is_file()}
    return found


def check(listed: object, name: str) -> dict[str, str]:
    """`listed` as `measure` gives it; ShardError where it names anything but files below the folder."""
    if not isinstance(listed, Mapping):
        raise ShardError(f"{name}: files: found a {type(listed).__name__}; expected names with checksums")
    for file, crc in listed.items():
        path = PurePosixPath(file)
        if path.is_absolute() or path.as_posix() != file or ".." in path.parts or not isinstance(crc, str):
            raise ShardError(f"{name}: files: {file!r}: {crc!r}; expected a name below the folder and a checksum")
    return dict(listed)


def problems(folder: Path, listed: Mapping[str, str]) -> list[str]:
    """What is wrong with the listed files, one line each."""
    found = []
    for name, crc in listed.items():
        path = folder / name
        try:
            now = _checksum(path)
        except FileNotFoundError:
            found.append(f"{path}: file: missing; the manifest lists it")
        except OSError as error:
            found.append(str(error))
        else:
            if now != crc:
                found.append(f"{path}: crc32c {now}; the manifest expects {crc}")
    return found


def _checksum(path: Path) -> str:
    return f"{crc32c(path.read_bytes()):08x}"
