"""Sample pictures from a finished model folder, also as the trees that GenEval and DPG-Bench score.

    python -m vtrain.sample --cfg quickstart/sample
    torchrun --nproc-per-node 8 -m vtrain.sample --cfg simplear/geneval --bench geneval
    python -m vtrain.sample --cfg simplear/geneval --bench geneval --summary 'runs/geneval-seed*/results.jsonl'

The model folder is what `vtrain.pretrain` leaves in `out/final/`: weights, `vocabulary.json`, `text_tokenizer/` and
`image_tokenizer/`. Prompts are a list in the config, or a file: plain text with one prompt a line, or JSONL of objects
with a `prompt`. Prompt i writes `{i:05d}/metadata.jsonl` (its object) and `{i:05d}/samples/{k:05d}.png`; at the end
`grid.png` shows the first ones. --bench geneval takes GenEval's evaluation_metadata.jsonl and writes the same tree;
--bench dpg takes DPG-Bench's folder of prompts (or its CSV) and writes `images/{name}.jpg`, four samples as 2 x 2.

A picture depends on (model, prompt, seed, i, k) and the settings of sampling only: any number of processes writes the
same, and a run that was stopped goes on where it was. `sampling.json` tells what pictures were made with, and a run
with anything else is refused in their folder. sample.batch_size may change, which changes rounding only.

--summary reads what the benchmark's own scorer wrote, prints a table and writes `scores.json` beside it; of several
files, such as those of several seeds, it tells mean and standard deviation. Nothing is drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from vtrain.config import run_command
from vtrain.data.sources.record import file_digest
from vtrain.dist.comm import raise_together, sum_over_ranks
from vtrain.dist.mesh import World, set_threads, world
from vtrain.files import write_whole
from vtrain.generate.benchmarks import BENCHES
from vtrain.generate.job import GRID_FILE, Job, Model, check_folder, make_pictures, missing, open_folder, write_grid
from vtrain.generate.prompts import read_prompts, with_prefixes
from vtrain.generate.sampler import Sampling
from vtrain.generate.scores import summarize, table
from vtrain.models.hf import load_decoder, read_image_facts, read_text_facts, read_vocabulary
from vtrain.settings import SampleSettings
from vtrain.text import load_text_tokenizer
from vtrain.visual import load_image_tokenizer

OPTIONS = {
    "bench": "geneval or dpg: that benchmark's prompts in, its tree of pictures out",
    "summary": "sum up result files of the benchmark's scorer: a file, or a 'pattern*' of several",
}
RANK_TIMEOUT_S = 30 * 24 * 3600.0  # ranks wait for the slowest only once, at the end


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    resolution: int = 0,
    digest: bool = True,
) -> Model:
    """Decoder, text tokenizer and image tokenizer of one folder, for pictures of resolution x resolution pixels.

    resolution 0 is what the decoder was trained on; where the folder does not tell, the image tokenizer's own.
    digest: fill in `sha256`, for which all weights are read once more. ValueError where something is missing or does
    not fit the vocabulary.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model.path {folder}: no such folder; expected the final/ folder of a vtrain.pretrain run")
    for part in ("vocabulary.json", "text_tokenizer", "image_tokenizer"):
        if not (folder / part).exists():
            hint = "; imported data has none: copy the one of its codes there" if part == "image_tokenizer" else ""
            raise ValueError(
                f"model.path {folder}: no {part}; expected the final/ folder of a vtrain.pretrain run{hint}"
            )
    text = load_text_tokenizer(folder / "text_tokenizer")
    image = load_image_tokenizer(folder / "image_tokenizer", device)
    vocab = read_vocabulary(folder)
    for name, found in (("text", text.vocab_size), ("visual", image.num_codes)):
        if name not in vocab:
            raise ValueError(f"{folder}/vocabulary.json: no range {name}; found {vocab}")
        if found != vocab[name].size:
            tokenizer = "text_tokenizer" if name == "text" else "image_tokenizer"
            raise ValueError(f"{folder}/{tokenizer}: {found} ids; expected {vocab[name].size}, the range {name}")
    resolution = resolution or read_image_facts(folder).get("resolution") or image.resolution
    if resolution % image.downscale:
        raise ValueError(f"model.resolution is {resolution}; expected a multiple of {image.downscale} pixels, one code")
    side = resolution // image.downscale
    sha256 = _decoder_digest(folder) if digest else ""
    spaced = bool(read_text_facts(folder).get("caption_space"))
    return Model(load_decoder(folder, device, dtype), text, image, (side, side), spaced, sha256)


