"""One run of the sample command: which files there are to be, which are missing, and making those, on any ranks.

`out/sampling.json` tells what the pictures in a folder were made with; a job with anything else is refused there. Files
appear whole or not at all, so a job that was stopped goes on when it is started again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vtrain.files import write_durably, write_whole
from vtrain.generate.benchmarks import Sheet, is_whole, layout, metadata, write_sheet
from vtrain.generate.engine import check_prompts, generate
from vtrain.generate.pictures import decode_pictures, text_to_image_prompts
from vtrain.generate.sampler import Sampling
from vtrain.models.decoder import Decoder
from vtrain.rng import fold
from vtrain.text import TextTokenizer
from vtrain.visual import ImageTokenizer
from vtrain.visual.sheets import GRID_SIDES, MAX_COLUMNS, MAX_ROWS, draw_grid, write_png

IDENTITY_FILE = "sampling.json"
GRID_FILE = "grid.png"
_DECODED_PIXELS = 4 << 20  # at a time: a 1024 x 1024 picture is 134 MB (512 x 256 x 256 fp32) in Cosmos' decoder
_WRITERS = 4  # threads; a 1024 x 1024 PNG takes a core about 0.2 s, in which a GPU should draw the next batch


@dataclass(frozen=True)
class Model:
    """What a model folder holds, ready to sample: codes come out as a grid of h x w.

    caption_space: see `text_to_image_prompts`. sha256: of the decoder's files; needed where a folder is opened, so on
    rank 0.
    """

    decoder: Decoder
    text: TextTokenizer
    image: ImageTokenizer
    grid: tuple[int, int]
    caption_space: bool = False
    sha256: str = ""


@dataclass(frozen=True)
class Job:
    """What is drawn into the folder `out`, and how. entries: what `prompts.read_prompts` and `with_prefixes` gave."""

    model: Model
    entries: Sequence[dict]
    out: Path
    sampling: Sampling
    per_prompt: int
    batch_size: int
    bench: str = ""
    negative: str = ""

    @cached_property
    def sheets(self) -> list[Sheet]:
        return layout(self.bench, self.entries, self.per_prompt)

    @cached_property
    def batches(self) -> list[list[Sheet]]:
        """Files whose samples are drawn together.

        They are cut in the same way for any number of ranks and whatever is there already, so not even the rounding of
        a matrix product depends on either.
        """
        files = max(1, self.batch_size // len(self.sheets[0].samples))
        return [self.sheets[first : first + files] for first in range(0, len(self.sheets), files)]

    @cached_property
    def prompts(self) -> tuple[list[list[int]], list[int]]:
        """(ids of every prompt, ids of the one that guidance leads away from). ValueError where one is too long."""
        prompts, away = text_to_image_prompts(
            [entry["prompt"] for entry in self.entries],
            self.model.text,
            self.model.decoder.vocab,
            self.negative,
            openers=[entry.get("prefix", "") for entry in self.entries],
            caption_space=self.model.caption_space,
        )
        check_prompts(self.model.decoder, prompts, self.steps)
        if self.sampling.guided:
            check_prompts(self.model.decoder, [away], self.steps, "unconditional prompt")
        return prompts, away

    @property
    def steps(self) -> int:
        return self.model.grid[0] * self.model.grid[1]

    def size(self, sheet: Sheet) -> tuple[int, int]:
        """(width, height) of a file in pixels."""
        height, width = (codes * self.model.image.downscale * sheet.side for codes in self.model.grid)
        return width, height

    @cached_property
    def identity(self) -> dict:
        """All that decides what the pictures show; no paths, so that folders can move.

        Not batch_size: of that only rounding depends, and it must be possible to go on with a smaller one.
        """
        drawing = {f"sample.{name}": value for name, value in asdict(self.sampling).items()}
        return {
            "decoder": self.model.sha256,
            "text_tokenizer": self.model.text.sha256,
            "image_tokenizer": self.model.image.sha256,
            "dtype": str(next(self.model.decoder.parameters()).dtype).removeprefix("torch."),
            "codes": list(self.model.grid),
            "bench": self.bench,
            "prompts": hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest(),
            "run.seed": drawing.pop("sample.seed"),
            "sample.negative": self.negative,
            "sample.per_prompt": self.per_prompt,
            **drawing,
        }

    def describe(self) -> str:
        codes = f"{self.model.grid[0]} x {self.model.grid[1]} codes"
        return f"{len(self.entries)} prompts x {self.per_prompt} pictures of {codes}, {len(self.sheets)} files"


def check_folder(job: Job) -> None:
    """ValueError where `job.out` holds pictures of another job, or some of which nothing tells how they were made."""
    path = job.out / IDENTITY_FILE
    remedy = "take another run.out, or delete this one"
    if not path.is_file():
        names = [*metadata(job.bench, job.entries), *(sheet.path for sheet in job.sheets)]
        if there := next((name for name in names if (job.out / name).exists()), None):
            raise ValueError(f"{job.out}: {there} is there, but no {IDENTITY_FILE} that tells of it; {remedy}")
        return
    try:
        found = json.loads(path.read_bytes())
        changes = [
            f"{key} {_shown(found.get(key))}, now {_shown(job.identity.get(key))}"
            for key in sorted(found.keys() | job.identity.keys())
            if found.get(key) != job.identity.get(key)
        ]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not what vtrain.sample writes: {error}") from None
    if changes:
        raise ValueError(f"{path}: made with {'; '.join(changes)}; {remedy}")


def _shown(value: object) -> str:
    """As it is, of a digest the beginning."""
    return f"{value[:8]!r}" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)


def open_folder(job: Job) -> None:
    """Check the folder, and write what is not a picture; before `make_pictures`, once for all ranks."""
    check_folder(job)
    job.out.mkdir(parents=True, exist_ok=True)
    write_durably(job.out / IDENTITY_FILE, json.dumps(job.identity, indent=1) + "\n")
    for name, text in metadata(job.bench, job.entries).items():
        (job.out / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(job.out / name, text)


def missing(job: Job, batch: Sequence[Sheet]) -> list[Sheet]:
    """The files of a batch that are not there, or not whole."""
    return [sheet for sheet in batch if not is_whole(job.out / sheet.path, job.size(sheet))]


def make_pictures(job: Job, rank: int = 0, ranks: int = 1) -> int:
    """Draw the batches rank, rank + ranks, ... that lack a file, and write what is missing; the number of files.

    Such a batch is drawn as a whole: its pictures then are what an uninterrupted run makes of them.
    """
    todo = [(batch, lacking) for batch in job.batches[rank::ranks] if (lacking := missing(job, batch))]
    total = job.steps * sum(len(sheet.samples) for batch, _ in todo for sheet in batch)
    bar = tqdm(total=total, unit="code", unit_scale=True, desc="sampling", disable=rank != 0 or not todo)
    with bar, ThreadPoolExecutor(_WRITERS) as pool:
        writing = []
        for batch, lacking in todo:
            pictures = _draw(job, batch, bar.update)
            for written in writing:  # of the batch before
                written.result()
            writing = [
                pool.submit(write_sheet, job.out / sheet.path, cells, sheet.side)
                for sheet, cells in zip(batch, pictures)
                if sheet in lacking
            ]
        for written in writing:
            written.result()
    return sum(len(lacking) for _, lacking in todo)


def _draw(job: Job, batch: Sequence[Sheet], progress: Callable[[int], None]) -> np.ndarray:
    """Pictures uint8[files, samples of a file, H, W, 3]."""
    samples = [sample for sheet in batch for sample in sheet.samples]
    prompts, away = job.prompts
    model = job.model
    ids = generate(
        model.decoder,
        [prompts[i] for i, _ in samples],
        [fold(0, i, k) for i, k in samples],
        steps=job.steps,
        uncond_prompts=[away] * len(samples),
        batch_size=job.batch_size,
        progress=progress,
        **asdict(job.sampling),
    )
    together = max(1, _DECODED_PIXELS // (job.steps * model.image.downscale**2))
    pictures = decode_pictures(ids, model.image, model.decoder.vocab, grid=model.grid, batch_size=together)
    return pictures.reshape(len(batch), -1, *pictures.shape[1:])


def write_grid(job: Job) -> None:
    """Draw `grid.png` from the first files, of all ranks; each is reduced when it is read, as thousands may be held."""
    rows: list[list[np.ndarray]] = [[] for _ in job.entries[:MAX_ROWS]]
    for sheet in job.sheets:
        prompt, sample = sheet.samples[0]
        if prompt < MAX_ROWS and sample < MAX_COLUMNS:
            with Image.open(job.out / sheet.path) as image:
                image.thumbnail((GRID_SIDES[1], GRID_SIDES[1]), Image.Resampling.LANCZOS)
                rows[prompt].append(np.asarray(image.convert("RGB")))
    write_png(job.out / GRID_FILE, draw_grid([entry["prompt"] for entry in job.entries], rows))
