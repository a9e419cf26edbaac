"""Writers of datasets for processes that are made to die: `main(arguments)` as of a command (crashes.Job)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from shard_model import VOCAB, batch, dressed, some_samples

from vtrain.data import manifest
from vtrain.data.build import Build
from vtrain.data.format import Schema, read_pages
from vtrain.data.twins import BlobWriter, FeatureWriter, TwinInfo, twin_path

SCHEMA = Schema(VOCAB, columns={"quality": "<f4", "class": "u1"}, labels=True)
SAMPLES, BATCH = 6, 3


class Tokenizer:
    """As much of one as a build asks for."""

    def save(self, folder: Path) -> None:
        for name, content in {"tokenizer.model": b"any", "more/tokenizer.json": b"{}"}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def main(arguments: Sequence[str]) -> int:
    """`build OUT PART PARTS UNITS`: a dataset with twins, in small batches. `twins FOLDER`: one twin more."""
    task, folder, *numbers = arguments
    if task == "build":
        write_dataset(Path(folder), *map(int, numbers))
    else:
        add_twin(Path(folder))
    return 0


def write_dataset(out: Path, part: int = 0, parts: int = 1, units: int = 3) -> None:
    assets = {"text_tokenizer": Tokenizer()}
    build = Build(out, command="tests.writing", identity={"samples": SAMPLES}, units=units, assets=assets)
    if build.open():
        return
    for unit in build.share(part, parts):
        if build.finished(unit) is not None:
            continue
        samples = dressed(some_samples(SAMPLES, seed=unit), SCHEMA, seed=unit)
        with build.make(unit, SCHEMA, write_twins, id_store="u16+1") as made:
            for first in range(0, SAMPLES, BATCH):
                facts, options = batch(samples[first : first + BATCH], schema=SCHEMA)
                made.shard.append_batch(*facts, **options)
            made.skipped.append({"key": f"{unit}", "reason": "an example"})
    build.finish(SCHEMA)


def write_twins(shard: Path) -> dict[str, dict]:
    """Two rows of features and some bytes per segment, in two batches each."""
    clip = {"kind": "features", "dim": 3, "dtype": "i1", "producer": "tower"}
    image = {"kind": "blobs", "dim": 0, "dtype": "", "producer": "camera"}
    segments = read_pages(shard)[0].sections["SEG"].count
    with BlobWriter(twin_path(shard, "image"), shard, "image", producer="camera") as writer:
        for count in (segments // 2, segments - segments // 2):
            writer.append(bytes(range(3 * count)), np.full(count, 3))
    files = {"clip": _features(shard, "clip", "i1"), "image": writer.info}
    return {name: facts | {"file": asdict(files[name])} for name, facts in (("clip", clip), ("image", image))}


def add_twin(folder: Path) -> None:
    """Features `late` for every shard of a dataset, in a next generation."""
    for info in manifest.load(folder).shards:
        _features(folder / info.file, "late", "bf16")
    manifest.add_twins(folder, "late")


def _features(shard: Path, name: str, dtype: str) -> TwinInfo:
    segments = read_pages(shard)[0].sections["SEG"].count
    rows = np.random.default_rng(segments).normal(size=(2 * segments, 3)).astype(np.float32)
    with FeatureWriter(twin_path(shard, name), shard, name, dim=3, dtype=dtype, producer="tower") as writer:
        for first, last in ((0, segments // 2), (segments // 2, segments)):
            writer.append(rows[2 * first : 2 * last], np.full(last - first, 2))
    return writer.info