def _decoder_digest(folder: Path) -> str:
    files = [folder / "config.json", folder / "vocabulary.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()


def make(job: Job, here: World) -> str:
    """Draw what is missing on all ranks; the words that close the run."""
    _on_main(here, lambda: open_folder(job))
    made = int(sum_over_ranks([make_pictures(job, here.rank, here.size)])[0])
    grid = job.out / GRID_FILE
    if made or not grid.is_file():
        _on_main(here, lambda: write_grid(job))
    kept = len(job.sheets) - made
    return f"{job.out}: {made} files written{f', {kept} kept' if kept else ''}; open {grid}"


def _on_main(here: World, action: Callable[[], None]) -> None:
    """What rank 0 alone does; where it fails on the user's input or the disk, all ranks fail."""
    problem = None
    if here.main:
        try:
            action()
        except (ValueError, OSError) as error:
            problem = str(error)
    raise_together(problem)


def _job(settings: SampleSettings, bench: str, here: World) -> Job:
    prompts, sample, seed = settings.prompts, settings.sample, settings.run.seed
    if bench and not prompts.file:
        raise ValueError(f"--bench {bench}: prompts.texts is set; expected prompts.file with the benchmark's prompts")
    entries = read_prompts(prompts.file, bench) if prompts.file else [{"prompt": text} for text in prompts.texts]
    drawing = ("cfg", "temperature", "top_k", "top_p", "repetition_penalty", "speculate")
    dtype = torch.bfloat16 if here.device.type == "cuda" else torch.float32
    return Job(
        model=load_model(
            settings.model.path, here.device, dtype, resolution=settings.model.resolution, digest=here.main
        ),
        entries=with_prefixes(entries, prompts.prefixes, seed),
        out=Path(settings.run.out),
        sampling=Sampling(**{name: getattr(sample, name) for name in drawing}, seed=seed),
        per_prompt=sample.per_prompt,
        batch_size=sample.batch_size,
        bench=bench,
        negative=sample.negative,
    )


def _show_state(job: Job) -> None:
    check_folder(job)
    lacking = sum(len(missing(job, batch)) for batch in job.batches)
    print(f"{job.out}: {len(job.sheets) - lacking} files are there, {lacking} to be made")


def _sum_up(bench: str, pattern: str, dry_run: bool) -> None:
    found, path = summarize(bench, pattern)
    print(table(found))
    if not dry_run:
        write_whole(path, json.dumps(found, indent=1) + "\n")
        print(f"written to {path}")


def main(settings: SampleSettings, dry_run: bool = False, bench: str = "", summary: str = "") -> None:
    """Draw every prompt of the settings into `run.out`, or sum up what a benchmark's scorer found."""
    if (bench or summary) and bench not in BENCHES:
        raise ValueError(f"--bench is {bench!r}; expected {' or '.join(BENCHES)}")
    set_threads(settings.run.threads)
    with world(settings.run.device, timeout_s=RANK_TIMEOUT_S) as here:
        if summary:
            _on_main(here, lambda: _sum_up(bench, summary, dry_run))
            return
        job = _job(settings, bench, here)
        _ = job.prompts  # a wrong one is refused before anything is written
        if here.main:
            print(f"{settings.model.path} -> {job.out}: {job.describe()}, {job.sampling}", flush=True)
        if dry_run:
            _on_main(here, lambda: _show_state(job))
            return
        try:
            words = make(job, here)
        except FloatingPointError as error:
            raise ValueError(f"model.path {settings.model.path}: {error}") from None
        if here.main:
            print(words, flush=True)


if __name__ == "__main__":
    run_command(SampleSettings, main, options=OPTIONS)
