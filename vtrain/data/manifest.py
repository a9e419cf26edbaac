"""The manifest of a dataset: `manifest-<generation>-<hash>.json`, an ordered list of shards, written last.

A generation is never changed; the next one may list more shards at the end, other exclusions and more twins, so the
samples of older ones keep their numbers. Publishers take turns (`locked`). The file is JSON in one canonical spelling
with its own crc32c, so a flip of any byte is found; the hash in its name is that of its content.
`part-<worker>.json` lists what one writer of several has finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import numpy as np

from vtrain._host import crc32c
from vtrain.data import sidecars
from vtrain.data.format import MAX_ROWS, Footer, Kind, Schema, ShardError, ShardInfo, canonical_json, read_pages
from vtrain.data.twins import Twin, TwinInfo, TwinMeta, twin_path
from vtrain.files import naming, write_durably

VERSION = 1
LOCK_FILE = ".lock"
_NAME = re.compile(r"manifest-(\d{6,})-([0-9a-f]{16})\.json")
_SEAL = re.compile(rb'\{\n "crc32c": "([0-9a-f]{8})",')
_INFO_NAMES = {f.name for f in fields(ShardInfo)}
_TWIN_NAME = re.compile(r"[a-z0-9_]{1,12}")
_TWIN_KEYS = ("dim", "dtype", "files", "kind", "producer")


@dataclass(frozen=True)
class Manifest:
    """One generation. dataset: the 64-bit identity that all generations share; hash: sha256 of the content (hex);
    starts: int64[shards+1], the first sample of each shard; samples: all of them, the excluded ones too; excluded:
    int64[k,2], sorted [first, last) ranges of samples that nobody may read; twins: name -> {kind, dim, dtype, producer,
    files: the fields of a TwinInfo per shard, or None}; skipped: source records that were left out as unusable, parts:
    what is counted in it of each part file; files: checksums of the other files of the folder (sidecars.py)."""

    path: Path
    generation: int
    hash: str
    dataset: int
    schema: Schema
    shards: tuple[ShardInfo, ...]
    starts: np.ndarray
    samples: int
    tokens: int
    skipped: int
    excluded: np.ndarray
    twins: Mapping[str, dict] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def excluded_samples(self) -> int:
        return int((self.excluded[:, 1] - self.excluded[:, 0]).sum())


@dataclass(frozen=True)
class Part:
    """What one of several writers has finished; file: the name of its part file."""

    file: str
    shards: tuple[ShardInfo, ...]
    skipped: int


def generations(folder: Path | str) -> list[Path]:
    """The manifests of a folder, oldest first; ShardError when two claim the same generation."""
    found: dict[int, Path] = {}
    for path in sorted(Path(folder).glob("manifest-*.json")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise ShardError(f"{path}: name: expected manifest-<generation>-<16 hex digits>.json")
        generation = int(match[1])
        if generation in found:
            raise ShardError(f"{path}: name: generation {generation} is also {found[generation].name}; expected one")
        found[generation] = path
    return [found[generation] for generation in sorted(found)]


def load(path: Path | str) -> Manifest:
    """The latest generation of a folder, or the one of a manifest file. A broken one is an error, never passed over."""
    path = Path(path)
    if path.is_dir():
        found = generations(path)
        if not found:
            raise ShardError(f"{path}: no manifest-*.json: not a dataset, or one whose writing never finished")
        path = found[-1]
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such dataset folder or manifest")
    body, digest = _read_sealed(path)
    match = _NAME.fullmatch(path.name)
    if match is None or (int(match[1]), match[2]) != (body.get("generation"), digest[:16]):
        raise ShardError(
            f"{path}: name: expected that of generation {body.get('generation')} with hash {digest[:16]}, the content"
        )
    return _parse(path, body, digest)


def latest(folder: Path | str) -> Manifest | None:
    """The latest generation of a folder; None before the first."""
    return load(folder) if generations(folder) else None


def _parse(path: Path, body: dict, digest: str) -> Manifest:
    try:
        if (body["format"], body["version"]) != ("vtrain-dataset", VERSION):
            raise ShardError(f"{path}: version: {body['format']} {body['version']}; expected vtrain-dataset {VERSION}")
        schema = Schema.from_json(body["schema"])
        shards = tuple(_shard_info(row, path) for row in body["shards"])
        starts = np.concatenate([[0], np.cumsum([s.samples for s in shards], dtype=np.int64)])
        stated = {
            "schema_hash": schema.hash,
            "starts": starts[:-1].tolist(),
            "samples": int(starts[-1]),
            "tokens": sum(s.tokens for s in shards),
        }
        for key, expected in stated.items():
            if body[key] != expected:
                raise ShardError(f"{path}: {key}: {_brief(body[key])}; expected {_brief(expected)}")
        return Manifest(
            path=path,
            generation=body["generation"],
            hash=digest,
            dataset=int(body["dataset"], 16),
            schema=schema,
            shards=shards,
            starts=starts,
            samples=stated["samples"],
            tokens=stated["tokens"],
            skipped=int(body["skipped"]),
            excluded=_ranges(body.get("excluded", []), stated["samples"], path),
            twins=_twins(body.get("twins", {}), len(shards), path),
            parts={str(name): int(count) for name, count in body.get("parts", {}).items()},
            files=sidecars.check(body.get("files", {}), str(path)),
        )
    except ShardError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ShardError(f"{path}: {type(error).__name__}: {error}; expected the keys of a vtrain dataset") from None


def _brief(value: object) -> str:
    """The start of a text: the places of 10,000 shards are no line to read."""
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _shard_info(row: dict, path: Path) -> ShardInfo:
    if row.keys() != _INFO_NAMES:
        found, expected = ", ".join(sorted(row)), ", ".join(sorted(_INFO_NAMES))
        raise ShardError(f"{path}: shards: an entry has {found}; expected {expected}")
    info = ShardInfo(**row)
    counts = (info.samples, info.tokens, info.bytes, info.footer_crc)
    legal = [*map(type, counts)] == [int] * 4 and min(counts) >= 0 and max(counts[:2]) <= MAX_ROWS
    if not _plain(info.file) or not legal:
        raise ShardError(f"{path}: shards: entry {info}; expected a plain file name and counts of 0..{MAX_ROWS}")
    return info


def _plain(name: object) -> bool:
    """Whether it names a file of the folder itself that is not a temporary one."""
    return isinstance(name, str) and bool(name) and name[0] != "." and "/" not in name


def _ranges(pairs: object, samples: int, path: Path) -> np.ndarray:
    """int64[k,2] of the exclusions in a manifest; ShardError unless they rise, apart, inside the dataset."""
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    edges = found.ravel()
    if len(edges) and (edges[0] < 0 or edges[-1] > samples or (np.diff(edges) <= 0).any()):
        raise ShardError(f"{path}: excluded: expected [first, last) ranges that rise, apart, in 0..{samples}")
    return found


def _twins(listed: Mapping[str, Mapping], shards: int, path: Path) -> dict[str, dict]:
    """The twins as plain data, one entry per shard; ShardError for a name or an entry that cannot be one."""
    found = {}
    for name, twin in listed.items():
        if not _TWIN_NAME.fullmatch(name) or tuple(sorted(twin)) != _TWIN_KEYS:
            raise ShardError(f"{path}: twins: {name!r} with {', '.join(sorted(twin))}; expected {_TWIN_NAME.pattern} "
                             f"with {', '.join(_TWIN_KEYS)}")  # fmt: skip
        types = [type(twin[key]) for key in ("kind", "dim", "dtype", "producer")]
        if types != [str, int, str, str] or twin["kind"] not in ("features", "blobs") or twin["dim"] < 0:
            raise ShardError(f"{path}: twins: {name}: {twin['kind']!r} of {twin['dim']!r} {twin['dtype']!r}; expected "
                             f"features or blobs, numbers per row, their dtype")  # fmt: skip
        files = [asdict(entry) if is_dataclass(entry) else entry for entry in twin["files"]]
        if len(files) > shards or not all(entry is None or _plain(entry.get("file")) for entry in files):
            raise ShardError(f"{path}: twins: {name}: {len(files)} files; expected a plain file name or null for each "
                             f"of {shards} shards")  # fmt: skip
        found[name] = {**twin, "files": files + [None] * (shards - len(files))}
    return found


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold the folder against every other publisher, in any process; the lock ends with the process that has it."""
    path = Path(folder) / LOCK_FILE
    with open(path, "ab") as file:
        with naming(path):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a fork has the file open, too


