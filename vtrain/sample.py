"""Sample pictures from a finished model folder.

    python -m vtrain.sample --cfg quickstart/sample
    torchrun --nproc-per-node 8 -m vtrain.sample --cfg quickstart/sample sample.per_prompt=4 sample.cfg=6

The model folder is what `vtrain.pretrain` leaves in `out/final/`: weights, `vocabulary.json`, `text_tokenizer/` and
`image_tokenizer/`. Prompts are a list in the config, or a file: plain text with one prompt a line, or JSONL of objects
with a `prompt`. Prompt i writes `{i:05d}/metadata.jsonl` (its object) and `{i:05d}/samples/{k:04d}.png`; at the end
`grid.png` shows all. A picture depends on (model, prompt, seed, i, k) only, so any number of processes writes the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vtrain.config import run_command
from vtrain.dist.comm import barrier
from vtrain.dist.mesh import set_threads, world
from vtrain.files import write_whole
from vtrain.generate.engine import check_prompts, generate
from vtrain.generate.pictures import decode_pictures, text_to_image_prompts
from vtrain.generate.sampler import Sampling
from vtrain.models.decoder import Decoder
from vtrain.models.hf import load_decoder, read_vocabulary
from vtrain.rng import fold
from vtrain.settings import SampleSettings
from vtrain.text import TextTokenizer, load_text_tokenizer
from vtrain.visual import ImageTokenizer, load_image_tokenizer
from vtrain.visual.sheets import MAX_COLUMNS, MAX_ROWS, draw_grid, write_png


@dataclass(frozen=True)
class Model:
    """What a model folder holds, ready to sample: codes come out as a grid of h x w."""

    decoder: Decoder
    text: TextTokenizer
    image: ImageTokenizer
    grid: tuple[int, int]


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    resolution: int = 0,
) -> Model:
    """Decoder, text tokenizer and image tokenizer of one folder, for pictures of resolution x resolution pixels.

    resolution 0 is the image tokenizer's own. ValueError where something is missing or does not fit the vocabulary.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model.path {folder}: no such folder; expected the final/ folder of a vtrain.pretrain run")
    for part in ("vocabulary.json", "text_tokenizer", "image_tokenizer"):
        if not (folder / part).exists():
            raise ValueError(f"model.path {folder}: no {part}; expected the final/ folder of a vtrain.pretrain run")
    text = load_text_tokenizer(folder / "text_tokenizer")
    image = load_image_tokenizer(folder / "image_tokenizer", device)
    vocab = read_vocabulary(folder)
    for name, found in (("text", text.vocab_size), ("visual", image.num_codes)):
        if name not in vocab:
            raise ValueError(f"{folder}/vocabulary.json: no range {name}; found {vocab}")
        if found != vocab[name].size:
            tokenizer = "text_tokenizer" if name == "text" else "image_tokenizer"
            raise ValueError(f"{folder}/{tokenizer}: {found} ids; expected {vocab[name].size}, the range {name}")
    resolution = resolution or image.config.resolution
    if resolution % image.downscale:
        raise ValueError(f"model.resolution is {resolution}; expected a multiple of {image.downscale} pixels, one code")
    side = resolution // image.downscale
    return Model(load_decoder(folder, device, dtype), text, image, (side, side))


