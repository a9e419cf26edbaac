"""The manifest of a dataset: `manifest-<generation>-<hash>.json`, an ordered list of shards, written last.

A generation is never changed; appending shards makes the next one, so the samples of older ones keep their numbers.
The file is JSON in one canonical spelling with its own crc32c, so a flip of any byte is found; the hash in its name
is that of its content. `part-<worker>.json` lists what one writer of several has finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from vtrain._host import crc32c
from vtrain.data.format import Footer, Schema, ShardError, ShardInfo, read_pages
from vtrain.files import write_durably

VERSION = 1
_NAME = re.compile(r"manifest-(\d{6,})-([0-9a-f]{16})\.json")


@dataclass(frozen=True)
class Manifest:
    """One generation. dataset: the 64-bit identity that all generations share; hash: sha256 of the content (hex);
    starts: int64[shards+1], the first sample of each shard; skipped: source records that were left out as unusable."""

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

    @property
    def folder(self) -> Path:
        return self.path.parent


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
                raise ShardError(f"{path}: {key}: {body[key]}; expected {expected}")
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
        )
    except ShardError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{path}: {type(error).__name__}: {error}; expected the keys of a vtrain dataset") from None


def _shard_info(row: dict, path: Path) -> ShardInfo:
    names = [f.name for f in fields(ShardInfo)]
    if sorted(row) != sorted(names):
        raise ShardError(f"{path}: shards: an entry has {', '.join(sorted(row))}; expected {', '.join(sorted(names))}")
    info = ShardInfo(**row)
    if not info.file or info.file[0] == "." or "/" in info.file or min(info.samples, info.tokens, info.bytes) < 0:
        raise ShardError(f"{path}: shards: entry {info}; expected a plain file name and counts >= 0")
    return info


def publish(folder: Path | str, schema: Schema, shard_infos: Sequence[ShardInfo], *, skipped: int = 0) -> Path:
    """Write the next generation of a dataset and return its path; the one that is there when nothing differs.

    Every shard must lie in the folder, whole and of this schema; shards of the generation before stay first in place.
    """
    folder = Path(folder)
    shards = list(shard_infos)
    _check_shards(folder, schema, shards)
    body = {
        "format": "vtrain-dataset",
        "version": VERSION,
        "generation": 1,
        "dataset": _identity(schema, shards),
        "schema": schema.to_json(),
        "schema_hash": schema.hash,
        "shards": [asdict(s) for s in shards],
        "starts": [0, *np.cumsum([s.samples for s in shards]).tolist()][:-1],
        "samples": sum(s.samples for s in shards),
        "tokens": sum(s.tokens for s in shards),
        "skipped": skipped,
    }
    if generations(folder):
        last = load(folder)
        if list(last.shards) != shards[: len(last.shards)] or last.schema.hash != schema.hash:
            raise ShardError(
                f"{last.path}: shards: the next generation must keep its {len(last.shards)} shards and schema; "
                f"found others (a new dataset goes into a new folder)"
            )
        if len(last.shards) == len(shards) and last.skipped == skipped:
            return last.path
        body |= {"generation": last.generation + 1, "dataset": f"{last.dataset:016x}"}
    digest = hashlib.sha256(_spelling(body)).hexdigest()
    path = folder / f"manifest-{body['generation']:06d}-{digest[:16]}.json"
    _write_sealed(path, body)
    return path


def _check_shards(folder: Path, schema: Schema, shards: list[ShardInfo]) -> None:
    if not any(s.samples for s in shards):
        raise ShardError(f"{folder}: shards: {len(shards)} with no sample in them; expected at least one sample")
    for key in ("file", "uuid"):
        values = [getattr(s, key) for s in shards]
        if len(set(values)) != len(values):
            twice = next(v for v in values if values.count(v) > 1)
            raise ShardError(f"{folder}: shards: {key} {twice} is listed twice; expected each shard once")
    for info in shards:
        check_listed(folder / info.file, info, schema)


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
    return hashlib.sha256(f"{schema.hash} {shards[0].uuid}".encode()).hexdigest()[:16]


def write_part(folder: Path | str, worker: int, shard_infos: Sequence[ShardInfo], *, skipped: int = 0) -> Path:
    """`part-<worker>.json`: the shards that one of several writers has finished."""
    path = Path(folder) / f"part-{worker:05d}.json"
    _write_sealed(path, {"shards": [asdict(s) for s in shard_infos], "skipped": skipped})
    return path


def read_parts(folder: Path | str) -> tuple[list[ShardInfo], int]:
    """(shards of all part files in order of their names, total skipped)."""
    shards: list[ShardInfo] = []
    skipped = 0
    for path in sorted(Path(folder).glob("part-*.json")):
        body, _ = _read_sealed(path)
        try:
            shards += [_shard_info(row, path) for row in body["shards"]]
            skipped += int(body["skipped"])
        except (KeyError, TypeError) as error:
            raise ShardError(f"{path}: {type(error).__name__}: {error}; expected shards and skipped") from None
    return sorted(shards, key=lambda s: s.file), skipped


def _spelling(body: dict) -> bytes:
    return json.dumps(body, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _sealed(body: dict) -> bytes:
    return _spelling({**body, "crc32c": f"{crc32c(_spelling(body)):08x}"})


def _write_sealed(path: Path, body: dict) -> None:
    write_durably(path, _sealed(body))


def _read_sealed(path: Path) -> tuple[dict, str]:
    """(content without its crc, sha256 of that content); ShardError unless the bytes are exactly as written."""
    data = path.read_bytes()
    try:
        body = json.loads(data)
    except ValueError as error:
        raise ShardError(f"{path}: not JSON ({error}); the file is damaged or cut off") from None
    stored = body.pop("crc32c", None) if isinstance(body, dict) else None
    if stored is None:
        raise ShardError(f"{path}: crc32c: missing; expected a manifest that vtrain wrote")
    try:
        spelling, sealed = _spelling(body), _sealed(body)
    except ValueError as error:
        raise ShardError(f"{path}: {error}; expected finite numbers") from None
    found = f"{crc32c(spelling):08x}"
    if stored != found:
        raise ShardError(f"{path}: crc32c: the content has {found}, the file says {stored}")
    if data != sealed:
        raise ShardError(f"{path}: bytes: not spelt as vtrain writes them; the file was changed")
    return body, hashlib.sha256(spelling).hexdigest()
