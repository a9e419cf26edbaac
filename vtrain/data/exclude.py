"""Exclusions of a dataset: which samples nobody may read, as [first, last) ranges of sample numbers, int64[k,2].

They are chosen by number, by key, or by the damaged blocks of shards that hold them, and published as a generation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from vtrain._host import crc32c, crc32c_blocks
from vtrain.data import manifest
from vtrain.data.format import Footer, Section, ShardError, read_pages
from vtrain.data.manifest import Manifest
from vtrain.data.reader import Dataset

Progress = Callable[[int, int], None]
CHUNK = 1 << 20  # samples whose keys are looked at together: 8 MB

# Sections with a row per token, segment, loss run; the table that tells which sample a row belongs to.
_TABLE_OF = {"TOK": "OFF", "LBL": "OFF", "SEG": "SEGO", "RUN": "RUNO"}
_PLANES = {"TOK1": 1, "TOK2": 2, "LBL1": 1, "LBL2": 2}  # bits per token


def normal(ranges: np.ndarray) -> np.ndarray:
    """The same samples as ranges that rise and do not touch; empty ones vanish."""
    ranges = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    if not len(ranges):
        return ranges
    reached = np.maximum.accumulate(ranges[:, 1])
    begins = np.concatenate([[True], ranges[1:, 0] > reached[:-1]])
    ends = np.concatenate([begins[1:], [True]])
    return np.stack([ranges[begins, 0], reached[ends]], axis=1)


def union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return normal(np.concatenate([normal(a), normal(b)]))


def without(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The samples of `a` that are not in `b`."""
    a, b = normal(a), normal(b)
    edges = np.unique(np.concatenate([a.ravel(), b.ravel()]))
    inside = contains(a, edges) & ~contains(b, edges)
    change = np.diff(np.concatenate([[0], inside.astype(np.int8)]))
    return np.stack([edges[change == 1], edges[change == -1]], axis=1)


