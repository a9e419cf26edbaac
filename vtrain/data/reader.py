"""Reads token shards: memory-mapped, vectorised over index arrays, every number checked before it is used.

`Shard` is one file, `Dataset` the shards of a folder's manifest seen as one array of samples. n requested samples;
`cu` arrays are int64[n+1] starting at 0: sample i of the answer is flat[cu[i]:cu[i+1]].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from vtrain._host import crc32c, crc32c_blocks
from vtrain.data import manifest
from vtrain.data.format import PAGE, SEGMENT_SPAN, Footer, Schema, Section, ShardError, ShardInfo, read_pages
from vtrain.data.samples import Samples, check_samples, cumulative, ragged, segment_lengths, unpack_runs
from vtrain.data.writer import length_histogram


def _indices(indices: np.ndarray, size: int, name: str) -> np.ndarray:
    """int64[n] within 0..size-1; IndexError otherwise (negative numbers do not count from the end)."""
    found = np.atleast_1d(np.asarray(indices))
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise IndexError(f"{name}: indices are {found.dtype}[{found.ndim}-d]; expected a 1-d array of integers")
    if found.size and (found.min() < 0 or found.max() >= size):
        raise IndexError(f"{name}: sample {found.min()}..{found.max()} asked for; it has {size}")
    return found.astype(np.int64, copy=False)


class Shard:
    """One `*.vts` file. Opening checks both pages and the section table, and maps the file without keeping it open.

    pages: what `read_pages` has found already. IndexError for samples that are not there.
    """

    def __init__(self, path: Path | str, pages: tuple[Footer, int] | None = None):
        self.path = Path(path)
        self.footer, self.block = pages or read_pages(self.path)
        # torch closes the file after mapping it, numpy and mmap keep a descriptor: datasets may have 100k shards.
        mapped = torch.from_file(str(self.path), shared=False, size=self.footer.file_bytes, dtype=torch.uint8)
        self.data = mapped.numpy()
        self.data.flags.writeable = False
        self._views = {s.id: self._view(s) for s in self.footer.sections.values() if s.dtype is not None}

    def _view(self, section: Section) -> np.ndarray:
        return self.data[section.offset : section.offset + section.bytes].view(section.dtype)

    def __len__(self) -> int:
        return self.footer.samples

    @property
    def tokens(self) -> int:
        return self.footer.tokens

    @cached_property
    def schema(self) -> Schema:
        text = self._views["SCHEMA"].tobytes()
        try:
            schema = Schema.from_json(json.loads(text))
        except ValueError as error:
            raise ShardError(f"{self.path}: SCHEMA: {error}") from None
        if schema.hash != self.footer.schema_hash:
            raise ShardError(
                f"{self.path}: SCHEMA: sha256 {schema.hash[:16]}..; the footer expects {self.footer.schema_hash[:16]}.."
            )
        return schema

    def _bounds(self, table: str, items: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(starts int64[n], lengths int64[n]) of samples in a section, from its table of offsets."""
        offsets, size = self._views[table], self.footer.sections[items].count
        starts, stops = offsets[indices].astype(np.int64), offsets[indices + 1].astype(np.int64)
        bad = (stops < starts) | (stops > size)
        if bad.any():
            at = int(np.argmax(bad))
            raise ShardError(
                f"{self.path}: {table}: sample {indices[at]} spans {starts[at]}..{stops[at]}; "
                f"expected a rising span within the {size} items of {items}"
            )
        return starts, stops - starts

    def _gather(self, table: str, items: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts, lengths = self._bounds(table, items, _indices(indices, len(self), str(self.path)))
        return self._views[items][ragged(starts, lengths)], cumulative(lengths)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """int32[n] tokens of each sample."""
        return self._bounds("OFF", "TOK", _indices(indices, len(self), str(self.path)))[1].astype(np.int32)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32[sum of lengths], cu): the tokens of the samples, laid end to end."""
        stored, cu = self._gather("OFF", "TOK", indices)
        if len(stored) and stored.max() > self.footer.max_id:
            raise ShardError(f"{self.path}: TOK: id {stored.max()}; the footer says at most {self.footer.max_id}")
        return stored.astype(np.int32), cu

    def segments(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(segments format.SEGMENT_SPAN[m], cu): `start` counts in the sample, `length` is the number of tokens."""
        stored, cu = self._gather("SEGO", "SEG", indices)
        lengths = segment_lengths(stored["start"].astype(np.int64), cu, self.lengths(indices))
        if (lengths < 0).any():
            sample = int(np.searchsorted(cu, np.argmax(lengths < 0), side="right") - 1)
            number = np.atleast_1d(indices)[sample]
            raise ShardError(f"{self.path}: SEG: sample {number}: expected starts that rise and stay inside the sample")
        spans = np.empty(len(stored), dtype=SEGMENT_SPAN)
        for field in stored.dtype.names:
            spans[field] = stored[field]
        spans["length"] = lengths
        return spans, cu

    def keys(self, indices: np.ndarray) -> np.ndarray:
        """u64[n] sample keys."""
        return self._views["KEY"][_indices(indices, len(self), str(self.path))]

    def loss_runs(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(runs u32[r], cu) as stored (samples.unpack_runs); a sample without runs has weight 1 everywhere."""
        if "RUN" not in self._views:
            count = len(_indices(indices, len(self), str(self.path)))
            return np.zeros(0, dtype=np.uint32), np.zeros(count + 1, dtype=np.int64)
        runs, cu = self._gather("RUNO", "RUN", indices)
        totals, lengths = np.diff(cumulative(unpack_runs(runs)[0])[cu]), self.lengths(indices)
        wrong = (np.diff(cu) > 0) & (totals != lengths)
        if wrong.any():
            at = int(np.argmax(wrong))
            number = np.atleast_1d(indices)[at]
            raise ShardError(
                f"{self.path}: RUN: sample {number}: loss runs of {totals[at]} tokens; expected {lengths[at]}"
            )
        return runs, cu


class Dataset:
    """The samples of all shards of a dataset's manifest, numbered in its order.

    Open a folder (its latest generation) or one manifest file. path: the folder; hash: the manifest's; uuid64: the
    identity that all generations share. Opening reads no sample; it checks the pages of every shard.
    """

    def __init__(self, path: Path | str):
        self.manifest = manifest.load(path)
        self.path = self.manifest.folder
        self.schema = self.manifest.schema
        self.shards = [self._open(info) for info in self.manifest.shards]

    def _open(self, info: ShardInfo) -> Shard:
        path = self.path / info.file
        return Shard(path, manifest.check_listed(path, info, self.schema))

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def hash(self) -> str:
        return self.manifest.hash

    @property
    def uuid64(self) -> int:
        return self.manifest.dataset

    def _groups(self, indices: np.ndarray) -> tuple[int, list[tuple[Shard, np.ndarray, np.ndarray]]]:
        """(n, [(shard, places in the answer, samples of the shard)]), one entry per shard that is asked."""
        indices = _indices(indices, len(self), str(self.path))
        numbers = np.searchsorted(self.manifest.starts, indices, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        asked, first = np.unique(numbers[order], return_index=True)
        places = np.split(order, first[1:]) if len(asked) else []
        starts = self.manifest.starts
        return len(indices), [(self.shards[s], at, indices[at] - starts[s]) for s, at in zip(asked.tolist(), places)]

    def _column(self, method: Callable, indices: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
        count, groups = self._groups(indices)
        out = np.empty(count, dtype=dtype)
        for shard, places, local in groups:
            out[places] = method(shard, local)
        return out

    def _flat(self, method: Callable, indices: np.ndarray, dtype: np.dtype | type) -> tuple[np.ndarray, np.ndarray]:
        count, groups = self._groups(indices)
        if len(groups) == 1:
            shard, _, local = groups[0]  # a stable order: the places are 0..n-1
            return method(shard, local)
        parts = [(places, *method(shard, local)) for shard, places, local in groups]
        lengths = np.zeros(count, dtype=np.int64)
        for places, _, cu in parts:
            lengths[places] = np.diff(cu)
        cu = cumulative(lengths)
        out = np.empty(cu[-1], dtype=dtype)
        for places, flat, _ in parts:
            out[ragged(cu[places], lengths[places])] = flat
        return out, cu

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """int32[n] tokens of each sample."""
        return self._column(Shard.lengths, indices, np.int32)

    def keys(self, indices: np.ndarray) -> np.ndarray:
        """u64[n] sample keys."""
        return self._column(Shard.keys, indices, np.uint64)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32[sum of lengths], cu)."""
        return self._flat(Shard.read, indices, np.int32)

    def segments(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(segments format.SEGMENT_SPAN[m], cu)."""
        return self._flat(Shard.segments, indices, SEGMENT_SPAN)

    def loss_runs(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(runs u32[r], cu) as stored."""
        return self._flat(Shard.loss_runs, indices, np.uint32)


def verify(path: Path | str, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Check every byte of a shard, or of all shards and manifests of a folder; the problems found, one line each.

    In a folder every generation is read, and shards that no manifest lists are checked too. progress(done, total) is
    called with bytes.
    """
    path = Path(path)
    if not path.exists():
        return [f"{path}: file: missing"]
    problems: list[str] = []
    files = [path]
    if path.is_dir():
        listed = _verify_manifests(path, problems)
        files = sorted({*(path / name for name in listed), *path.glob("*.vts")})
    files = [file for file in files if file.exists()]  # a missing one is a problem that its manifest has named
    total, done = sum(file.stat().st_size for file in files), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    for file in files:
        problems += _verify_shard(file, advance)
    return problems


def _verify_manifests(folder: Path, problems: list[str]) -> set[str]:
    """The names of all shards that any generation lists; what is wrong with manifests and parts joins `problems`."""
    listed: set[str] = set()
    seen: set[tuple[str, str]] = set()  # a broken shard is named once, not once per generation
    try:
        generations = manifest.generations(folder)
        if not generations and not any(folder.glob("part-*.json")):
            problems.append(f"{folder}: no manifest-*.json: not a dataset, or one whose writing never finished")
        manifest.read_parts(folder)
    except (ShardError, OSError) as error:
        problems.append(str(error))
        generations = sorted(folder.glob("manifest-*.json"))
    for path in generations:
        try:
            found = manifest.load(path)
        except (ShardError, OSError) as error:
            problems.append(str(error))
            continue
        for info in found.shards:
            if (info.file, info.uuid) in seen:
                continue
            seen.add((info.file, info.uuid))
            listed.add(info.file)
            try:
                manifest.check_listed(folder / info.file, info, found.schema)
            except (ShardError, OSError) as error:
                problems.append(str(error))
    return listed


def _verify_shard(path: Path, advance: Callable[[int], None]) -> list[str]:
    try:
        shard = Shard(path)
    except (ShardError, OSError) as error:
        return [str(error)]
    problems = [*_bad_blocks(shard, advance), *_bad_sections(shard)]
    if problems:
        return problems  # what the numbers say is worth checking only where they are what was written
    try:
        _check_contents(shard)
    except ShardError as error:
        problems.append(str(error))
    return problems


def _bad_blocks(shard: Shard, advance: Callable[[int], None]) -> list[str]:
    problems = []
    stored, end = shard._views["BCRC"], shard.footer.sections["BCRC"].offset
    step = max(1, (64 << 20) // shard.block)
    for first in range(0, len(stored), step):
        data = shard.data[first * shard.block : min(end, (first + step) * shard.block)]
        found = crc32c_blocks(data, shard.block)
        for at in np.flatnonzero(found != stored[first : first + step]).tolist():
            start = (first + at) * shard.block
            stop = min(end, start + shard.block)
            names = [s.id for s in shard.footer.sections.values() if s.offset < stop and s.offset + s.bytes > start]
            problems.append(
                f"{shard.path}: block {first + at} (bytes {start}..{stop}, {' '.join(names)}): crc32c {found[at]:08x}; "
                f"BCRC expects {stored[first + at]:08x}"
            )
        advance(len(data))
    advance(shard.footer.file_bytes - end)
    return problems


def _bad_sections(shard: Shard) -> list[str]:
    problems = []
    sections = list(shard.footer.sections.values())
    stops = [*(s.offset for s in sections[1:]), shard.footer.file_bytes - PAGE]
    if shard.data[PAGE : sections[0].offset].any():
        problems.append(f"{shard.path}: padding before {sections[0].id}: not zero")
    for section, stop in zip(sections, stops):
        end = section.offset + section.bytes
        found = crc32c(shard.data[section.offset : end])
        if found != section.crc:
            problems.append(f"{shard.path}: section {section.id}: crc32c {found:08x}; expected {section.crc:08x}")
        if shard.data[end:stop].any():
            problems.append(f"{shard.path}: padding after {section.id} (bytes {end}..{stop}): not zero")
    return problems


def _check_contents(shard: Shard) -> None:
    """ShardError unless every sample is legal and the footer's counts are true."""
    schema, footer, views = shard.schema, shard.footer, shard._views
    for table, items in (("OFF", "TOK"), ("SEGO", "SEG"), ("RUNO", "RUN")):
        if table in views:
            offsets, count = views[table], footer.sections[items].count
            if offsets[0] != 0 or offsets[-1] != count or (offsets[1:] < offsets[:-1]).any():
                raise ShardError(f"{shard.path}: {table}: expected numbers that rise from 0 to {count}")
    lengths = np.diff(views["OFF"].astype(np.int64))
    extremes = (int(lengths.min()), int(lengths.max())) if len(lengths) else (0, 0)
    ids = views["TOK"]
    extremes += (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    stated = (footer.min_length, footer.max_length, footer.min_id, footer.max_id)
    if extremes != stated:
        raise ShardError(f"{shard.path}: footer: min and max length, min and max id {stated}; found {extremes}")
    if (length_histogram(lengths) != footer.histogram).any():
        raise ShardError(f"{shard.path}: footer: the length histogram is not that of the samples")
    chunk = 1 << 16
    for first in range(0, len(shard), chunk):
        check_samples(schema, _window(views, first, min(first + chunk, len(shard))), str(shard.path))


def _window(views: dict[str, np.ndarray], first: int, last: int) -> Samples:
    """Samples first..last-1 as views of the sections."""

    def cut(table: str, items: str) -> tuple[np.ndarray, np.ndarray]:
        cu = views[table][first : last + 1].astype(np.int64)
        return views[items][cu[0] : cu[-1]], cu - cu[0]

    runs, run_cu = cut("RUNO", "RUN") if "RUN" in views else (None, None)
    return Samples(*cut("OFF", "TOK"), *cut("SEGO", "SEG"), views["KEY"][first:last], runs, run_cu)
