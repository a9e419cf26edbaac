"""What all token importers share: their options, the schema they lead to, batches of samples, and the id check."""

from __future__ import annotations

import argparse
import hashlib
import os
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from vtrain.data.build import Asset
from vtrain.data.format import SEGMENT
from vtrain.data.samples import Samples, cumulative, ragged
from vtrain.data.schema import Schema
from vtrain.rng import fold, fold_array
from vtrain.text import TextTokenizer, load_text_tokenizer
from vtrain.vocab import Vocabulary

VOCABULARY = ("text_vocab", "visual_vocab", "vbpe_vocab", "text_tokenizer", "specials")  # options that all take
BATCH_TOKENS = 1 << 22  # of a batch: at most 32 MB, whatever the input holds
HASHED_BLOCKS, HASHED_BYTES = 64, 1 << 16  # of a large file: evenly spaced, first and last among them


def _option(help: str, type: type = int) -> Any:
    return field(default=None, metadata={"help": help, "type": type})


@dataclass(frozen=True)
class Options:
    """The options of all importers; None = not given. Each importer names those that it takes."""

    text_vocab: int | None = _option("ids of text (default: those of the text tokenizer)")
    visual_vocab: int | None = _option("codes of the image tokenizer, numbered after the text ids")
    vbpe_vocab: int | None = _option("ids that visual BPE adds, numbered after the codes")
    text_tokenizer: str | None = _option("file or folder; it is carried into the dataset", str)
    specials: str | None = _option("special tokens that it is to have, with commas between them", str)
    eos: int | None = _option("nanogpt: the id that stands between documents")
    eos_at: str | None = _option("nanogpt: whether it is the end of a document (nanoGPT) or its start (llm.c)", str)
    length: int | None = _option("nanogpt, without --eos: tokens of a document")
    root: str | None = _option("simplear: the folder in which relative paths begin (default: the meta file's)", str)
    captions: str | None = _option("simplear: whole | short (and the first sentence) | second (of several lines)", str)
    total: int | None = _option("simplear: of a folder of codes, only the files 0..TOTAL-1")
    resolution: int | None = _option("simplear: side of the pictures in pixels, noted in the dataset")
    caption_space: bool | None = _option("simplear: encode captions with a space before, for data.prefixes", bool)
    merged: bool | None = _option("beingvl: take token_image_new, merged by visual BPE", bool)
    offset: int | None = _option("beingvl: what was added to the codes of npy grids")
    separator: int | None = _option("beingvl: the id that begins every further turn")
    template: str | None = _option("records with turns: qwen2 | llama3 | vicuna | plain, how turns are joined", str)
    images: str | None = _option("records: the folder that paths of pictures begin in (default: the file's)", str)
    annotations: str | None = _option("vgt: the folder that paths of annotations begin in", str)
    image_field: str | None = _option("records: the field with the picture", str)
    caption_fields: str | None = _option("records: the fields with captions, with commas between them", str)
    no_pictures: bool | None = _option("records: keep texts only, not the bytes of the pictures", bool)


@dataclass
class Batch:
    """Samples for ShardWriter.append_batch, the records left out, and how many records both were made of.

    pictures: the bytes of the files that go with the feature segments, in their order; empty = none are kept.
    """

    samples: Samples
    skipped: list[dict] = field(default_factory=list)
    records: int = 0
    pictures: list[bytes] = field(default_factory=list)


class Importer(Protocol):
    """Records in a fixed order, cut into units: a unit gives the same batches' samples in any process."""

    takes: ClassVar[tuple[str, ...]]
    noun: ClassVar[str]  # what a record is, in the plural
    schema: Schema
    assets: Mapping[str, Asset]

    def __init__(self, inputs: Sequence[Path], options: Options) -> None: ...

    def units(self, size: int) -> list[tuple[int, ...]]:
        """The arguments of `read` for about `size` records each; the last two are [first, last)."""

    def total(self) -> int | None:
        """Records in all; None where last - first is no number of records."""

    def fingerprint(self) -> dict:
        """`file NAME` of every input and the options in use: JSON, equal for equal content, no absolute paths."""

    def read(self, *unit: int) -> Iterator[Batch]: ...

    def describe(self) -> str: ...


class Numbered(ABC):
    """The part of an importer that follows from records 0..len-1, which `read(first, last)` gives in any range."""

    @abstractmethod
    def __len__(self) -> int: ...

    def total(self) -> int:
        return len(self)

    def units(self, size: int) -> list[tuple[int, int]]:
        return [(first, min(first + size, len(self))) for first in range(0, len(self), size)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """--text-vocab and so on, by the fields of Options."""
    for option in fields(Options):
        kind = option.metadata["type"]
        form = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            form = {"action": "store_const", "const": True}
        parser.add_argument(f"--{option.name.replace('_', '-')}", help=option.metadata["help"], **form)


def make_schema(kind: str, options: Options, **defaults: int) -> tuple[Schema, TextTokenizer | None]:
    """Schema and text tokenizer (None: not given) of the vocabulary options; `defaults`: sizes that may be left out."""
    tokenizer = None
    sizes = {name: getattr(options, f"{name}_vocab") for name in ("text", "visual", "vbpe")}
    sizes = {name: defaults.get(name, 0) if size is None else size for name, size in sizes.items()}
    if options.text_tokenizer is not None:
        specials = None if options.specials is None else list(filter(None, options.specials.split(",")))
        tokenizer = load_text_tokenizer(options.text_tokenizer, specials)
        if options.text_vocab is None:
            sizes["text"] = tokenizer.vocab_size
        elif options.text_vocab < tokenizer.vocab_size:
            raise ValueError(
                f"{options.text_tokenizer}: {tokenizer.vocab_size} ids; the text range has {options.text_vocab}"
            )
    elif options.specials is not None:
        raise ValueError(f"import {kind}: specials without a text tokenizer")
    if not sizes["text"]:
        raise ValueError(f"import {kind}: the number of text ids is not known; give text-vocab or text-tokenizer")
    schema = Schema(
        vocab=Vocabulary.of(**{name: size for name, size in sizes.items() if size}),
        specials={name: tokenizer.special_id(name) for name in tokenizer.specials} if tokenizer else {},
        text_tokenizer=tokenizer.sha256 if tokenizer else "",
    )
    return schema, tokenizer


def skip_entry(key: int, record: str, reason: str) -> dict:
    """A line of skipped.jsonl."""
    return {"key": f"{key:#018x}", "record": record, "reason": reason}


def numbered_keys(name: str, first: int, count: int) -> np.ndarray:
    """u64[count], never 0: the sample keys of the records first, first + 1, ... of a file."""
    return np.maximum(fold_array(fold(0, name), np.arange(first, first + count)), np.uint64(1))


def relative_names(paths: Sequence[Path]) -> list[str]:
    """How files are called in keys and fingerprints: below the deepest folder that holds all, the same after a move."""
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    names = [path.absolute().relative_to(folder).as_posix() for path in paths]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice}: given twice; expected each file once")
    return names


