"""Encode a folder of images and captions into token shards.

    python -m vtrain.extract --cfg quickstart/extract
    torchrun --nproc-per-node 8 -m vtrain.extract --cfg my.toml run.out=shards/train

run.out becomes a dataset that needs nothing else: shards, manifest, text_tokenizer/ and image_tokenizer/. Ranks share
the shards between them and their number does not change a byte. A job that was killed goes on when started again; a
finished one does nothing. Images that cannot be read are left out, counted, and listed in skipped.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vtrain.config import run_command
from vtrain.data.format import SEGMENT, Modality, Role, Schema, ShardInfo, canonical_json, shard_info
from vtrain.data.manifest import generations, publish
from vtrain.data.reader import Dataset, verify
from vtrain.data.samples import cumulative
from vtrain.data.sources.image_folder import ImageFolder, Record
from vtrain.data.writer import ShardWriter
from vtrain.dist.comm import max_over_ranks, raise_together, sum_over_ranks
from vtrain.dist.mesh import set_threads, world
from vtrain.files import clear_leftovers, delete, delete_folder, write_durably
from vtrain.settings import ExtractSettings
from vtrain.text import TextTokenizer, load_text_tokenizer
from vtrain.visual import ImageTokenizer, load_image_tokenizer
from vtrain.visual.preprocess import center_crop_resize, load_image
from vtrain.vocab import Vocabulary

IDENTITY_FILE = "extract.json"  # what the folder is made of: a run with other settings is refused
SKIPPED_FILE = "skipped.jsonl"
DESCRIBED_WIDTH = 200  # letters that are shown of the first caption and of its ids
PROGRESS_FOLDER = "progress"  # a file per finished shard, gone when the manifest is there
RANK_TIMEOUT_S = 30 * 24 * 3600.0  # ranks wait for the slowest only once, at the end


@dataclass(frozen=True)
class Job:
    """What is encoded and how. Unit u, one shard, is the records u*samples_per_shard and following."""

    source: ImageFolder
    text: TextTokenizer
    image: ImageTokenizer
    resolution: int
    filter: str
    samples_per_shard: int
    batch_size: int

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
            image={"resolution": self.resolution, "downscale": self.image.downscale, "filter": self.filter},
        )

    @cached_property
    def identity(self) -> dict:
        """All that decides which sample stands where and what its ids mean; no paths, so that a folder can move."""
        with open(self.source.captions_file, "rb") as file:
            captions = hashlib.file_digest(file, "sha256").hexdigest()
        schema = self.schema.to_json()
        keys = ("vocab", "specials", "text_tokenizer", "image_tokenizer")
        return {
            **{key: schema[key] for key in keys},
            **schema["image"],
            "samples_per_shard": self.samples_per_shard,
            "captions_file": captions,
        }

    @property
    def units(self) -> int:
        return -(-len(self.source) // self.samples_per_shard)

    def records(self, unit: int) -> list[Record]:
        return self.source[unit * self.samples_per_shard : (unit + 1) * self.samples_per_shard]

    def uuid(self, unit: int) -> bytes:
        return hashlib.sha256(canonical_json([self.identity, unit])).digest()[:16]

    def describe(self) -> str:
        side = self.resolution // self.image.downscale
        first = self.source[0]
        ids = self.text.encode(first.captions[0])
        return "\n".join(
            [
                f"input: {len(self.source)} images of {self.source.captions_file}, {self.units} shards",
                f"tokens: {self.text.vocab_size} text + {self.image.num_codes} visual, "
                f"{self.resolution}x{self.resolution} pixels -> {side}x{side} codes",
                f"first: {first.image!r}, {_cut(repr(first.captions[0]))} -> {_cut(str(ids))}",
            ]
        )


@dataclass(frozen=True)
class Report:
    """What the dataset holds, and how fast this run worked (images/s of all ranks; 0 = there was nothing to do)."""

    samples: int
    tokens: int
    skipped: int
    images_per_second: float = 0.0


@dataclass(frozen=True)
class _Prepared:
    """A record ready to be encoded: uint8[H,W,3] and the ids of its captions; or the reason why there is no picture."""

    record: Record
    pixels: np.ndarray | None
    captions: tuple[np.ndarray, ...] = ()
    reason: str = ""


def extract(job: Job, out: Path, *, rank: int = 0, ranks: int = 1, threads: int = 4, max_skipped: int = -1) -> Report:
    """Make (or complete) the dataset `out`; every rank calls it. Rank r encodes the units r, r + ranks, ...

    ValueError where the folder was made with other settings, where all images are unreadable or, with max_skipped >= 0,
    more than that; the finished shards stay for the next try.
    """
    if _rank_zero(rank, lambda: _open_folder(job, out)):
        return _report(out)
    started = time.perf_counter()
    done = _encode_units(job, out, rank, ranks, threads, max_skipped)
    images = int(sum_over_ranks([done])[0])
    rate = images / (time.perf_counter() - started)
    _rank_zero(rank, lambda: _finish(job, out, max_skipped))
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


def _open_folder(job: Job, out: Path) -> bool:
    """Lay the folder out, or check that it is this job's. True = there is nothing left to do."""
    identity_file = out / IDENTITY_FILE
    if identity_file.is_file():
        _check_identity(identity_file, job.identity)
    elif out.exists() and (not out.is_dir() or generations(out) or any(out.glob("*.vts"))):
        raise ValueError(f"{out}: not made by vtrain.extract (no {IDENTITY_FILE}); take another run.out")
    if out.is_dir() and generations(out):
        delete_folder(out / PROGRESS_FOLDER)
        clear_leftovers(out)
        return True
    (out / PROGRESS_FOLDER).mkdir(parents=True, exist_ok=True)
    job.text.save(out / "text_tokenizer")
    job.image.save(out / "image_tokenizer")
    write_durably(identity_file, (json.dumps(job.identity, indent=1, sort_keys=True) + "\n").encode())
    return False


