"""Folders of a few small shards, with twins, for the tests of what is done to whole datasets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from shard_model import VOCAB, some_samples, write_shard

from vtrain.data import manifest
from vtrain.data.format import Schema, ShardInfo, read_pages
from vtrain.data.reader import Dataset
from vtrain.data.twins import BlobWriter, FeatureWriter, TwinInfo, twin_path

SCHEMA = Schema(VOCAB)


def write_shards(folder: Path, seeds: range, schema: Schema = SCHEMA) -> list[ShardInfo]:
    """Shards shard-00000.vts, ... of 4 and more samples; the uuids tell the seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_shard(folder / f"shard-{n:05d}.vts", schema, some_samples(4 + n, seed=s), uuid=s.to_bytes(16, "big"))
        for n, s in enumerate(seeds)
    ]


def dataset(folder: Path, seeds: range, **options) -> Path:
    manifest.publish(folder, SCHEMA, write_shards(folder, seeds), **options)
    return folder


def keys(folder: Path) -> list[int]:
    found = Dataset(folder)
    return found.keys(np.arange(len(found))).tolist()


def write_twin(shard: Path, name: str, dim: int) -> TwinInfo:
    """A twin of two rows of features per segment, or of a byte for each with dim 0."""
    segments = read_pages(shard)[0].sections["SEG"].count
    if dim:
        with FeatureWriter(twin_path(shard, name), shard, name, dim=dim, dtype="f2", producer="p") as writer:
            writer.append(np.arange(2 * segments * dim, dtype=np.float32).reshape(-1, dim), np.full(segments, 2))
    else:
        with BlobWriter(twin_path(shard, name), shard, name, producer="p") as writer:
            writer.append(bytes(range(segments)), np.ones(segments, dtype=np.int64))
    return writer.info


def add_twin(folder: Path, name: str, shards: list[int], dim: int = 4) -> None:
    """A next generation with a twin of the shards of these numbers."""
    found = manifest.load(folder)
    for n in shards:
        write_twin(folder / found.shards[n].file, name, dim)
    manifest.add_twins(folder, name)
