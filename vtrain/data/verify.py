"""Checks every byte of shards, twins and datasets: checksums, zero padding, and that the contents are legal.

A file is passed once: blocks are summed and, while they are in the cache, looked into; the checksums of sections are
put together from those of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vtrain._host import Ids, all_zero, crc32c, crc32c_blocks, crc32c_combine, length_histogram, map_file
from vtrain.data import manifest, sidecars
from vtrain.data.container import read_schema, view
from vtrain.data.format import LENGTH_EDGES, PAGE, Footer, Kind, Schema, Section, ShardError, read_pages
from vtrain.data.manifest import Manifest
from vtrain.data.samples import Samples, check_samples
from vtrain.data.twins import read_meta

STEP = 1 << 22  # bytes that are summed before their tokens are looked into: they are still in the third cache
WINDOW = 1 << 16  # samples looked into at once, at most: what is copied for them stays small


def verify(path: Path | str, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Check every byte of a shard or twin, or of all of a folder with its manifests; the problems, one line each.

    In a folder every generation is read, and shards and twins that no manifest lists are checked too, as are the other
    files that the latest one lists.
    progress(done, total) is called with bytes.
    """
    path = Path(path)
    if not path.exists():
        return [f"{path}: file: missing"]
    problems: list[str] = []
    files = [path]
    if path.is_dir():
        listed = _verify_manifests(path, problems)
        files = sorted({*(path / name for name in listed), *path.glob("*.vts"), *path.glob("*.vtf")})
    files = [file for file in files if file.exists()]  # a missing one is a problem that its manifest has named
    total, done = sum(file.stat().st_size for file in files), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    for file in files:
        problems += _verify_file(file, advance)
    return problems


def _verify_manifests(folder: Path, problems: list[str]) -> set[str]:
    """The names of all files that any generation lists; what is wrong with manifests and parts joins `problems`."""
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
        listed |= _verify_twins(found, seen, problems)
        if path == generations[-1]:
            problems += sidecars.problems(folder, found.files)
    return listed


def _verify_twins(found: Manifest, seen: set[tuple[str, str]], problems: list[str]) -> set[str]:
    """The names of the twins that a generation lists; those that are missing or others join `problems`."""
    listed = set()
    for name, twin in found.twins.items():
        for shard, entry in zip(found.shards, twin["files"]):
            if entry is None or (entry["file"], shard.uuid) in seen:
                continue
            seen.add((entry["file"], shard.uuid))
            listed.add(entry["file"])
            try:
                manifest.check_twin(found.folder / entry["file"], name, twin, entry, shard)
            except (ShardError, OSError) as error:
                problems.append(str(error))
    return listed