def _check_identity(path: Path, identity: dict) -> None:
    try:
        found = json.loads(path.read_bytes())
        differences = [
            f"{key} {_shown(found.get(key))}, now {_shown(identity.get(key))}"
            for key in sorted(found.keys() | identity.keys())
            if found.get(key) != identity.get(key)
        ]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not what vtrain.extract writes: {error}") from None
    if differences:
        raise ValueError(f"{path}: the dataset was begun with other settings: {'; '.join(differences)}")


def _cut(text: str) -> str:
    return text if len(text) <= DESCRIBED_WIDTH else f"{text[:DESCRIBED_WIDTH]}.."


def _shown(value: object) -> str:
    text = json.dumps(value)
    return f"{text[:17]}.." if isinstance(value, str) and len(text) > 40 else text


def _encode_units(job: Job, out: Path, rank: int, ranks: int, threads: int, max_skipped: int) -> int:
    """Encode the unfinished units of this rank; the number of images that were read. Stops once too many were not."""
    kept = {unit: _finished(job, out, unit) for unit in range(rank, job.units, ranks)}
    units = [unit for unit, result in kept.items() if result is None]
    skipped = sum(len(result["skipped"]) for result in kept.values() if result)
    records = (record for unit in units for record in job.records(unit))
    total = sum(len(job.records(unit)) for unit in units)
    done = 0
    with (
        closing(_ahead(lambda record: _prepare(job, record), records, threads, ahead=4 * job.batch_size)) as prepared,
        tqdm(total=total, unit="image", desc="extracting", disable=rank != 0) as bar,
    ):
        for unit in units:
            samples = islice(prepared, len(job.records(unit)))
            result = _encode_unit(job, out, unit, samples, bar.update)
            write_durably(_progress_file(out, unit), canonical_json(result))
            done += result["shard"]["samples"]
            skipped += len(result["skipped"])
            if 0 <= max_skipped < skipped:
                break
    return done


def _progress_file(out: Path, unit: int) -> Path:
    return out / PROGRESS_FOLDER / f"unit-{unit:05d}.json"


