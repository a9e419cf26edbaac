"""Encode pictures and captions into token shards.

    python -m vtrain.extract --cfg quickstart/extract
    torchrun --nproc-per-node 8 -m vtrain.extract --cfg my.toml run.out=shards/train

run.out becomes a dataset that needs nothing else: shards, manifest, text_tokenizer/ and image_tokenizer/. A sample is
one picture and its captions, from any of the sources that input.kind names. Ranks share the shards between them and
their number does not change a byte. A job that was killed goes on when started again; a finished one does nothing.
Records that cannot be used (no picture or several, a broken one) are left out, counted, and listed in skipped.jsonl.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vtrain.config import run_command
from vtrain.data.build import SKIPPED_FILE, Build
from vtrain.data.format import SEGMENT
from vtrain.data.reader import Dataset
from vtrain.data.samples import cumulative
from vtrain.data.schema import Modality, Role, Schema
from vtrain.data.sources import Record, Skipped, Source, Unit, open_source
from vtrain.data.sources.captions import short_and_whole, spaced
from vtrain.dist.comm import max_over_ranks, raise_together, sum_over_ranks
from vtrain.dist.mesh import set_threads, world
from vtrain.settings import ExtractSettings
from vtrain.text import TextTokenizer, load_text_tokenizer
from vtrain.visual import ImageTokenizer, load_image_tokenizer
from vtrain.visual.preprocess import load_image, square
from vtrain.vocab import Vocabulary

DESCRIBED_WIDTH = 200  # letters that are shown of the first caption and of its ids
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK_TIMEOUT_S = 30 * 24 * 3600.0  # ranks wait for the slowest only once, at the end


@dataclass(frozen=True)
class Job:
    """What is encoded and how. A unit of the source, about samples_per_shard records, becomes one shard.

    crop, filter: see vtrain.visual.preprocess.square. short_captions, caption_space: see Extract in vtrain.settings.
    computed: how the image tokenizer was loaded where that was not as usual, such as {"dtype": "bf16"}: it may change
    a code.
    """

    source: Source
    text: TextTokenizer
    image: ImageTokenizer
    resolution: int
    filter: str
    samples_per_shard: int
    batch_size: int
    crop: str = "center"
    short_captions: bool = False
    caption_space: bool = False
    computed: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.resolution <= 0 or self.resolution % self.image.downscale:
            raise ValueError(
                f"input.resolution is {self.resolution}; expected a multiple of {self.image.downscale} pixels, one code"
            )

    @cached_property
    def schema(self) -> Schema:
        return Schema(
            vocab=Vocabulary.of(text=self.text.vocab_size, visual=self.image.num_codes),
            specials={name: self.text.special_id(name) for name in self.text.specials},
            text_tokenizer=self.text.sha256,
            image_tokenizer=self.image.sha256,
            image={
                "resolution": self.resolution,
                "downscale": self.image.downscale,
                **({"filter": self.filter} if self.crop == "center" else {"crop": self.crop}),
            },
            text={"caption_space": True} if self.caption_space else {},
        )

    @cached_property
    def identity(self) -> dict:
        """All that decides which sample stands where and what its ids mean; no paths, so that a folder can move.

        What is as it was before a key existed is not in it: a dataset that was begun then goes on.
        """
        schema = self.schema.to_json()
        keys = ("vocab", "specials", "text_tokenizer", "image_tokenizer")
        return {
            **{key: schema[key] for key in keys},
            **schema["image"],
            **schema.get("text", {}),
            **({"short_captions": True} if self.short_captions else {}),
            **self.computed,
            **{f"input.{key}": value for key, value in self.source.fingerprint().items()},
            "samples_per_shard": self.samples_per_shard,
        }

    @cached_property
    def units(self) -> list[Unit]:
        return self.source.units(self.samples_per_shard)

    def build(self, out: Path) -> Build:
        assets = {"text_tokenizer": self.text, "image_tokenizer": self.image}
        return Build(out, command="vtrain.extract", identity=self.identity, units=len(self.units), assets=assets)

    def describe(self) -> str:
        side = self.resolution // self.image.downscale
        return "\n".join(
            [
                f"input: {self.source.describe()}, {len(self.units)} shards",
                f"tokens: {self.text.vocab_size} text + {self.image.num_codes} visual, "
                f"{self.resolution}x{self.resolution} pixels -> {side}x{side} codes",
                f"first: {self._first()}",
            ]
        )

    def _first(self) -> str:
        with closing(self.source.read(self.units[0])) as records:
            record = next(records, None)
        if record is None:
            return "no record"
        if isinstance(record, Skipped):
            return f"{record.name!r}, skipped: {_cut(record.reason)}"
        if not record.captions:
            return f"{record.name!r}, no caption"
        caption = self.captions(record)[0]
        return f"{record.name!r}, {_cut(repr(caption))} -> {_cut(str(self.text.encode(caption)))}"

    def captions(self, record: Record) -> list[str]:
        """The texts that are encoded, a variant each."""
        found = list(record.captions)
        if self.short_captions and len(found) == 1:
            found = short_and_whole(found[0])
        return list(map(spaced, found)) if self.caption_space else found


@dataclass(frozen=True)
class Report:
    """What the dataset holds, and how fast this run worked (images/s of all ranks; 0 = there was nothing to do)."""

    samples: int
    tokens: int
    skipped: int
    images_per_second: float = 0.0


@dataclass(frozen=True)
class _Prepared:
    """A record ready to be encoded: uint8[H,W,3] and the ids of its captions; or the reason why it cannot be."""

    record: Record | Skipped
    pixels: np.ndarray | None
    captions: tuple[np.ndarray, ...] = ()
    reason: str = ""


def extract(job: Job, out: Path, *, rank: int = 0, ranks: int = 1, threads: int = 4, max_skipped: int = -1) -> Report:
    """Make (or complete) the dataset `out`; every rank calls it. Rank r encodes the units r, r + ranks, ...

    ValueError where the folder was made with other settings, where no record is usable or, with max_skipped >= 0, more
    than that are not; the finished shards stay for the next try.
    """
    build = job.build(out)
    if _rank_zero(rank, build.open):
        return _report(out)
    started = time.perf_counter()
    done = _encode_units(job, build, rank, ranks, threads, max_skipped)
    images = int(sum_over_ranks([done])[0])
    rate = images / (time.perf_counter() - started)
    _rank_zero(rank, lambda: build.finish(job.schema, max_skipped=max_skipped, records="records"))
    return _report(out, rate)


def _rank_zero(rank: int, action: Callable[[], bool]) -> bool:
    """The answer of rank 0 on all ranks; where it fails on the user's input or the disk, all ranks fail."""
    answer, problem = False, None
    if rank == 0:
        try:
            answer = action()
        except (ValueError, OSError) as error:
            problem = str(error)
    raise_together(problem)
    return bool(max_over_ranks([float(answer)])[0])