def read_prompts(path: str | Path) -> list[dict]:
    """Prompt objects from a file: JSONL of objects with a `prompt` (by its name, `*.jsonl`), else one prompt a line.

    ValueError names the file and the line that is empty or broken. Other keys of an object are kept.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"prompts {path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path}: not UTF-8: {error}") from None
    if not lines:
        raise ValueError(f"prompts {path}: the file is empty; expected at least one prompt")
    parse = _parse_object if path.suffix == ".jsonl" else lambda line: {"prompt": line.strip()}
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse(line)
        except ValueError as error:
            raise ValueError(f"prompts {path}: line {number}: {error}") from None
        if not entry["prompt"].strip():
            raise ValueError(f"prompts {path}: line {number}: empty prompt")
        entries.append(entry)
    return entries


def _parse_object(line: str) -> dict:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could not be written into metadata.jsonl
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError(f"found {line[:80]}; expected an object with a string `prompt`")
    return value


def sample_pictures(
    model: Model,
    entries: Sequence[dict],
    out: str | Path,
    *,
    sampling: Sampling,
    per_prompt: int,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
) -> Path:
    """Sample and write all pictures of this rank; rank 0 then draws the grid. Returns the grid's path.

    Samples are cut into the same batches for any number of ranks, and rank r takes batches r, r + ranks, ...: so not
    even the rounding of a matrix product depends on the number of ranks.
    """
    out = Path(out)
    steps = model.grid[0] * model.grid[1]
    prompts, uncond = text_to_image_prompts([e["prompt"] for e in entries], model.text, model.decoder.vocab)
    check_prompts(model.decoder, prompts, steps)  # all of them, before anything is written
    if rank == 0:
        for i, entry in enumerate(entries):
            _folder(out, i).mkdir(parents=True, exist_ok=True)
            write_whole(_folder(out, i) / "metadata.jsonl", json.dumps(entry, ensure_ascii=False) + "\n")
    jobs = [(i, k) for i in range(len(entries)) for k in range(per_prompt)]
    batches = [jobs[first : first + batch_size] for first in range(0, len(jobs), batch_size)][rank::ranks]
    total = steps * sum(map(len, batches))
    with tqdm(total=total, unit="code", unit_scale=True, desc="sampling", disable=rank != 0) as bar:
        for batch in batches:
            pictures = _sample_batch(model, batch, prompts, uncond, sampling, bar.update)
            for (i, k), picture in zip(batch, pictures):
                write_png(_picture_path(out, i, k), Image.fromarray(picture))
    barrier()
    grid = out / "grid.png"
    if rank == 0:
        write_png(grid, _grid_of_files(out, entries, per_prompt))
    return grid


def _sample_batch(
    model: Model,
    jobs: Sequence[tuple[int, int]],
    prompts: Sequence[list[int]],
    uncond: list[int],
    sampling: Sampling,
    progress: Callable[[int], None],
) -> np.ndarray:
    """Pictures uint8[B, H, W, 3] of the (prompt, sample) pairs."""
    vocab = model.decoder.vocab
    ids = generate(
        model.decoder,
        [prompts[i] for i, _ in jobs],
        [fold(0, i, k) for i, k in jobs],
        steps=model.grid[0] * model.grid[1],
        uncond_prompts=[uncond] * len(jobs),
        batch_size=len(jobs),
        progress=progress,
        **asdict(sampling),
    )
    return decode_pictures(ids, model.image, vocab, grid=model.grid, batch_size=len(jobs))


def _grid_of_files(out: Path, entries: Sequence[dict], per_prompt: int) -> Image.Image:
    """The grid, drawn from the written files of all ranks."""
    rows = [
        [np.asarray(Image.open(_picture_path(out, i, k))) for k in range(min(per_prompt, MAX_COLUMNS))]
        for i in range(min(len(entries), MAX_ROWS))
    ]
    return draw_grid([entry["prompt"] for entry in entries], rows)


def _folder(out: Path, prompt: int) -> Path:
    return out / f"{prompt:05d}"


def _picture_path(out: Path, prompt: int, sample: int) -> Path:
    return _folder(out, prompt) / "samples" / f"{sample:04d}.png"


def main(settings: SampleSettings, dry_run: bool = False) -> None:
    """Draw every prompt of the settings into `run.out`."""
    set_threads(settings.run.threads)
    sample, prompts = settings.sample, settings.prompts
    entries = read_prompts(prompts.file) if prompts.file else [{"prompt": text} for text in prompts.texts]
    sampling = Sampling(sample.cfg, sample.temperature, sample.top_k, sample.top_p, settings.run.seed)
    with world(settings.run.device) as here:
        dtype = torch.bfloat16 if here.device.type == "cuda" else torch.float32
        model = load_model(settings.model.path, here.device, dtype, resolution=settings.model.resolution)
        pictures = f"{len(entries)} prompts x {sample.per_prompt} pictures of {model.grid[0]} x {model.grid[1]} codes"
        if here.main:
            print(f"{settings.model.path} -> {settings.run.out}: {pictures}, {sampling}", flush=True)
        if dry_run:
            return
        grid = sample_pictures(
            model,
            entries,
            settings.run.out,
            sampling=sampling,
            per_prompt=sample.per_prompt,
            batch_size=sample.batch_size,
            rank=here.rank,
            ranks=here.size,
        )
        if here.main:
            print(f"{pictures}; open {grid}")


if __name__ == "__main__":
    run_command(SampleSettings, main)