def contains(ranges: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """bool[n]: whether each sample lies in one of the (normal) ranges."""
    if not len(ranges):
        return np.zeros(len(samples), dtype=bool)
    at = np.searchsorted(ranges[:, 0], samples, side="right") - 1
    return (at >= 0) & (samples < ranges[at, 1])


def parse(text: str) -> np.ndarray:
    """Ranges of "3,17-20": numbers and spans with both ends."""
    found = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", piece)  # more digits do not fit int64
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--samples {text}: {piece!r}; expected numbers and spans such as 3,17-20")
        found.append((int(match[1]), int(match[2] or match[1]) + 1))
    return normal(np.array(found))


def read_keys(path: Path) -> np.ndarray:
    """u64[n]: the keys of a file with one a line, decimal or 0x..."""
    keys = []
    for number, line in enumerate(path.read_text("latin-1").splitlines(), 1):  # any bytes: what is no key is named
        if not line.strip():
            continue
        try:
            keys.append(np.uint64(int(line, 0)))
        except (ValueError, OverflowError):
            raise ValueError(f"{path}:{number}: {line.strip()!r}; expected a 64-bit key, decimal or 0x...") from None
    return np.array(keys, dtype=np.uint64)


def with_keys(dataset: Dataset, keys: np.ndarray, progress: Progress | None = None) -> np.ndarray:
    """All samples that have one of the keys; ValueError where a key has none."""
    keys = np.unique(keys)
    seen = np.zeros(len(keys), dtype=bool)
    found = [np.zeros(0, dtype=np.int64)]
    for first in range(0, len(dataset), CHUNK):
        stored = dataset.keys(np.arange(first, min(first + CHUNK, len(dataset))))
        at = np.minimum(np.searchsorted(keys, stored), max(len(keys) - 1, 0))
        hit = np.flatnonzero(keys[at] == stored) if len(keys) else found[0]
        seen[at[hit]] = True
        found.append(first + hit)
        if progress is not None:
            progress(first + len(stored), len(dataset))
    if not seen.all():
        missing = keys[~seen]
        raise ValueError(f"{dataset.path}: {len(missing)} keys are of no sample, the first is {int(missing[0]):#x}")
    samples = np.concatenate(found)
    return normal(np.stack([samples, samples + 1], axis=1))


def of_blocks(dataset: Manifest, shard: str, blocks: Iterable[int]) -> np.ndarray:
    """The samples of a shard that need any byte of these blocks; ShardError for a block that it does not have."""
    listed = {info.file: number for number, info in enumerate(dataset.shards)}
    if shard not in listed:
        raise ShardError(f"{dataset.path}: no shard {shard}; the first is {dataset.shards[0].file}")
    path = dataset.folder / shard
    footer, block = read_pages(path)
    count, spans = footer.sections["BCRC"].count, []
    for number in blocks:
        if not 0 <= number < count:
            raise ShardError(f"{path}: no block {number}; it has {count} of {block} bytes")
        spans.append((number * block, (number + 1) * block))
    return normal(_samples_of(path, footer, spans)) + dataset.starts[listed[shard]]


def damaged(dataset: Manifest, progress: Progress | None = None) -> tuple[np.ndarray, list[str]]:
    """(samples in blocks whose checksum is wrong, what is wrong with shards of which no block can be told)."""
    total, done = sum(info.bytes for info in dataset.shards), 0
    ranges, problems = [np.zeros((0, 2), dtype=np.int64)], []
    for info in dataset.shards:
        path = dataset.folder / info.file
        try:
            footer, block = manifest.check_listed(path, info, dataset.schema)
            blocks = _bad_blocks(path, footer, block)
        except (ShardError, OSError) as error:
            problems.append(f"{error}; the whole shard cannot be read, and none of its samples be excluded alone")
            blocks = []
        if blocks:
            ranges.append(of_blocks(dataset, info.file, blocks))
        done += info.bytes
        if progress is not None:
            progress(done, total)
    return normal(np.concatenate(ranges)), problems


def leave_out(folder: Path | str, ranges: np.ndarray) -> Path:
    """The next generation of a dataset, in which these samples are excluded, too."""
    return _revise(folder, lambda excluded: union(excluded, ranges), ranges)


def put_back(folder: Path | str, ranges: np.ndarray) -> Path:
    """The next generation of a dataset, in which these samples are not excluded."""
    return _revise(folder, lambda excluded: without(excluded, ranges), ranges)


def _revise(folder: Path | str, change: Callable[[np.ndarray], np.ndarray], ranges: np.ndarray) -> Path:
    with manifest.locked(folder):
        last = manifest.load(folder)
        if ranges.size and not 0 <= ranges.min() <= ranges.max() <= last.samples:
            raise ValueError(f"{last.path}: sample {int(ranges.max()) - 1}; the dataset has {last.samples}")
        excluded = change(last.excluded)
        if (excluded[:, 1] - excluded[:, 0]).sum() == last.samples:
            raise ValueError(f"{last.path}: all {last.samples} samples would be excluded; expected some to be left")
        return manifest.next_generation(folder, last, last.schema, last.shards, skipped=last.skipped, excluded=excluded)


def _bad_blocks(path: Path, footer: Footer, block: int) -> list[int]:
    data = np.memmap(path, dtype=np.uint8, mode="r")
    section = footer.sections["BCRC"]
    stored = _view(data, section)
    if crc32c(stored.view(np.uint8)) != section.crc:
        raise ShardError(f"{path}: section BCRC: the checksums of the blocks are damaged themselves")
    return np.flatnonzero(crc32c_blocks(data[: section.offset], block) != stored).tolist()


def _view(data: np.ndarray, section: Section) -> np.ndarray:
    return data[section.offset : section.offset + section.bytes].view(section.dtype)


def _samples_of(path: Path, footer: Footer, spans: list[tuple[int, int]]) -> np.ndarray:
    """int64[k,2] ranges in the shard: samples with a byte in any of the spans of the file.

    The tables of offsets may lie in the spans themselves: the entries that do are not used.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    touched = {id: _rows(section, spans) for id, section in footer.sections.items()}
    found = []
    for id, rows in touched.items():
        if id in _TABLE_OF or id in _PLANES:
            table = _TABLE_OF.get(id, "OFF")
            found += _owners(_view(data, footer.sections[table]), touched[table], rows)
        elif id in _TABLE_OF.values():
            found += [(first - 1, last) for first, last in rows]  # entry i ends sample i - 1 and begins sample i
        elif id == "KEY" or id.startswith("COL."):
            found += rows
    return np.clip(np.array(found, dtype=np.int64).reshape(-1, 2), 0, footer.samples)


def _rows(section: Section, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """[first, last) rows of a section with a byte in any of the spans of the file."""
    bits = _PLANES.get(section.id, 8 * section.dtype.itemsize if section.dtype else 8)
    rows = []
    for start, stop in spans:
        first, last = max(start - section.offset, 0), min(stop - section.offset, section.bytes)
        if first < last:
            rows.append((first * 8 // bits, -(-last * 8 // bits)))
    return rows


def _owners(
    offsets: np.ndarray, untrusted: list[tuple[int, int]], rows: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The samples that the rows belong to, by the entries of `offsets` that are not in `untrusted`."""
    trusted = np.ones(len(offsets), dtype=bool)
    for first, last in untrusted:
        trusted[first:last] = False
    numbers = np.flatnonzero(trusted)
    values = offsets[numbers]
    found = []
    for first, last in rows:
        before = int(np.searchsorted(values, first, side="right")) - 1
        after = int(np.searchsorted(values, last, side="left"))
        found.append((
            int(numbers[before]) if before >= 0 else 0,
            int(numbers[after]) if after < len(numbers) else len(offsets) - 1,
        ))  # fmt: skip
    return found