def publish(
    folder: Path | str,
    schema: Schema,
    shard_infos: Sequence[ShardInfo],
    *,
    skipped: int = 0,
    excluded: Sequence[tuple[int, int]] | np.ndarray | None = None,
    twins: Mapping[str, Mapping] | None = None,
) -> Path:
    """Write the next generation of a dataset and return its path; the one that is there when nothing differs.

    Every shard must lie in the folder, whole and of this schema; shards of the generation before stay first in place.
    excluded replaces the exclusions, None = as they were. twins are added: name -> {kind, dim, dtype, producer,
    files: a TwinInfo or None per shard}.
    """
    with locked(folder):
        last = latest(folder)
        return next_generation(folder, last, schema, shard_infos, skipped=skipped, excluded=excluded, twins=twins)


def append(folder: Path | str, schema: Schema, shard_infos: Sequence[ShardInfo], *, skipped: int = 0) -> Path:
    """List finished shards of the folder after those of its latest generation, however many others do the same.

    Shards that are listed already are passed over, and skipped is not counted again when all are.
    """
    with locked(folder):
        last = latest(folder)
        listed = last.shards if last else ()
        known = set(listed)
        new = [info for info in shard_infos if info not in known]
        if last and not new:
            return last.path
        return next_generation(folder, last, schema, [*listed, *new], skipped=skipped + (last.skipped if last else 0))


