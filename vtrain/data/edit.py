"""Datasets out of finished shards and other datasets: manifests are written, files are linked, no sample moves.

Every function holds the folder's lock, checks first, and writes the manifest last: killed anywhere it leaves the
generation that was there, and when it is called again it finds the files that it had linked.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vtrain.data import exclude, manifest, sidecars
from vtrain.data.build import PROGRESS_FOLDER
from vtrain.data.format import Schema, ShardError, ShardInfo, shard_info
from vtrain.data.manifest import Manifest
from vtrain.data.reader import Shard
from vtrain.data.verify import verify
from vtrain.files import copy_file, copy_folder, delete, delete_folder, link, sync_folder
from vtrain.files import replace as rename

Progress = Callable[[int, int], None]
CARRIED = ("text_tokenizer", "image_tokenizer")
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}(\.[a-z0-9_]+)?")  # of a shard or a twin while it is written
COPY_CHUNK = 16 << 20


@dataclass(frozen=True)
class Built:
    """path: the manifest; adopted: shards listed now; removed: leftovers of dead writers; kept: temporary files that
    are of living writers or unknown; problems: why shards of the folder were left out."""

    path: Path
    adopted: list[str]
    removed: list[str]
    kept: list[str]
    problems: list[str]


def build(folder: Path | str, *, every_byte: bool = False, progress: Progress | None = None) -> Built:
    """Publish what finished writers left in a folder: the shards of part files, and shards that no manifest lists.

    They come after those of the latest generation, in order of their names. every_byte: check all of an adopted shard,
    not just its pages.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / PROGRESS_FOLDER).is_dir():
        raise ShardError(f"{folder}: {PROGRESS_FOLDER}/: an extract or import is not finished; start that again")
    with manifest.locked(folder):
        last = manifest.latest(folder)
        parts = manifest.read_parts(folder)
        removed, kept = _clear_dead(folder)
        listed = {info.file for info in last.shards} if last else set()
        promised = {info.file: info for part in parts for info in part.shards}
        names = sorted((promised.keys() | {path.name for path in folder.glob("*.vts")}) - listed)
        schema, infos, problems = _usable(folder, last, names, promised, every_byte, progress)
        if schema is None:
            raise ShardError("; ".join(problems) or f"{folder}: no shard and no manifest in it")
        counted = dict(last.parts) if last else {}
        skipped = (last.skipped if last else 0) + sum(part.skipped - counted.get(part.file, 0) for part in parts)
        path = manifest.next_generation(
            folder,
            last,
            schema,
            [*(last.shards if last else ()), *infos],
            skipped=skipped,
            parts=counted | {part.file: part.skipped for part in parts},
        )
        return Built(path, [info.file for info in infos], removed, kept, problems)


def _usable(
    folder: Path,
    last: Manifest | None,
    names: list[str],
    promised: Mapping[str, ShardInfo],
    every_byte: bool,
    progress: Progress | None,
) -> tuple[Schema | None, list[ShardInfo], list[str]]:
    """(the dataset's schema, the shards among `names` that it can list, what is wrong with the others)."""
    schema = last.schema if last else None
    infos, problems = [], []
    for number, name in enumerate(names):
        path = folder / name
        try:
            schema = schema or Shard(path).schema
            info = promised.get(name) or shard_info(path)
            manifest.check_listed(path, info, schema)
            found = verify(path) if every_byte else []
        except (ShardError, OSError) as error:
            found = [str(error)]
        problems += found
        if not found:
            infos.append(info)
        if progress is not None:
            progress(number + 1, len(names))
    return schema, infos, problems


def _clear_dead(folder: Path) -> tuple[list[str], list[str]]:
    """(removed, kept): temporary files of shards and twins, whose writers hold a lock on them while they live, and of
    manifests and copies, which are only written under the lock of the folder."""
    removed, kept = [], []
    for path in sorted(folder.glob(".tmp-*")):
        streamed = bool(_TEMPORARY.fullmatch(path.name))
        under_lock = path.name.startswith(".tmp-manifest-") or path.suffix in (".vts", ".vtf")
        if under_lock and not streamed:
            delete(path)
        elif not (streamed and _delete_dead(path)):
            kept.append(path.name)
            continue
        removed.append(path.name)
    return removed, kept