def _report(out: Path, rate: float = 0.0) -> Report:
    manifest = Dataset(out).manifest
    return Report(manifest.samples, manifest.tokens, manifest.skipped, rate)


def _cut(text: str) -> str:
    return text if len(text) <= DESCRIBED_WIDTH else f"{text[:DESCRIBED_WIDTH]}.."


def _encode_units(job: Job, build: Build, rank: int, ranks: int, threads: int, max_skipped: int) -> int:
    """Encode the unfinished units of this rank; the number of images that were read. Stops once too many were not."""
    kept = {unit: _finished(job, build, unit) for unit in build.share(rank, ranks)}
    units = [unit for unit, result in kept.items() if result is None]
    skipped = sum(len(result["skipped"]) for result in kept.values() if result)
    records = (record for unit in units for record in chain(job.source.read(job.units[unit]), (None,)))
    done = 0
    with (
        closing(_ahead(lambda record: _prepare(job, record), records, threads, ahead=4 * job.batch_size)) as prepared,
        tqdm(total=_total(job, units), unit="image", desc="extracting", disable=rank != 0) as bar,
    ):
        for unit in units:
            shard, left_out = _encode_unit(job, build, unit, iter(prepared.__next__, None), bar.update)
            done += shard
            skipped += left_out
            if 0 <= max_skipped < skipped:
                break
    return done


def _total(job: Job, units: list[int]) -> int | None:
    """Records of these units, where units count records."""
    if job.source.total() is None:
        return None
    return sum(job.units[unit].last - job.units[unit].first for unit in units)


def _finished(job: Job, build: Build, unit: int) -> dict | None:
    """What an earlier run noted of a unit; None if it is to be done (again), as when a skipped record is usable now."""
    result = build.finished(unit)
    if result is None or not result["skipped"]:
        return result
    names = {entry["name"] for entry in result["skipped"]}
    again = (_prepare(job, record) for record in job.source.read(job.units[unit]) if record.name in names)
    return result if all(prepared.pixels is None for prepared in again) else None


