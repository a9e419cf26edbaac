"""Look at token shards and check them.

python -m vtrain.shards verify PATH     every byte of a dataset folder or of one shard; exit code 1 if anything is wrong
python -m vtrain.shards inspect PATH    schema, counts, lengths and first samples; pictures go to --out (sheet.png)
python -m vtrain.shards inspect --composed CFG    a packed batch of a vtrain.pretrain config as the model sees it
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vtrain.config import load
from vtrain.data.format import LENGTH_EDGES, Modality, Role, Schema, SegmentFlag
from vtrain.data.reader import Dataset, Shard, verify
from vtrain.settings import PretrainSettings
from vtrain.text import TextTokenizer, load_text_tokenizer
from vtrain.train.tasks.pretrain import Plan
from vtrain.visual import ImageTokenizer, load_image_tokenizer
from vtrain.visual.preprocess import to_uint8
from vtrain.visual.sheets import contact_sheet, write_png

BAR_WIDTH = 40
CAPTION_WIDTH = 100


def run_verify(path: Path) -> int:
    """Print every problem of a dataset folder or shard, then the verdict; 0 if there is none, else 1."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such dataset folder or shard")
    start, size = time.perf_counter(), 0
    with tqdm(unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal size
            bar.total, size = total, done
            bar.update(done - bar.n)

        problems = verify(path, progress)
    seconds = time.perf_counter() - start
    if path.is_dir():
        problems += tokenizer_problems(path)
    for problem in problems:
        print(f"problem: {problem}")
    verdict = f"{len(problems)} problems" if problems else "ok, no problem"
    print(f"{path}: {verdict}; {size / 1e6:.1f} MB in {seconds:.2f} s ({size / 1e9 / seconds:.1f} GB/s)")
    return 1 if problems else 0


def tokenizer_problems(folder: Path) -> list[str]:
    """What is wrong with the two tokenizers that a dataset carries; nothing where its manifest cannot be read."""
    with suppress(ValueError, OSError):  # verify has told about the manifest
        schema = Dataset(folder).schema
        loaders = (("text_tokenizer", schema.text_tokenizer, load_text_tokenizer),)
        loaders += (("image_tokenizer", schema.image_tokenizer, load_image_tokenizer),)
        return [problem for name, sha, load in loaders if (problem := _tokenizer_problem(folder / name, sha, load))]
    return []


def _tokenizer_problem(folder: Path, sha: str, load: Callable) -> str | None:
    if not sha:
        return None
    try:
        found = load(folder).sha256
    except (ValueError, OSError) as error:
        return str(error)
    return None if found == sha else f"{folder}: sha256 {found}; the shards were made with {sha}"


def run_inspect(path: Path, out: Path, count: int) -> int:
    """Print what a dataset or a shard is, and draw its first pictures to `out` if it has any."""
    source = Shard(path) if path.suffix == ".vts" else Dataset(path)
    folder = path.parent if path.is_file() else path
    shown = np.arange(min(count, len(source)))
    text = _load_if_there(load_text_tokenizer, folder / "text_tokenizer", source.schema.text_tokenizer)
    print(describe(source))
    print("\nfirst samples")
    captions = [describe_sample(source, int(i), text) for i in shown]
    image = _load_if_there(load_image_tokenizer, folder / "image_tokenizer", source.schema.image_tokenizer)
    if image is None:
        print(f"\nno contact sheet: {folder / 'image_tokenizer'} is not there")
        return 0
    pictures = [(frames, captions[i]) for i in shown.tolist() for frames in decode_pictures(source, i, image)]
    if not pictures:
        print("\nno contact sheet: no picture in these samples")
        return 0
    write_png(out, contact_sheet(*zip(*pictures)))
    print(f"\n{len(pictures)} pictures: {out}")
    return 0


def run_composed(cfg: str, count: int) -> int:
    """Print the first packed batch that training with `cfg` would see, `count` of its documents piece by piece."""
    plan = Plan(load(PretrainSettings, cfg))
    print(plan.describe())
    print(plan.describe_batch(count))
    return 0


def _load_if_there(load: Callable, folder: Path, sha: str):
    """The tokenizer of a folder, None where there is none; another one than the schema names is used, but told."""
    if not folder.is_dir():
        return None
    tokenizer = load(folder)
    if sha and tokenizer.sha256 != sha:
        print(f"problem: {folder}: sha256 {tokenizer.sha256}; the shards were made with {sha}")
    return tokenizer


def describe(source: Dataset | Shard) -> str:
    """Schema, counts and the histogram of the lengths, for people."""
    schema = source.schema
    shards = source.shards if isinstance(source, Dataset) else [source]
    lines = [f"{source.path}: {len(source)} samples, {source.tokens} tokens, shards: {len(shards)}"]
    if isinstance(source, Dataset):
        found = source.manifest
        lines.append(
            f"generation       {found.generation}, manifest hash {found.hash}, {found.skipped} records skipped"
        )
    lines += [f"range {r.name:<10} ids {r.base}..{r.end - 1} ({r.size})" for r in schema.vocab.ranges]
    lines += _schema_lines(schema)
    lines.append("ids stored as    " + ", ".join(sorted({str(s.footer.sections["TOK"].dtype) for s in shards})))
    if len(source):
        lines += ["", "tokens per sample", *_histogram(np.sum([s.footer.histogram for s in shards], axis=0))]
    return "\n".join(lines)


def _schema_lines(schema: Schema) -> list[str]:
    specials = " ".join(f"{name}={token}" for name, token in sorted(schema.specials.items(), key=lambda item: item[1]))
    weights = sorted(set(schema.loss_weights))
    return [
        f"specials         {specials or 'none'}",
        f"text tokenizer   {schema.text_tokenizer or 'none'}",
        f"image tokenizer  {schema.image_tokenizer or 'none'}",
        f"image            {' '.join(f'{k}={v}' for k, v in sorted(schema.image.items())) or 'none'}",
        f"loss weights     {' '.join(f'{w:g}' for w in weights)}",
        f"schema hash      {schema.hash}",
    ]


def _histogram(counts: np.ndarray) -> list[str]:
    counts = counts.astype(np.int64)
    filled = np.flatnonzero(counts)
    lines = []
    for i in range(filled[0], filled[-1] + 1):
        last = LENGTH_EDGES[i + 1] - 1 if i + 1 < len(LENGTH_EDGES) else 2**32 - 1
        span = f"{LENGTH_EDGES[i]}..{last}" if last > LENGTH_EDGES[i] else f"{last}"
        bar = "#" * -(-BAR_WIDTH * int(counts[i]) // int(counts.max()))
        lines.append(f"{span:>16} {counts[i]:>10} {bar}")
    return lines


def describe_sample(source: Dataset | Shard, index: int, text: TextTokenizer | None) -> str:
    """Print the pieces of one sample; returns its first text, the caption of its pictures."""
    segments, _ = source.segments([index])
    ids, _ = source.read([index])
    key = int(source.keys([index])[0])
    runs = len(source.loss_runs([index])[0])
    print(f"  {index} key {key:#018x}, {len(ids)} tokens" + (f", {runs} loss runs" if runs else ""))
    caption = ""
    for segment in segments:
        modality, role = Modality(segment["modality"]), Role(segment["role"])
        words = (
            f"    {role.name.lower()} {modality.name.lower()}, variant {segment['variant']}, {segment['length']} tokens"
        )
        if segment["t"]:
            words += f", grid {segment['t']} x {segment['h']} x {segment['w']}"
        if modality == Modality.TEXT:
            piece = ids[segment["start"] : segment["start"] + segment["length"]]
            decoded = text.decode(piece.tolist()) if text else f"ids {' '.join(map(str, piece))}"
            caption = caption or decoded
            words += f": {decoded!r}" if len(decoded) <= CAPTION_WIDTH else f": {decoded[:CAPTION_WIDTH]!r}..."
        print(words)
    return caption


def decode_pictures(source: Dataset | Shard, index: int, image: ImageTokenizer) -> list[np.ndarray]:
    """uint8 [h, t * w, 3] per image or video of a sample; the frames of a video stand side by side."""
    segments, _ = source.segments([index])
    ids, _ = source.read([index])
    pictures = []
    for segment in segments:
        merged = segment["flags"] & SegmentFlag.MERGED  # visual BPE: the codes are not one per place of the grid
        if segment["modality"] not in (Modality.IMAGE, Modality.VIDEO) or merged or not segment["length"]:
            continue
        codes = ids[segment["start"] : segment["start"] + segment["length"]] - source.schema.vocab["visual"].base
        grid = [int(segment[axis]) for axis in "thw"]
        if 0 in grid:
            continue
        frames = to_uint8(image.decode(torch.from_numpy(codes.astype(np.int64)).view(grid)))
        pictures.append(np.concatenate(list(frames), axis=1))
    return pictures


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m vtrain.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    verify_command = commands.add_parser("verify", help="check every byte")
    verify_command.add_argument("path", type=Path, help="dataset folder or shard")
    verify_command.set_defaults(run=lambda a: run_verify(a.path))
    inspect_command = commands.add_parser("inspect", help="show what is inside")
    what = inspect_command.add_mutually_exclusive_group(required=True)
    what.add_argument("path", type=Path, nargs="?", help="dataset folder, manifest or shard")
    what.add_argument(
        "--composed", metavar="CFG", help="a config file or recipe of vtrain.pretrain: show a packed batch"
    )
    inspect_command.add_argument(
        "--out", type=Path, default=Path("sheet.png"), help="contact sheet (default: sheet.png)"
    )
    inspect_command.add_argument("--count", type=int, default=16, help="samples to show (default: 16)")
    inspect_command.set_defaults(
        run=lambda a: run_composed(a.composed, a.count) if a.composed else run_inspect(a.path, a.out, a.count)
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