def _delete_dead(path: Path) -> bool:
    """Delete the file of a writer that is dead. Under its lock: a writer that starts anew looks for that."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            delete(path)
    except OSError:  # a living one has the lock or has just finished, or the file system has no locks
        return False
    return True


def append_shards(
    folder: Path | str, files: Sequence[Path | str], *, copy: bool = False, progress: Progress | None = None
) -> Path:
    """The next generation of `folder` (or its first), with the shards `files` at the end, linked into it if need be.

    Where all of them are listed already nothing is written.
    """
    files = [Path(file) for file in files]
    if not files:
        raise ValueError(f"{folder}: append: no shard is named; expected *.vts files")
    infos = [shard_info(file) for file in files]
    last = manifest.latest(folder) if Path(folder).is_dir() else None
    schema = last.schema if last else Shard(files[0]).schema
    for file, info in zip(files, infos):
        manifest.check_listed(file, info, schema)
    given = [_Given(file.parent, info, {}) for file, info in zip(files, infos)]
    return _extend(Path(folder), schema, given, copy=copy, progress=progress)


def append_datasets(
    folder: Path | str,
    sources: Sequence[Path | str],
    *,
    copy: bool = False,
    twins: bool = True,
    progress: Progress | None = None,
) -> Path:
    """The next generation of `folder` (or its first), with all shards of other datasets at the end.

    Their exclusions and skipped counts come along, and their twins unless twins is False. Where all of the shards are
    listed already nothing is written.
    """
    folder = Path(folder)
    found = [manifest.load(source) for source in sources]
    for other in found[1:]:
        _check_schema(found[0], other)
    given = [one for source in found for one in _given(source, twins)]
    samples = np.cumsum([0, *(source.samples for source in found)])
    excluded = np.concatenate([source.excluded + start for source, start in zip(found, samples)])
    return _extend(
        folder,
        found[0].schema,
        given,
        excluded=excluded,
        twins=_twin_facts(found) if twins else {},
        skipped=sum(source.skipped for source in found),
        carried=[source.folder for source in found],
        copy=copy,
        progress=progress,
    )


def merge(
    sources: Sequence[Path | str],
    out: Path | str,
    *,
    copy: bool = False,
    twins: bool = True,
    progress: Progress | None = None,
) -> Path:
    """A new dataset that lists the shards of others, in their order; the one that is there if it is that already."""
    out = Path(out)
    last = manifest.latest(out) if out.is_dir() else None
    if last:
        uuids = [info.uuid for source in sources for info in manifest.load(source).shards]
        if uuids != [info.uuid for info in last.shards]:
            raise ShardError(f"{last.path}: a dataset of other shards is there; take a new folder, or append to it")
        return last.path
    return append_datasets(out, sources, copy=copy, twins=twins, progress=progress)


@dataclass(frozen=True)
class _Given:
    """A shard of another folder; twins: name -> the entry of its file."""

    folder: Path
    info: ShardInfo
    twins: Mapping[str, dict]


def _given(source: Manifest, twins: bool) -> Iterator[_Given]:
    for number, info in enumerate(source.shards):
        entries = {name: twin["files"][number] for name, twin in source.twins.items()} if twins else {}
        yield _Given(source.folder, info, {name: entry for name, entry in entries.items() if entry is not None})


def _check_schema(first: Manifest, other: Manifest) -> None:
    if first.schema.hash != other.schema.hash:
        differences = "; ".join(first.schema.differences(other.schema))
        raise ShardError(f"{other.path}: schema: differs from that of {first.folder}: {differences}")


def _twin_facts(sources: Sequence[Manifest]) -> dict[str, dict]:
    """name -> {kind, dim, dtype, producer} of all twins; ShardError where two datasets mean different things by one."""
    found: dict[str, dict] = {}
    for source in sources:
        for name, twin in source.twins.items():
            facts = {key: value for key, value in twin.items() if key != "files"}
            if found.setdefault(name, facts) != facts:
                raise ShardError(f"{source.path}: twin {name}: {facts}; {sources[0].folder} has {found[name]} "
                                 f"(--no-twins leaves twins behind)")  # fmt: skip
    return found


def _extend(
    folder: Path,
    schema: Schema,
    given: list[_Given],
    *,
    copy: bool,
    progress: Progress | None,
    excluded: np.ndarray | None = None,
    twins: Mapping[str, Mapping] | None = None,
    skipped: int = 0,
    carried: Sequence[Path] = (),
) -> Path:
    """Link the given shards and their twins into the folder and list them. excluded counts from the first of them."""
    _check_new(folder, [], given)
    folder.mkdir(parents=True, exist_ok=True)
    with manifest.locked(folder):
        last = manifest.latest(folder)
        old = list(last.shards) if last else []
        if last and last.schema.hash != schema.hash:
            raise ShardError(f"{last.path}: schema: the shards to append differ: "
                             f"{'; '.join(last.schema.differences(schema))}")  # fmt: skip
        if last and {one.info.uuid for one in given} <= {info.uuid for info in old}:
            return last.path  # an earlier try got this far
        _check_new(folder, old, given)
        infos, entries = _link_all(folder, old, given, copy, progress)
        for name in CARRIED:
            _carry(name, carried, folder)
        sync_folder(folder)
        count = sum(info.samples for info in old)
        before = last.excluded if last else np.zeros((0, 2), dtype=np.int64)
        return manifest.next_generation(
            folder,
            last,
            schema,
            old + infos,
            skipped=skipped + (last.skipped if last else 0),
            excluded=before if excluded is None else exclude.union(before, excluded + count),
            twins=_joined_twins(last, twins or {}, entries),
            files=sidecars.measure(folder, CARRIED),
        )


def _check_new(folder: Path, old: list[ShardInfo], given: list[_Given]) -> None:
    seen = {info.uuid: folder / info.file for info in old}
    for one in given:
        path = one.folder / one.info.file
        if one.info.uuid in seen:
            raise ShardError(f"{path}: uuid {one.info.uuid}: the same shard as {seen[one.info.uuid]}; expected others")
        seen[one.info.uuid] = path


def _link_all(
    folder: Path, old: list[ShardInfo], given: list[_Given], copy: bool, progress: Progress | None
) -> tuple[list[ShardInfo], list[dict[str, dict]]]:
    """(the shards under their new names, per shard name -> twin entry)."""
    taken = {info.file for info in old}
    present = set(os.listdir(folder))
    infos, entries = [], []
    for number, one in enumerate(given):
        name = _free_name(folder, one, taken, present)
        taken.add(name)
        _link(one.folder / one.info.file, folder / name, copy, present)
        infos.append(replace(one.info, file=name))
        entries.append({})
        for twin, entry in one.twins.items():
            file = f"{Path(name).stem}.{twin}{Path(entry['file']).suffix}"
            _link(one.folder / entry["file"], folder / file, copy, present)
            entries[-1][twin] = {**entry, "file": file}
        if progress is not None:
            progress(number + 1, len(given))
    return infos, entries


def _free_name(folder: Path, one: _Given, taken: set[str], present: set[str]) -> str:
    """The shard's own name, or one with its uuid where that is another shard's."""
    stem, suffix = Path(one.info.file).stem, Path(one.info.file).suffix
    for name in (one.info.file, f"{stem}-{one.info.uuid[:8]}{suffix}", f"{stem}-{one.info.uuid}{suffix}"):
        if name not in taken and (name not in present or _is_shard(folder / name, one.info)):
            return name
    raise ShardError(f"{folder / name}: another file is there; expected a free name for {one.folder / one.info.file}")


def _is_shard(path: Path, info: ShardInfo) -> bool:
    try:
        return shard_info(path) == replace(info, file=path.name)
    except ShardError:
        return False


def _link(source: Path, target: Path, copy: bool, present: set[str]) -> None:
    """Give `source` a second name, or copy it; what an earlier try has linked stays."""
    if target.name in present:
        if source.samefile(target) or _same_bytes(source, target):
            return
        raise ShardError(f"{target}: another file is there; expected a free name for {source}")
    if copy:
        copy_file(source, target)
        return
    try:
        link(source, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(
            error.errno, f"{source}: no hard link in {target.parent}: {error.strerror} (--copy copies)"
        ) from None


def _same_bytes(a: Path, b: Path) -> bool:
    """Whether two files are equal, a chunk at a time; a copy has its name only when it is whole."""
    if a.stat().st_size != b.stat().st_size:
        return False
    with open(a, "rb") as left, open(b, "rb") as right:
        while piece := left.read(COPY_CHUNK):
            if piece != right.read(COPY_CHUNK):
                return False
    return True


def _carry(name: str, sources: Sequence[Path], folder: Path) -> None:
    """Copy a tokenizer from the first of the sources that has it, unless there is one already."""
    source = next((source / name for source in sources if (source / name).is_dir()), None)
    if source is None or (folder / name).exists():
        return
    temporary = folder / f".tmp-{name}"
    delete_folder(temporary)
    copy_folder(source, temporary)
    rename(temporary, folder / name)


def _joined_twins(last: Manifest | None, facts: Mapping[str, Mapping], entries: list[dict[str, dict]]) -> dict:
    """The twins of the next generation: those of the last with the new entries after them, and new ones."""
    old = dict(last.twins) if last else {}
    count = len(last.shards) if last else 0
    found = {}
    for name, twin in (dict(facts) | old).items():
        files = [*old.get(name, {"files": [None] * count})["files"], *(entry.get(name) for entry in entries)]
        if name in facts and name in old and dict(facts[name]) != {k: v for k, v in twin.items() if k != "files"}:
            raise ShardError(
                f"{last.path}: twin {name}: differs from {dict(facts[name])} (--no-twins leaves it behind)"
            )
        found[name] = {**twin, "files": files}
    return found