def _verify_file(path: Path, advance: Callable[[int], None]) -> list[str]:
    try:
        footer, block = read_pages(path, *Kind)
        data = map_file(str(path), footer.file_bytes)
    except (ShardError, OSError) as error:
        return [str(error)]
    stored, end = view(data, footer.sections["BCRC"]), footer.sections["BCRC"].offset
    sums = np.empty(len(stored), dtype=np.uint32)
    contents = (_ShardContents if footer.kind == Kind.SHARD else _TwinContents)(data, footer, path)
    whole, step = True, max(STEP // block, 1) * block
    for first in range(0, end, step):
        last = min(end, first + step)
        blocks = slice(first // block, -(-last // block))
        sums[blocks] = crc32c_blocks(data[first:last], block)
        whole = whole and np.array_equal(sums[blocks], stored[blocks])
        if whole:  # what the numbers say matters only where they are what was written
            contents.look(last)
        advance(last - first)
    advance(footer.file_bytes - end)
    problems = [*_bad_blocks(path, data, footer, block, sums), *_bad_sections(path, data, footer, block, sums)]
    problem = None if problems else contents.finish()
    return [problem] if problem else problems


def _bad_blocks(path: Path, data: np.ndarray, footer: Footer, block: int, sums: np.ndarray) -> list[str]:
    stored, end = view(data, footer.sections["BCRC"]), footer.sections["BCRC"].offset
    problems = []
    for at in np.flatnonzero(sums != stored).tolist():
        start, stop = at * block, min(end, (at + 1) * block)
        names = [s.id for s in footer.sections.values() if s.offset < stop and s.offset + s.bytes > start]
        problems.append(
            f"{path}: block {at} (bytes {start}..{stop}, {' '.join(names)}): crc32c {sums[at]:08x}; "
            f"BCRC expects {stored[at]:08x}"
        )
    return problems


def _bad_sections(path: Path, data: np.ndarray, footer: Footer, block: int, sums: np.ndarray) -> list[str]:
    problems = []
    sections = list(footer.sections.values())
    stops = [*(s.offset for s in sections[1:]), footer.file_bytes - PAGE]
    if not all_zero(data[PAGE : sections[0].offset]):
        problems.append(f"{path}: padding before {sections[0].id}: not zero")
    for section, stop in zip(sections, stops):
        end = section.offset + section.bytes
        found = _section_crc(data, section, block, sums)
        if found != section.crc:
            problems.append(f"{path}: section {section.id}: crc32c {found:08x}; expected {section.crc:08x}")
        if not all_zero(data[end:stop]):
            problems.append(f"{path}: padding after {section.id} (bytes {end}..{stop}): not zero")
    return problems


def _section_crc(data: np.ndarray, section: Section, block: int, sums: np.ndarray) -> int:
    """The crc32c of a section from those of the blocks that lie in it and of its ends."""
    start, end = section.offset, section.offset + section.bytes
    first, last = -(-start // block), min(end // block, len(sums))
    if first >= last:
        return crc32c(data[start:end])
    crc = crc32c(data[start : first * block])
    for whole in sums[first:last].tolist():
        crc = crc32c_combine(crc, whole, block)
    return crc32c(data[last * block : end], crc)


class _Contents:
    """Looks at what a file says while its bytes are passed. problem: the first that was found, None = none so far."""

    def __init__(self, data: np.ndarray, footer: Footer, path: Path):
        self.data, self.footer, self.path, self.name = data, footer, path, str(path)
        self.problem: str | None = None
        self._facts = _Facts()
        self._opened = False

    def look(self, end: int) -> None:
        """The bytes before `end` are what was written."""
        if self.problem is None:
            self._attempt(self._look, end)

    def finish(self) -> str | None:
        """The problem, after all bytes were passed."""
        if self.problem is None:
            self._attempt(self._facts.check, self.footer, self.name)
        return self.problem

    def _attempt(self, step: Callable, *arguments: object) -> None:
        try:
            if not self._opened:
                self._open()
                self._opened = True
            step(*arguments)
        except ShardError as error:
            self.problem = str(error)


class _ShardContents(_Contents):
    _done = 0  # samples

    def _open(self) -> None:
        self.schema = read_schema(self.data, self.footer, self.name)
        _check_schema(self.schema, self.footer, self.name)
        self.views = {s.id: view(self.data, s) for s in self.footer.sections.values() if s.dtype is not None}
        for table, items in (("OFF", "TOK"), ("SEGO", "SEG"), ("RUNO", "RUN")):
            if table in self.views:
                _check_rises(self.views[table], self.footer.sections[items].count, f"{self.name}: {table}")
        bits, tokens = self.footer.store.plane, self.footer.tokens
        for id in ("TOK1", "TOK2", "LBL1", "LBL2"):
            if id in self.views and tokens * bits % 8 and self.views[id][-1] >> (tokens * bits % 8):
                raise ShardError(f"{self.name}: {id}: bits after those of {tokens} tokens; expected zeros")

    def _look(self, end: int) -> None:
        tokens = self.footer.sections["TOK"]
        passed = min(max(end - tokens.offset, 0) // tokens.dtype.itemsize, self.footer.tokens)
        last = int(np.searchsorted(self.views["OFF"], np.uint32(passed), side="right")) - 1
        while self._done < last:
            stop = min(self._done + WINDOW, last)
            window = self._window(self._done, stop)
            self._facts.add(np.diff(window.cu), check_samples(self.schema, window, self.name))
            self._done = stop

    def _window(self, first: int, last: int) -> Samples:
        """Samples first..last-1 as views of the sections."""

        def cut(table: str, items: str) -> tuple[np.ndarray, np.ndarray]:
            cu = self.views[table][first : last + 1].astype(np.int64)
            return self.views[items][cu[0] : cu[-1]], cu - cu[0]

        tokens = self.views["OFF"][first : last + 1].astype(np.int64)
        runs, run_cu = cut("RUNO", "RUN") if "RUN" in self.views else (None, None)
        return Samples(
            self._ids("TOK", tokens[0], tokens[-1]),
            tokens - tokens[0],
            *cut("SEGO", "SEG"),
            self.views["KEY"][first:last],
            runs,
            run_cu,
            self._ids("LBL", tokens[0], tokens[-1]) if "LBL" in self.views else None,
        )

    def _ids(self, stream: str, first: int, last: int) -> Ids:
        bits = self.footer.store.plane
        plane = self.views[f"{stream}{bits}"] if bits else None
        return Ids(self.views[stream], plane, bits, first, last - first)


class _TwinContents(_Contents):
    def _open(self) -> None:
        meta = read_meta(self.data, self.footer, self.name)
        offsets = view(self.data, self.footer.sections["ROWO"])
        _check_rises(offsets, self.footer.tokens, f"{self.name}: ROWO")
        for first in range(0, self.footer.samples, WINDOW):
            self._facts.add(np.diff(offsets[first : first + WINDOW + 1].astype(np.int64)))
        if "SCALE" in self.footer.sections:
            scales = view(self.data, self.footer.sections["SCALE"])
            if not (np.isfinite(scales) & (scales >= 0)).all():
                raise ShardError(f"{self.name}: SCALE: expected finite numbers >= 0")
        _check_owner(self.path, self.footer, meta.name)

    def _look(self, end: int) -> None:
        """Rows are any bytes."""


class _Facts:
    """The extremes and the histogram that a footer must have."""

    def __init__(self) -> None:
        self.histogram = np.zeros(len(LENGTH_EDGES), dtype=np.uint64)
        self.lengths: list[int] = []
        self.ids: list[int] = []

    def add(self, lengths: np.ndarray, ids: tuple[int, int] | None = None) -> None:
        """lengths: int64[n], at least one; ids: the lowest and the highest of them, None of none."""
        self.histogram += length_histogram(lengths)
        self.lengths = _extremes([*self.lengths, int(lengths.min()), int(lengths.max())])
        self.ids = _extremes([*self.ids, *(ids or ())])

    def check(self, footer: Footer, name: str) -> None:
        found = (*(self.lengths or (0, 0)), *(self.ids or (0, 0)))
        stated = (footer.min_length, footer.max_length, footer.min_id, footer.max_id)
        if found != stated:
            raise ShardError(f"{name}: footer: min and max length, min and max id {stated}; found {found}")
        if (self.histogram != footer.histogram).any():
            raise ShardError(f"{name}: footer: the length histogram is not that of the samples")


def _extremes(numbers: list[int]) -> list[int]:
    return [min(numbers), max(numbers)] if numbers else []


def _check_schema(schema: Schema, footer: Footer, name: str) -> None:
    """ShardError unless the shard has the columns and labels of its schema and no others."""
    expected = {f"COL.{column}": np.dtype(dtype) for column, dtype in schema.columns.items()}
    found = {s.id: s.dtype for s in footer.sections.values() if s.id.startswith("COL.")}
    for id in sorted(expected.keys() | found.keys()):
        if expected.get(id) != found.get(id):
            raise ShardError(f"{name}: section {id}: dtype {found.get(id)}; the schema expects {expected.get(id)}")
    if ("LBL" in footer.sections) != schema.labels:
        raise ShardError(f"{name}: section LBL: {'LBL' in footer.sections}; the schema expects {schema.labels}")


def _check_rises(offsets: np.ndarray, count: int, name: str) -> None:
    if offsets[0] != 0 or offsets[-1] != count or (offsets[1:] < offsets[:-1]).any():
        raise ShardError(f"{name}: expected numbers that rise from 0 to {count}")


def _check_owner(path: Path, footer: Footer, twin: str) -> None:
    """ShardError if the shard that is named like the twin lies beside it and is not the twin's."""
    suffix = f".{twin}.vtf"
    shard = path.with_name(path.name.removesuffix(suffix) + ".vts")
    if not path.name.endswith(suffix):
        raise ShardError(f"{path}: name: expected to end in {suffix}, as META says")
    if not shard.exists():
        return
    owner, _ = read_pages(shard)
    found = (footer.uuid.hex(), footer.samples)
    expected = (owner.uuid.hex(), owner.sections["SEG"].count)
    if found != expected:
        raise ShardError(f"{path}: footer: uuid and segments {found}; expected {expected}, those of {shard.name}")