def sampled_hash(path: Path) -> str:
    """sha256 of a file's size and of 64 KiB in 64 places: finds another file, or one cut or written anew, in 1 ms.

    Token files have hundreds of gigabytes, and every process of an import would read them twice.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(HASHED_BLOCKS):
            file.seek(max(size - HASHED_BYTES, 0) * i // (HASHED_BLOCKS - 1))
            digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()


def load_array(path: Path) -> np.ndarray:
    """An npy of integers, memory-mapped; ValueError where it is none. Nothing in it is executed."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"{path}: not an npy of numbers, or cut off: {' '.join(str(error).split())}") from None
    if array.dtype.kind not in "iu":
        raise ValueError(f"{path}: {array.dtype}; expected an npy of integers")
    return array


def map_numbers(path: Path, dtype: np.dtype | str, offset: int, count: int) -> np.ndarray:
    """`count` numbers of a file from byte `offset` on, memory-mapped; the caller has compared with the file's size."""
    return np.asarray(np.memmap(path, dtype, "r", offset, count)) if count else np.zeros(0, dtype)


def groups(cu: np.ndarray, limit: int = BATCH_TOKENS) -> Iterator[tuple[int, int]]:
    """[first, last) of consecutive rows with together at most `limit` items, or one larger row."""
    first = 0
    while first < len(cu) - 1:
        last = max(int(np.searchsorted(cu, cu[first] + limit, side="right")) - 1, first + 1)
        yield first, last
        first = last


def whole_segments(lengths: np.ndarray, modality: int, role: int) -> tuple[np.ndarray, np.ndarray]:
    """(SEGMENT[N], segment_cu) of samples that are one segment each."""
    segments = np.zeros(len(lengths), dtype=SEGMENT)
    segments["modality"], segments["role"] = modality, role
    return segments, np.arange(len(lengths) + 1)


def foreign_ids(ids: np.ndarray, cu: np.ndarray, low: int, high: int) -> dict[int, str]:
    """{row: what is wrong} for the rows of a ragged array that hold an id outside low..high-1."""
    filled = np.flatnonzero(np.diff(cu) > 0)
    if not len(filled):
        return {}
    starts = cu[filled]
    bad = (np.minimum.reduceat(ids, starts) < low) | (np.maximum.reduceat(ids, starts) >= high)
    found = {}
    for at in np.flatnonzero(bad).tolist():
        row = int(filled[at])
        own = ids[cu[row] : cu[row + 1]]
        token = int(np.argmax((own < low) | (own >= high)))
        found[row] = f"token {token} is id {own[token]}; expected {low}..{high - 1}"
    return found


def without(samples: Samples, bad: Sequence[int]) -> Samples:
    """The other samples (of ones without loss runs)."""
    if not len(bad):
        return samples
    keep = np.delete(np.arange(len(samples.keys)), bad)
    lengths, counts = np.diff(samples.cu)[keep], np.diff(samples.segment_cu)[keep]
    return Samples(
        ids=samples.ids[ragged(samples.cu[keep], lengths)],
        cu=cumulative(lengths),
        segments=samples.segments[ragged(samples.segment_cu[keep], counts)],
        segment_cu=cumulative(counts),
        keys=samples.keys[keep],
    )


class SampleList:
    """Gathers samples one by one."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.segments: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.keys: list[int] = []
        self.skipped: list[dict] = []
        self.tokens = 0

    def add(self, pieces: Sequence[np.ndarray], segments: np.ndarray, key: int) -> None:
        """pieces: integers, one array per segment; segments: SEGMENT, whose starts are set here."""
        cu = cumulative([len(piece) for piece in pieces])
        segments["start"] = cu[:-1]
        self.ids += pieces
        self.segments.append(segments)
        self.lengths.append(int(cu[-1]))
        self.keys.append(key)
        self.tokens += int(cu[-1])

    def skip(self, key: int, record: str, reason: str) -> None:
        self.skipped.append(skip_entry(key, record, reason))

    def batch(self) -> Batch:
        samples = Samples(
            ids=np.concatenate([np.zeros(0, np.int64), *self.ids]),
            cu=cumulative(self.lengths),
            segments=np.concatenate([np.zeros(0, SEGMENT), *self.segments]),
            segment_cu=cumulative([len(segments) for segments in self.segments]),
            keys=np.array(self.keys, dtype=np.uint64),
        )
        return Batch(samples, self.skipped, len(self.keys) + len(self.skipped))
