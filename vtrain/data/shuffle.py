"""A dataset rewritten in a random order, in two passes over the data and the memory of a few output shards.

The first pass scatters the samples, as it meets them, to a scratch file per output shard; the second brings each of
those into order and writes it. The folder gets its name when all is in it; a run that was killed begins again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vtrain.data import exclude, manifest, sidecars
from vtrain.data.format import MAX_ROWS, SEGMENT, ShardError, ShardInfo, canonical_json
from vtrain.data.order import Order
from vtrain.data.reader import Dataset
from vtrain.data.samples import cumulative, ragged
from vtrain.data.writer import ShardWriter
from vtrain.files import copy_folder, delete, delete_folder, naming, replace, sync_folder, write
from vtrain.rng import fold

Progress = Callable[[int, int], None]
SHARD_BYTES = 256 << 20
CHUNK_SAMPLES = 1 << 14  # of one read
CHUNK_TOKENS = 1 << 23
BATCH = 4096  # samples of one append
ASSETS = ("text_tokenizer", "image_tokenizer")

# The facts of n samples: name -> (rows laid end to end, rows of each sample int64[n]).
Facts = dict[str, tuple[np.ndarray, np.ndarray]]


def shuffle(
    source: Path | str,
    out: Path | str,
    *,
    seed: int = 0,
    samples_per_shard: int = 0,
    drop_twins: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the samples of `source` that are not excluded to the new dataset `out`, in an order that the seed decides.

    samples_per_shard: 0 = shards of about 256 MB. Returns the manifest; the one that is there if `out` is this already.
    """
    if not 0 <= samples_per_shard <= MAX_ROWS:
        raise ValueError(f"samples per shard: {samples_per_shard}; expected 1..{MAX_ROWS}, or 0")
    dataset, out = Dataset(source), Path(out)
    listed = dataset.manifest
    if listed.twins and not drop_twins:
        raise ShardError(f"{listed.path}: twins {', '.join(listed.twins)}: a shuffle leaves them behind (--drop-twins)")
    kept = exclude.without(np.array([[0, len(dataset)]]), listed.excluded)
    count = int((kept[:, 1] - kept[:, 0]).sum())
    if not count:
        raise ShardError(f"{listed.path}: every sample is excluded; expected some to shuffle")
    size = samples_per_shard or max(1, len(dataset) * SHARD_BYTES // max(1, sum(s.bytes for s in listed.shards)))
    uuids = [_uuid(listed.hash, seed, size, number) for number in range(-(-count // size))]
    if out.exists():
        return _complete(out, uuids)
    order = Order(count, fold(seed, "shuffle", listed.dataset))
    steps = _Steps(progress, 2 * count)
    with _work_folder(out) as work:
        _scatter(dataset, kept, order, size, work, steps)
        infos = [_write_shard(dataset, work, number, uuid, steps) for number, uuid in enumerate(uuids)]
        for name in ASSETS:
            if (dataset.path / name).is_dir():
                copy_folder(dataset.path / name, work / name)
        files = sidecars.measure(work, ASSETS)
        manifest.next_generation(work, None, dataset.schema, infos, skipped=listed.skipped, files=files)
        sync_folder(work)
        replace(work, out)
    sync_folder(out.parent)
    return manifest.load(out).path


def _uuid(source: str, seed: int, size: int, number: int) -> bytes:
    return hashlib.sha256(canonical_json(["shuffle", source, seed, size, number])).digest()[:16]


def _complete(out: Path, uuids: list[bytes]) -> Path:
    found = manifest.load(out)
    if [info.uuid for info in found.shards[: len(uuids)]] != [uuid.hex() for uuid in uuids]:
        raise ShardError(f"{found.path}: another dataset is there; take a new folder for this shuffle")
    return found.path


class _Steps:
    """Counts for progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """An empty `.tmp-<name>` beside `out`, locked against another run; gone if the block fails."""
    work = out.with_name(f".tmp-{out.name}")
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(work):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ShardError(f"{out}: another process is shuffling into it at this moment") from None
        for path in work.iterdir():
            delete_folder(path) if path.is_dir() else delete(path)
        try:
            yield work
        except BaseException:
            delete_folder(work)
            raise
    finally:
        os.close(descriptor)


def _scatter(dataset: Dataset, kept: np.ndarray, order: Order, size: int, work: Path, steps: _Steps) -> None:
    """Append every sample, with its place in the new order, to the scratch file of its output shard."""
    rank = 0
    for numbers in _chunks(dataset, kept):
        places = order(np.arange(rank, rank + len(numbers)))
        by_shard = np.argsort(places // size, kind="stable")
        places, numbers = places[by_shard], numbers[by_shard]
        facts = {"place": (places, np.ones(len(places), dtype=np.int64)), **_read(dataset, numbers)}
        starts = {name: cumulative(counts) for name, (_, counts) in facts.items()}
        targets, first = np.unique(places // size, return_index=True)
        for target, a, b in zip(targets.tolist(), first.tolist(), [*first.tolist()[1:], len(places)]):
            frame = [
                array
                for name, (flat, counts) in facts.items()
                for array in (counts[a:b], flat[starts[name][a] : starts[name][b]])
            ]
            path = _scratch(work, target)
            with open(path, "ab") as file:
                sizes = np.array([array.nbytes for array in frame], dtype=np.int64)
                write(file, b"".join([sizes.tobytes(), *(array.tobytes() for array in frame)]), path)
        rank += len(numbers)
        steps.advance(len(numbers))


def _scratch(work: Path, number: int) -> Path:
    return work / f"scratch-{number:05d}"


def _chunks(dataset: Dataset, kept: np.ndarray) -> Iterator[np.ndarray]:
    """The samples of the ranges in their order, int64 arrays of at most CHUNK_SAMPLES and about CHUNK_TOKENS."""
    for first, last in kept.tolist():
        for start in range(first, last, CHUNK_SAMPLES):
            numbers = np.arange(start, min(last, start + CHUNK_SAMPLES))
            filled = np.cumsum(dataset.lengths(numbers), dtype=np.int64) // CHUNK_TOKENS
            yield from np.split(numbers, np.flatnonzero(np.diff(filled)) + 1)


def _read(dataset: Dataset, numbers: np.ndarray) -> Facts:
    """All that is stored of some samples."""
    schema, ones = dataset.schema, np.ones(len(numbers), dtype=np.int64)
    ids, cu = dataset.read(numbers)
    spans, segment_cu = dataset.segments(numbers)
    segments = np.empty(len(spans), dtype=SEGMENT)
    for field in SEGMENT.names:
        segments[field] = spans[field]
    runs, run_cu = dataset.loss_runs(numbers)
    facts: Facts = {
        "ids": (ids, np.diff(cu)),
        "segments": (segments, np.diff(segment_cu)),
        "runs": (runs, np.diff(run_cu)),
        "keys": (dataset.keys(numbers), ones),
    }
    if schema.labels:
        labels, label_cu = dataset.labels(numbers)
        facts["labels"] = (labels, np.diff(label_cu))
    return facts | {f"column {name}": (dataset.column(name, numbers), ones) for name in schema.columns}


def _write_shard(dataset: Dataset, work: Path, number: int, uuid: bytes, steps: _Steps) -> ShardInfo:
    facts = _gather(dataset, _scratch(work, number))
    places = facts.pop("place")[0]
    starts = {name: cumulative(counts) for name, (_, counts) in facts.items()}
    by_place = np.argsort(places)
    with ShardWriter(work / f"shard-{number:05d}.vts", dataset.schema, uuid=uuid) as writer:
        for at in range(0, len(by_place), BATCH):
            rows = by_place[at : at + BATCH]
            _append(writer, {name: _take(facts[name], starts[name], rows) for name in facts})
            steps.advance(len(rows))
    delete(_scratch(work, number))
    return writer.info


def _gather(dataset: Dataset, path: Path) -> Facts:
    """The facts of a scratch file, in the order in which they were scattered."""
    kinds = {"place": np.dtype(np.int64)} | {name: flat.dtype for name, (flat, _) in _read(dataset, _NONE).items()}
    data, at = np.fromfile(path, dtype=np.uint8), 0
    found: dict[str, tuple[list, list]] = {name: ([], []) for name in kinds}
    while at < len(data):
        sizes = data[at : at + 16 * len(kinds)].view(np.int64)
        at += sizes.nbytes
        for n, (name, dtype) in enumerate(kinds.items()):
            middle, stop = at + sizes[2 * n], at + sizes[2 * n] + sizes[2 * n + 1]
            found[name][1].append(data[at:middle].view(np.int64))
            found[name][0].append(data[middle:stop].view(dtype))
            at = stop
    return {name: (np.concatenate(flat), np.concatenate(counts)) for name, (flat, counts) in found.items()}


_NONE = np.zeros(0, dtype=np.int64)


def _take(fact: tuple[np.ndarray, np.ndarray], starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows of the samples laid end to end, their cu)."""
    flat, counts = fact
    return flat[ragged(starts[rows], counts[rows])], cumulative(counts[rows])


def _append(writer: ShardWriter, facts: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    options = {"keys": facts["keys"][0]}
    if len(facts["runs"][0]):
        options |= dict(zip(("runs", "run_offsets"), facts["runs"]))
    if "labels" in facts:
        options["labels"] = facts["labels"][0]
    columns = {name.removeprefix("column "): flat for name, (flat, _) in facts.items() if name.startswith("column ")}
    if columns:
        options["columns"] = columns
    writer.append_batch(*facts["ids"], *facts["segments"], **options)