def _ahead(function: Callable, items: Iterable, threads: int, ahead: int) -> Iterator:
    """function(item) for every item in order, computed by threads at most `ahead` items before they are asked for."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _prepare(job: Job, record: Record | Skipped | None) -> _Prepared | None:
    """None stands for the end of a unit."""
    if record is None:
        return None
    if isinstance(record, Skipped):
        return _Prepared(record, None, reason=record.reason)
    try:
        source = record.only_image()
        image = load_image(source, name=record.name if isinstance(source, bytes) else "")
        pixels = square(image, job.resolution, job.crop, job.filter)
    except (ValueError, OSError) as error:
        return _Prepared(record, None, reason=str(error).removeprefix(f"{record.name}: "))
    return _Prepared(record, pixels, tuple(np.array(job.text.encode(c), dtype=np.int64) for c in job.captions(record)))


def _encode_unit(
    job: Job, build: Build, unit: int, prepared: Iterator[_Prepared], progress: Callable[[int], object]
) -> tuple[int, int]:
    """Write one shard; the numbers of its samples and of the records that were left out."""
    with build.make(unit, job.schema) as made:
        writer, skipped = made.shard, made.skipped
        while window := list(islice(prepared, job.batch_size)):
            batch = [p for p in window if p.pixels is not None]
            skipped += [{"name": p.record.name, "reason": p.reason} for p in window if p.pixels is None]
            if batch:
                writer.append_batch(*_samples(job, batch), keys=np.array([p.record.key for p in batch], np.uint64))
            progress(len(window))
    return writer.info.samples, len(skipped)


def _samples(job: Job, batch: list[_Prepared]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids, offsets, segments, segment_offsets) of a batch: a text segment per caption, then the image's codes."""
    codes = _encode_pixels(job.image, np.stack([p.pixels for p in batch])) + job.schema.vocab["visual"].base
    pieces = [piece for p, grid in zip(batch, codes) for piece in (*p.captions, grid.ravel())]
    counts = np.array([len(p.captions) + 1 for p in batch])
    segment_cu = cumulative(counts)
    piece_cu = cumulative(np.array([len(piece) for piece in pieces]))
    offsets = piece_cu[segment_cu]
    segments = np.zeros(len(pieces), dtype=SEGMENT)
    segments["start"] = piece_cu[:-1] - np.repeat(offsets[:-1], counts)
    segments["modality"], segments["role"] = Modality.TEXT, Role.INPUT
    segments["variant"] = np.arange(len(pieces)) - np.repeat(segment_cu[:-1], counts)
    picture = np.zeros((), dtype=SEGMENT)
    picture["modality"], picture["role"] = Modality.IMAGE, Role.TARGET
    picture["t"], picture["h"], picture["w"] = 1, *codes.shape[1:]
    for name in ("modality", "role", "variant", "t", "h", "w"):
        segments[name][segment_cu[1:] - 1] = picture[name]
    return np.concatenate(pieces), offsets, segments, segment_cu


def _encode_pixels(image: ImageTokenizer, pixels: np.ndarray) -> np.ndarray:
    """uint8 [B,H,W,3] -> int64 [B,h,w]; the bytes travel to the device, the floats are made there."""
    on_device = torch.from_numpy(pixels).to(image.device, non_blocking=True)
    return image.encode(on_device.permute(0, 3, 1, 2).float() / 127.5 - 1.0).cpu().numpy()


def main(settings: ExtractSettings, dry_run: bool = False) -> None:
    set_threads(settings.run.threads)
    given, cut = settings.input, settings.extract
    with world(settings.run.device, timeout_s=RANK_TIMEOUT_S) as here:
        image = load_image_tokenizer(
            settings.tokenizer.image, here.device, dtype=DTYPES[cut.dtype], fold=settings.tokenizer.fold
        )
        job = Job(
            source=open_source(**given.options()),
            text=load_text_tokenizer(settings.tokenizer.text, settings.tokenizer.specials),
            image=image,
            resolution=given.resolution or image.resolution,
            filter=given.filter,
            samples_per_shard=cut.samples_per_shard,
            batch_size=cut.batch_size,
            crop=given.crop,
            short_captions=cut.short_captions,
            caption_space=cut.caption_space,
            computed=_unusual(settings),
        )
        if here.main:
            print(job.describe(), flush=True)
        if dry_run:
            return
        out = Path(settings.run.out)
        report = extract(
            job, out, rank=here.rank, ranks=here.size, threads=given.threads, max_skipped=given.max_skipped
        )
        if here.main:
            print(_closing_words(out, report), flush=True)


def _unusual(settings: ExtractSettings) -> dict[str, object]:
    """How the image tokenizer computes, where that is not as it is by default."""
    dtype = {} if settings.extract.dtype == "fp32" else {"dtype": settings.extract.dtype}
    return dtype if settings.tokenizer.fold else {**dtype, "fold": False}


def _closing_words(out: Path, report: Report) -> str:
    what = f"{out}: {report.samples} samples, {report.tokens} tokens"
    if report.skipped:
        what += f", {report.skipped} records skipped (see {out / SKIPPED_FILE})"
    return (
        f"{what}, {report.images_per_second:.1f} images/s" if report.images_per_second else f"{what}: complete already"
    )


if __name__ == "__main__":
    run_command(ExtractSettings, main)