def _finished(job: Job, out: Path, unit: int) -> dict | None:
    """What an earlier run noted of a unit; None if the unit has to be done (again).

    Every byte of the shard is checked; a unit of which a skipped image can be read by now is done again.
    """
    try:
        result = json.loads(_progress_file(out, unit).read_bytes())
        path = out / result["shard"]["file"]
        whole = not verify(path) and asdict(shard_info(path)) == result["shard"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    lines = {entry["line"] for entry in result["skipped"]}
    retry = (record for record in job.records(unit) if record.line in lines)
    return result if whole and all(_prepare(job, record).pixels is None for record in retry) else None


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


def _prepare(job: Job, record: Record) -> _Prepared:
    try:
        pixels = center_crop_resize(load_image(record.path), job.resolution, job.filter)
    except (ValueError, OSError) as error:
        return _Prepared(record, None, reason=str(error).removeprefix(f"{record.path}: "))
    return _Prepared(record, pixels, tuple(np.array(job.text.encode(c), dtype=np.int64) for c in record.captions))


def _encode_unit(
    job: Job, out: Path, unit: int, prepared: Iterator[_Prepared], progress: Callable[[int], object]
) -> dict:
    """Write one shard; {"shard": its ShardInfo, "skipped": [...]}, ready for JSON."""
    skipped: list[dict] = []
    with ShardWriter(out / f"shard-{unit:05d}.vts", job.schema, uuid=job.uuid(unit)) as writer:
        while window := list(islice(prepared, job.batch_size)):
            batch = [p for p in window if p.pixels is not None]
            skipped += [_skip_entry(p) for p in window if p.pixels is None]
            if batch:
                writer.append_batch(*_samples(job, batch), keys=np.array([p.record.key for p in batch], np.uint64))
            progress(len(window))
    return {"shard": asdict(writer.info), "skipped": skipped}


def _skip_entry(p: _Prepared) -> dict:
    return {"key": f"{p.record.key:#018x}", "image": p.record.image, "line": p.record.line, "reason": p.reason}


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
    for field in ("modality", "role", "variant", "t", "h", "w"):
        segments[field][segment_cu[1:] - 1] = picture[field]
    return np.concatenate(pieces), offsets, segments, segment_cu


def _encode_pixels(image: ImageTokenizer, pixels: np.ndarray) -> np.ndarray:
    """uint8 [B,H,W,3] -> int64 [B,h,w]; the bytes travel to the device, the floats are made there."""
    device = next(image.model.parameters()).device
    on_device = torch.from_numpy(pixels).to(device, non_blocking=True)
    return image.encode(on_device.permute(0, 3, 1, 2).float() / 127.5 - 1.0).cpu().numpy()


def _finish(job: Job, out: Path, max_skipped: int) -> bool:
    """List what was skipped and publish the manifest; ValueError where too much was. Always False."""
    files = [_progress_file(out, unit) for unit in range(job.units)]
    results = [json.loads(file.read_bytes()) for file in files if file.exists()]
    skipped = [entry for result in results for entry in result["skipped"]]
    listing = out / SKIPPED_FILE
    if skipped:
        write_durably(listing, "".join(json.dumps(entry) + "\n" for entry in skipped).encode())
    else:
        delete(listing)
    infos = [ShardInfo(**result["shard"]) for result in results]
    total = sum(info.samples for info in infos) + len(skipped)
    if len(skipped) == total or 0 <= max_skipped < len(skipped):
        allowed = "at least one readable one" if max_skipped < 0 else f"at most {max_skipped} (input.max_skipped)"
        raise ValueError(f"{listing}: {len(skipped)} of {total} images cannot be read; expected {allowed}")
    publish(out, job.schema, infos, skipped=len(skipped))
    delete_folder(out / PROGRESS_FOLDER)
    clear_leftovers(out)
    return False


def main(settings: ExtractSettings, dry_run: bool = False) -> None:
    set_threads(settings.run.threads)
    given, cut = settings.input, settings.extract
    with world(settings.run.device, timeout_s=RANK_TIMEOUT_S) as here:
        image = load_image_tokenizer(settings.tokenizer.image, here.device)
        job = Job(
            source=ImageFolder(given.images, given.captions),
            text=load_text_tokenizer(settings.tokenizer.text, settings.tokenizer.specials),
            image=image,
            resolution=given.resolution or image.config.resolution,
            filter=given.filter,
            samples_per_shard=cut.samples_per_shard,
            batch_size=cut.batch_size,
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


def _closing_words(out: Path, report: Report) -> str:
    what = f"{out}: {report.samples} samples, {report.tokens} tokens"
    if report.skipped:
        what += f", {report.skipped} images skipped (see {out / SKIPPED_FILE})"
    return (
        f"{what}, {report.images_per_second:.1f} images/s" if report.images_per_second else f"{what}: complete already"
    )


if __name__ == "__main__":
    run_command(ExtractSettings, main)
