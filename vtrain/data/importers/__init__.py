"""Importers: what other programs tokenised, and texts with pictures, become shards. In bounded memory, resumable, by
many processes at once.

    report = import_tokens("megatron", ["corpus_text_document"], "shards/corpus", options=Options(text_vocab=50304))

Records that cannot be taken are left out, counted, and listed in skipped.jsonl with the reason.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from vtrain.data.build import Build
from vtrain.data.importers.base import Importer, Options, add_options
from vtrain.data.importers.beingvl import BeingVL
from vtrain.data.importers.megatron import Megatron
from vtrain.data.importers.nanogpt import NanoGpt
from vtrain.data.importers.records import RECORDS, Pictures
from vtrain.data.importers.simplear import SimpleAR
from vtrain.data.manifest import load
from vtrain.data.sources.file_patterns import find_files

IMPORTERS: dict[str, type[Importer]] = {
    "beingvl": BeingVL,
    "megatron": Megatron,
    "nanogpt": NanoGpt,
    "simplear": SimpleAR,
    **RECORDS,
}
SAMPLES_PER_SHARD = 100_000

__all__ = ["IMPORTERS", "Options", "Report", "add_options", "import_tokens", "open_importer"]


@dataclass(frozen=True)
class Report:
    """What the dataset holds; reasons: why records were skipped, without numbers and paths -> how many.

    complete False: units of other parts are missing; the counts are those of this part then. records: how many this
    run has read, in `seconds`; 0 = there was nothing left to do.
    """

    complete: bool
    samples: int
    tokens: int
    skipped: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    records: int = 0
    seconds: float = 0.0


def open_importer(kind: str, inputs: Sequence[Path | str], options: Options) -> Importer:
    """ValueError for an unknown kind, an option that it does not take, and inputs that it cannot read."""
    if kind not in IMPORTERS:
        raise ValueError(f"import {kind}: unknown; expected {', '.join(IMPORTERS)}")
    given = [f.name for f in fields(options) if getattr(options, f.name) is not None]
    foreign = [name for name in given if name not in IMPORTERS[kind].takes]
    if foreign:
        takes = ", ".join(IMPORTERS[kind].takes)
        raise ValueError(f"import {kind}: it does not take {foreign[0]}; it takes {takes}".replace("_", "-"))
    # sources of records know patterns themselves
    paths = [path for name in inputs for path in ([Path(name)] if kind in RECORDS else _expand(Path(name)))]
    if not paths:
        raise ValueError(f"import {kind}: no input")
    return IMPORTERS[kind](paths, options)


def _expand(path: Path) -> list[Path]:
    if path.exists() or not re.search(r"[*?\[{]", str(path)):
        return [path]
    return [found for _, found in find_files(path, ())]


def import_tokens(
    kind: str,
    inputs: Sequence[Path | str],
    out: Path | str,
    *,
    part: int = 0,
    parts: int = 1,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    id_store: str | None = None,
    options: Options | None = None,
    max_skipped: int = -1,
    progress: Callable[[int, int], object] | None = None,
    say: Callable[[str], object] | None = None,
) -> Report:
    """Make (or complete) the dataset `out`. Process `part` of `parts` makes the shards part, part + parts, ...

    Every process gets the same arguments but its part; the one that is done last publishes, and the bytes do not depend
    on `parts`. progress(records done, records of this part); say(what the input is). max_skipped: more is an error,
    -1 = any number.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples per shard: {samples_per_shard}; expected at least 1")
    source = open_importer(kind, inputs, options or Options())
    if say:
        say(source.describe())
    cuts = source.units(samples_per_shard)
    if not cuts:
        raise ValueError(f"import {kind}: no {source.noun} in {', '.join(map(str, inputs))}; expected at least one")
    build = Build(
        out,
        command="vtrain.shards import",
        identity=_identity(kind, source, samples_per_shard, id_store),
        units=len(cuts),
        assets=source.assets,
    )
    units = build.share(part, parts)
    if build.open():
        return _report(build)
    started = time.perf_counter()
    done = _make_units(source, build, {unit: cuts[unit] for unit in units}, id_store, max_skipped, progress)
    if build.finish(source.schema, max_skipped=max_skipped, records=source.noun, limit="max-skipped"):
        done = replace(_report(build), records=done.records)
    return replace(done, seconds=time.perf_counter() - started)


def _identity(kind: str, source: Importer, samples_per_shard: int, id_store: str | None) -> dict:
    return {
        "kind": kind,
        "vocab": source.schema.vocab.to_json(),
        "text_tokenizer": source.schema.text_tokenizer,
        "samples_per_shard": samples_per_shard,
        "id_store": id_store,
        **source.fingerprint(),
    }


def _make_units(
    source: Importer,
    build: Build,
    units: Mapping[int, tuple[int, ...]],
    id_store: str | None,
    max_skipped: int,
    progress: Callable[[int, int], object] | None,
) -> Report:
    """What these units hold, those made before among them. Stops when too many records were skipped."""
    kept = {unit: build.finished(unit) for unit in units}
    total = 0  # not known
    if source.total() is not None:
        total = sum(cut[-1] - cut[-2] for unit, cut in units.items() if kept[unit] is None)
    samples = tokens = records = 0
    skipped: Counter[str] = Counter()

    def advance(count: int) -> None:
        nonlocal records
        records += count
        if progress:
            progress(records, total)

    for unit, cut in units.items():
        if 0 <= max_skipped < skipped.total():
            break
        result = kept[unit] or _make_unit(source, build, unit, cut, id_store, advance)
        samples += result["shard"]["samples"]
        tokens += result["shard"]["tokens"]
        skipped += Counter(_kind(entry) for entry in result["skipped"])
    return Report(False, samples, tokens, skipped.total(), dict(skipped.most_common()), records)


def _make_unit(
    source: Importer,
    build: Build,
    unit: int,
    cut: tuple[int, ...],
    id_store: str | None,
    advance: Callable[[int], object],
) -> dict:
    """Write one shard and the pictures of its records; what the unit's note says of them."""
    options = {"id_store": id_store} if id_store else {}
    with Pictures(build.out) as pictures, build.make(unit, source.schema, pictures.write, **options) as made:
        for batch in source.read(*cut):
            s = batch.samples
            if len(s.keys):
                made.shard.append_batch(s.ids, s.cu, s.segments, s.segment_cu, keys=s.keys)
                pictures.add(s.segments, batch.pictures)
            made.skipped += batch.skipped
            advance(batch.records)
    return made.note


def _report(build: Build) -> Report:
    manifest = load(build.out)
    reasons: Counter[str] = Counter()
    if manifest.skipped and build.skipped_file.is_file():
        with open(build.skipped_file, encoding="utf-8") as file:
            reasons = Counter(_kind(json.loads(line)) for line in file)
    return Report(True, manifest.samples, manifest.tokens, manifest.skipped, dict(reasons.most_common()))


def _kind(entry: dict) -> str:
    """A reason without what differs from record to record: names of files and numbers."""
    return re.sub(r"-?\d+", "#", re.sub(r"\S*/\S*: ", "", entry["reason"]))