def add_twins(folder: Path | str, *names: str) -> Path:
    """The next generation of a dataset: with the twins of these names that lie beside its shards, all else as it is.

    A shard may be without. ShardError where none has such a twin, or where two differ in what they are.
    """
    folder = Path(folder)
    with locked(folder):
        last = load(folder)
        twins = {name: _beside(folder, name, last.shards) for name in names}
        return next_generation(folder, last, last.schema, last.shards, skipped=last.skipped, twins=twins)


def _beside(folder: Path, name: str, shards: Sequence[ShardInfo]) -> dict:
    """What a manifest lists of the twins `name` that are there."""
    paths = [twin_path(folder / info.file, name) for info in shards]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise ShardError(f"{paths[0]}: file: missing, and so for all shards; expected what a twin writer has finished")
    meta = asdict(Twin(there[0]).meta)
    files = [asdict(Twin(path).info) if path.is_file() else None for path in paths]
    return {key: value for key, value in meta.items() if key != "name"} | {"files": files}


def next_generation(
    folder: Path | str,
    last: Manifest | None,
    schema: Schema,
    shard_infos: Sequence[ShardInfo],
    *,
    skipped: int,
    excluded: Sequence[tuple[int, int]] | np.ndarray | None = None,
    twins: Mapping[str, Mapping] | None = None,
    parts: Mapping[str, int] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """`publish` for one who holds the lock and has the latest generation; parts: as in Manifest, None = as before;
    files: other files of the folder that are to be listed (sidecars.measure), those that are listed stay."""
    folder, shards = Path(folder), list(shard_infos)
    known = _kept(last, schema, shards)
    _check_shards(folder, schema, shards, known)
    samples = sum(s.samples for s in shards)
    if excluded is None:
        excluded = last.excluded if last else []
    old_twins = last.twins if last else {}
    content = {
        "schema": schema.to_json(),
        "schema_hash": schema.hash,
        "shards": [vars(s) for s in shards],
        "starts": np.cumsum([0, *(s.samples for s in shards)])[:-1].tolist(),
        "samples": samples,
        "tokens": sum(s.tokens for s in shards),
        "skipped": skipped,
    }
    optional = {
        "excluded": _ranges(excluded, samples, folder).tolist(),
        "twins": _twins({**old_twins, **(twins or {})}, len(shards), folder),
        "parts": dict(parts if parts is not None else last.parts if last else {}),
        "files": {**(files or {}), **(last.files if last else {})},
    }
    for name, twin in optional["twins"].items():
        _check_twin(folder, name, twin, shards, old_twins.get(name))
    content |= {key: value for key, value in optional.items() if value}
    if last and _facts(content) == _facts(_read_sealed(last.path)[0]):
        return last.path
    identity = f"{last.dataset:016x}" if last else _identity(schema, shards)
    return _write_generation(folder, (last.generation if last else 0) + 1, identity, content)


_OWN = ("format", "version", "generation", "dataset")  # the keys of a manifest that are not what its dataset holds


def _facts(body: Mapping) -> dict:
    """What a manifest says of its dataset; of the schema its hash is enough."""
    return {key: value for key, value in body.items() if key not in (*_OWN, "schema")}


def _write_generation(folder: Path, generation: int, identity: str, content: dict) -> Path:
    own = dict(zip(_OWN, ("vtrain-dataset", VERSION, generation, identity)))
    body = own | content
    digest = hashlib.sha256(_spelling(body)).hexdigest()
    path = folder / f"manifest-{generation:06d}-{digest[:16]}.json"
    _write_sealed(path, body)
    return path


def _kept(last: Manifest | None, schema: Schema, shards: list[ShardInfo]) -> int:
    """The number of shards that the generation before lists; ShardError unless they come first, in their order."""
    if last is None:
        return 0
    if last.schema.hash != schema.hash:
        raise ShardError(
            f"{last.path}: schema: the next generation must keep it; it differs in "
            f"{'; '.join(last.schema.differences(schema))} (another schema is another dataset)"
        )
    if list(last.shards) != shards[: len(last.shards)]:
        raise ShardError(
            f"{last.path}: shards: the next generation must keep its {len(last.shards)} shards and their order; "
            f"found others (a new dataset goes into a new folder)"
        )
    return len(last.shards)


def _check_shards(folder: Path, schema: Schema, shards: list[ShardInfo], known: int) -> None:
    """ShardError unless there are samples, every shard is there once, and those from `known` on are as told."""
    if not any(s.samples for s in shards):
        raise ShardError(f"{folder}: shards: {len(shards)} with no sample in them; expected at least one sample")
    for key in ("file", "uuid"):
        seen = set()
        for info in shards:
            value = getattr(info, key)
            if value in seen:
                raise ShardError(f"{folder}: shards: {key} {value} is listed twice; expected each shard once")
            seen.add(value)
    for info in shards[known:]:
        check_listed(folder / info.file, info, schema)


def _check_twin(folder: Path, name: str, twin: dict, shards: list[ShardInfo], old: dict | None) -> None:
    """ShardError unless the twin is what it was before, for every shard that had one, and new files are as told."""
    before = old["files"] if old else []
    facts = [key for key in _TWIN_KEYS if key != "files" and old and old[key] != twin[key]]
    if facts or any(entry is not None and entry != twin["files"][n] for n, entry in enumerate(before)):
        raise ShardError(f"{folder}: twins: {name}: the one that is there differs ({', '.join(facts) or 'files'})")
    for n, entry in enumerate(twin["files"]):
        if entry is not None and (n >= len(before) or before[n] is None):
            check_twin(folder / entry["file"], name, twin, entry, shards[n])


def check_twin(path: Path, name: str, twin: Mapping, entry: Mapping, shard: ShardInfo) -> None:
    """ShardError unless the file at `path` is the shard's twin that `entry` describes, of the twin's kind and dim."""
    if not path.is_file():
        raise ShardError(f"{path}: file: missing; the manifest lists it as the twin {name} of {shard.file}")
    footer, _ = read_pages(path, Kind.FEATURES, Kind.BLOBS)
    found = TwinInfo.of(path.name, footer)
    if asdict(found) != entry or found.uuid != shard.uuid:
        raise ShardError(f"{path}: footer: {found}; the manifest expects {entry}, uuid {shard.uuid}")
    meta = TwinMeta(name, twin["kind"], twin["dim"], twin["dtype"], twin["producer"])
    if footer.schema_hash != hashlib.sha256(canonical_json(asdict(meta))).hexdigest():
        raise ShardError(f"{path}: META: the twin says another thing of itself; the manifest expects {meta}")


def check_listed(path: Path, info: ShardInfo, schema: Schema) -> tuple[Footer, int]:
    """The pages of the shard at `path`; ShardError unless it is the one that `info` describes, and of this schema."""
    if not path.exists():
        raise ShardError(f"{path}: file: missing; the manifest lists it with {info.samples} samples")
    footer, block = read_pages(path)
    found = ShardInfo(path.name, footer.uuid.hex(), footer.samples, footer.tokens, footer.file_bytes, footer.crc)
    if found != info:
        raise ShardError(f"{path}: footer: {found}; the manifest expects {info}")
    if footer.schema_hash != schema.hash:
        raise ShardError(f"{path}: SCHEMA: sha256 {footer.schema_hash[:16]}..; the dataset has {schema.hash[:16]}..")
    if footer.max_id >= schema.vocab.size:
        raise ShardError(f"{path}: footer: ids up to {footer.max_id}; the vocabulary ends at {schema.vocab.size - 1}")
    return footer, block


def _identity(schema: Schema, shards: list[ShardInfo]) -> str:
    """Of all shards of the first generation: a merge that begins with the shards of another dataset is not that."""
    return hashlib.sha256(" ".join([schema.hash, *(s.uuid for s in shards)]).encode()).hexdigest()[:16]


def write_part(folder: Path | str, worker: int, shard_infos: Sequence[ShardInfo], *, skipped: int = 0) -> Path:
    """`part-<worker>.json`: the shards that one of several writers has finished."""
    path = Path(folder) / f"part-{worker:05d}.json"
    _write_sealed(path, {"shards": [vars(s) for s in shard_infos], "skipped": skipped})
    return path


def read_parts(folder: Path | str) -> list[Part]:
    """What the part files of a folder say, in order of their names."""
    found = []
    for path in sorted(Path(folder).glob("part-*.json")):
        body, _ = _read_sealed(path)
        try:
            shards = tuple(_shard_info(row, path) for row in body["shards"])
            found.append(Part(path.name, shards, int(body["skipped"])))
        except (KeyError, TypeError) as error:
            raise ShardError(f"{path}: {type(error).__name__}: {error}; expected shards and skipped") from None
    return found


def _spelling(body: dict) -> bytes:
    return _spell(body, 0).encode() + b"\n"


def _spell(value: object, depth: int) -> str:
    """json.dumps(value, sort_keys=True, indent=1), but rows of plain values go to the C encoder, which cannot indent:
    0.1 s for 10,000 shards, not 0.5 s."""
    if not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, allow_nan=False)
    comma = ",\n" + " " * (depth + 1)
    if not any(isinstance(v, (dict, list)) for v in (value.values() if isinstance(value, dict) else value)):
        text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(comma, ": "))[1:-1]
    elif isinstance(value, dict):
        text = comma.join(f"{json.dumps(key)}: {_spell(value[key], depth + 1)}" for key in sorted(value))
    else:
        text = comma.join(_spell(v, depth + 1) for v in value)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}{comma[1:]}{text}\n{' ' * depth}{closing}"


def _write_sealed(path: Path, body: dict) -> None:
    """The content with its crc32c as the first key, where the order of the spelling puts it."""
    content = _spelling(body)
    write_durably(path, b'{\n "crc32c": "%08x",' % crc32c(content) + content[1:])


def _read_sealed(path: Path) -> tuple[dict, str]:
    """(content without its crc, sha256 of that content); ShardError unless every byte is as it was written."""
    data = path.read_bytes()
    match = _SEAL.match(data)
    if match is None:
        raise ShardError(f"{path}: crc32c: missing at the start; expected a manifest that vtrain wrote")
    content = b"{" + data[match.end() :]
    found = b"%08x" % crc32c(content)
    if found != match[1]:
        raise ShardError(f"{path}: crc32c: the content has {found.decode()}, the file says {match[1].decode()}")
    try:
        return json.loads(content), hashlib.sha256(content).hexdigest()
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: not JSON ({error}); expected a manifest that vtrain wrote") from None
