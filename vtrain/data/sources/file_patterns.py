"""Files named by one string: a file, a folder, or a pattern with `*` and braces such as shard-{000..010}.tar."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_FILES = 10**7  # that braces may stand for: a typing error must not fill the memory


def find_files(pattern: str | os.PathLike, suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, path) of the files that are meant, sorted by name; names are relative to what they have in common.

    Of a folder: those with one of the suffixes, in folders below, too. ValueError where nothing is meant, or a file
    that braces spell out is not there.
    """
    pattern = os.fspath(pattern)
    if os.path.isdir(pattern):
        below = (os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names)
        found = [path for path in below if path.endswith(tuple(suffixes)) and not _hidden(path, pattern)]
        if not found:
            raise ValueError(f"{pattern}: no {' or '.join(suffixes)} file in this folder")
        return _named(found, pattern)
    found = []
    for one in [pattern] if os.path.exists(pattern) else expand_braces(pattern):
        paths = [one] if os.path.isfile(one) else glob.glob(one, recursive=True)
        if not paths:
            raise ValueError(f"{one}: no such file")
        found += [path for path in paths if os.path.isfile(path)]
    if not found:
        raise ValueError(f"{pattern}: no such file")
    return _named(found, os.path.dirname(re.split(r"[*?\[{]", pattern)[0]))


def expand_braces(pattern: str) -> Iterator[str]:
    """As a shell does: {000..010} counts, with as many digits, and {a,b} are alternatives."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    first, last, words = match.groups()
    if words is None:
        if int(last) - int(first) >= MAX_FILES:
            raise ValueError(f"{pattern}: {match[0]} stands for more than {MAX_FILES} files")
        choices = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    else:
        choices = words.split(",")
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith(".") for part in Path(path).relative_to(root).parts)


def _named(paths: Sequence[str], root: str) -> list[tuple[str, Path]]:
    return sorted({(os.path.relpath(path, root or "."), Path(path)) for path in paths})
