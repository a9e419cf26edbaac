"""What a dataset or a shard is, for people: schema, counts, lengths, samples in words, and their pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from vtrain.data.format import LENGTH_EDGES, Modality, Role, Schema, SegmentFlag
from vtrain.data.reader import Dataset, Shard
from vtrain.text import TextTokenizer, load_text_tokenizer
from vtrain.visual import ImageTokenizer, load_image_tokenizer
from vtrain.visual.preprocess import to_uint8

BAR_WIDTH = 40
CAPTION_WIDTH = 100


def describe(source: Dataset | Shard) -> str:
    """Schema, counts and the histogram of the lengths, for people."""
    schema = source.schema
    shards = source.shards if isinstance(source, Dataset) else [source]
    lines = [f"{source.path}: {len(source)} samples, {source.tokens} tokens, shards: {len(shards)}"]
    if isinstance(source, Dataset):
        found = source.manifest
        lines.append(
            f"generation       {found.generation}, manifest hash {found.hash}, {found.skipped} records skipped, "
            f"{found.excluded_samples} samples excluded"
        )
        lines += [_twin_line(name, twin) for name, twin in found.twins.items()]
    lines += [f"range {r.name:<10} ids {r.base}..{r.end - 1} ({r.size})" for r in schema.vocab.ranges]
    lines += _schema_lines(schema)
    lines.append("ids stored as    " + ", ".join(sorted({s.footer.store.name for s in shards})))
    if len(source):
        lines += ["", "tokens per sample", *_histogram(np.sum([s.footer.histogram for s in shards], axis=0))]
    return "\n".join(lines)


def _twin_line(name: str, twin: Mapping) -> str:
    files = sum(entry is not None for entry in twin["files"])
    rows = f"rows of {twin['dim']} {twin['dtype']}" if twin["dim"] else "bytes"
    return f"twin {name:<12}{twin['kind']}, {rows}, for {files} of {len(twin['files'])} shards, by {twin['producer']!r}"


def _schema_lines(schema: Schema) -> list[str]:
    specials = " ".join(f"{name}={token}" for name, token in sorted(schema.specials.items(), key=lambda item: item[1]))
    weights = sorted(set(schema.loss_weights))
    return [
        f"specials         {specials or 'none'}",
        f"text tokenizer   {schema.text_tokenizer or 'none'}",
        f"image tokenizer  {schema.image_tokenizer or 'none'}",
        f"image            {' '.join(f'{k}={v}' for k, v in sorted(schema.image.items())) or 'none'}",
        *[f"captions         {' '.join(f'{k}={v}' for k, v in sorted(schema.text.items()))}"] * bool(schema.text),
        f"loss weights     {' '.join(f'{w:g}' for w in weights)}",
        f"columns          {' '.join(f'{name}:{dtype}' for name, dtype in schema.columns.items()) or 'none'}",
        f"labels           {'stored' if schema.labels else 'the next id'}",
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


def load_if_there(load: Callable, folder: Path, sha: str):
    """The tokenizer of a folder, None where there is none; another one than the schema names is used, but told."""
    if not folder.is_dir():
        return None
    tokenizer = load(folder)
    if sha and tokenizer.sha256 != sha:
        print(f"problem: {folder}: sha256 {tokenizer.sha256}; the shards were made with {sha}")
    return tokenizer


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
