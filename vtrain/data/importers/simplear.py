"""SimpleAR: an npy of codes and a text file of captions per picture, listed in meta files, mixes or folders.

    meta    JSON list or JSONL of {"code_path": ..., "label_path": ...}
    mix     YAML that takes all or a part of several metas (vtrain.data.sources.simplear_lists)
    folder  NAME/512_codes/0.npy, 1.npy, ... and NAME/512_labels/0.npy, 1.npy, ...

Codes are integers [1, 1, h, w]; labels are UTF-8 text, whatever their names end in: a caption per line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vtrain._host import crc32c
from vtrain.data.format import SEGMENT
from vtrain.data.importers.base import (
    BATCH_TOKENS,
    VOCABULARY,
    Batch,
    Numbered,
    Options,
    SampleList,
    foreign_ids,
    load_array,
    make_schema,
    relative_names,
)
from vtrain.data.json_records import Broken
from vtrain.data.samples import cumulative
from vtrain.data.schema import Modality, Role, Schema
from vtrain.data.sources.captions import lines, short_and_whole, spaced
from vtrain.data.sources.record import MAX_CAPTIONS, stable_key
from vtrain.data.sources.simplear_lists import ListFile, is_mix, open_mix

VISUAL = 64000  # codes of the Cosmos tokenizers
CAPTIONS = ("whole", "short", "second")
MAX_LABEL = 1 << 20  # bytes of a caption file; a larger one is no caption
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # as its file is called; one with more digits does not fit int64


@dataclass(frozen=True)
class Pair:
    """One picture: how it is called in messages, its two files; or why there are none."""

    name: str
    code: Path = Path()
    label: Path = Path()
    problem: str = ""

    @property
    def key(self) -> int:
        """Of dataset/512_codes/3.npy, which stays when the tree moves; the same from a meta file and from a folder."""
        return stable_key(*self.code.parts[-3:]) if not self.problem else stable_key(self.name)


class MetaFile:
    """The pairs of a meta file, or of the part of it that a mix chooses."""

    def __init__(self, records: ListFile, root: str | None) -> None:
        self.records, self.root = records, Path(root) if root else records.path.absolute().parent
        self.fingerprint = records.fingerprint

    def __len__(self) -> int:
        return len(self.records)

    def read(self, first: int, last: int) -> Iterator[Pair]:
        return (self._pair(name, value) for name, value in self.records.read(first, last))

    def _pair(self, name: str, value: object) -> Pair:
        if isinstance(value, Broken):
            return Pair(name, problem=value.reason)
        paths = [value.get(key) if isinstance(value, dict) else None for key in ("code_path", "label_path")]
        if not all(isinstance(path, str) and path for path in paths):
            return Pair(name, problem="expected an object with code_path and label_path")
        return Pair(name, *(self.root / path for path in paths))


class CodesFolder:
    """A folder with one `*_codes` folder and the `*_labels` beside it."""

    def __init__(self, path: Path, total: int | None) -> None:
        found = [path] if path.name.endswith("_codes") else sorted(path.glob("*_codes"))
        if len(found) != 1:
            raise ValueError(f"{path}: {len(found)} folders *_codes; expected one, or one of them named")
        self.codes = found[0].absolute()
        self.labels = self.codes.with_name(self.codes.name.removesuffix("codes") + "labels")
        if not self.labels.is_dir():
            raise ValueError(f"{self.labels}: no such folder; {self.codes.name} needs it")
        names = (os.path.splitext(entry.name) for entry in os.scandir(self.codes))
        numbers = np.array(
            [int(stem) for stem, suffix in names if suffix == ".npy" and _NUMBER.fullmatch(stem)], np.int64
        )
        self.numbers = np.sort(numbers if total is None else numbers[numbers < total])
        self.fingerprint = [len(self.numbers), f"{crc32c(self.numbers):08x}"]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, first: int, last: int) -> Iterator[Pair]:
        for number in self.numbers[first:last].tolist():
            name = f"{self.codes.name}/{number}.npy"
            yield Pair(name, self.codes / f"{number}.npy", self.labels / f"{number}.npy")


class SimpleAR(Numbered):
    """inputs: meta files, mixes, folders. A sample is a text segment per caption variant, then the picture's codes.

    captions: "whole" takes every line as a variant; "short" puts the first sentence before the line where there is one
    alone; "second" takes of several lines the second only (SimpleAR trains on either of the last two). What a resumed
    import compares are the lists: the pictures' own files are too many to be read twice.
    """

    takes = (*VOCABULARY, "root", "captions", "total", "resolution", "caption_space")
    noun = "pictures"

    def __init__(self, inputs: Sequence[Path], options: Options) -> None:
        if options.text_tokenizer is None:
            raise ValueError("import simplear: no text-tokenizer; the captions are text")
        self.captions = options.captions or CAPTIONS[0]
        if self.captions not in CAPTIONS:
            raise ValueError(f"import simplear: captions is {self.captions!r}; expected {', '.join(CAPTIONS)}")
        schema, self.tokenizer = make_schema("simplear", options, visual=VISUAL)
        self.schema: Schema = replace(schema, **_facts(options))
        self.assets = {"text_tokenizer": self.tokenizer}
        self.lists: list[tuple[str, MetaFile | CodesFolder]] = []
        for path, name in zip(inputs, relative_names(inputs)):
            self.lists += [(f"{name}{inner}", found) for inner, found in _open(path, options)]
        self.cu = cumulative([len(pairs) for _, pairs in self.lists])

    def __len__(self) -> int:
        return int(self.cu[-1])

    def fingerprint(self) -> dict:
        files = {f"file {name}": pairs.fingerprint for name, pairs in self.lists}
        return {**files, "captions": self.captions, **self.schema.image, **self.schema.text}

    def describe(self) -> str:
        names = ", ".join(f"{name} ({len(pairs)})" for name, pairs in self.lists)
        return f"simplear: {len(self)} pictures of {names}"

    def read(self, first: int, last: int) -> Iterator[Batch]:
        found = SampleList()
        for (_, pairs), begin, end in zip(self.lists, self.cu[:-1].tolist(), self.cu[1:].tolist()):
            low, high = max(first, begin) - begin, min(last, end) - begin
            for pair in pairs.read(low, high) if low < high else ():
                try:
                    found.add(*self._sample(pair), pair.key)
                except (ValueError, OSError) as error:
                    found.skip(pair.key, pair.name, _reason(error))
                if found.tokens >= BATCH_TOKENS:
                    yield found.batch()
                    found = SampleList()
        yield found.batch()

    def _sample(self, pair: Pair) -> tuple[list[np.ndarray], np.ndarray]:
        if pair.problem:
            raise ValueError(pair.problem)
        codes = load_array(pair.code)
        h, w = codes.shape[-2:] if codes.ndim >= 2 else (0, 0)
        if not 0 < h * w == codes.size or max(h, w) >= 1 << 16:
            raise ValueError(f"{pair.code}: shape {codes.shape}; expected (1, 1, h, w)")
        visual = self.schema.vocab["visual"]
        ids = codes.reshape(-1).astype(np.int64)
        reasons = foreign_ids(ids, np.array([0, len(ids)]), 0, visual.size)
        if reasons:
            raise ValueError(f"{pair.code}: {reasons[0]}")
        captions = self._variants(pair.label)
        segments = np.zeros(len(captions) + 1, dtype=SEGMENT)
        segments["variant"][:-1] = np.arange(len(captions))
        segments["modality"][-1], segments["role"][-1] = Modality.IMAGE, Role.TARGET
        segments["t"][-1], segments["h"][-1], segments["w"][-1] = 1, h, w
        texts = [self._encode(caption) for caption in captions]
        return [*texts, ids + visual.base], segments

    def _encode(self, caption: str) -> np.ndarray:
        text = spaced(caption) if self.schema.text else caption
        return np.array(self.tokenizer.encode(text), dtype=np.int64)

    def _variants(self, path: Path) -> list[str]:
        """The captions of a label file; none where it is blank."""
        with open(path, "rb") as file:
            data = file.read(MAX_LABEL + 1)
        if len(data) > MAX_LABEL or data.startswith(b"\x93NUMPY"):
            raise ValueError(f"{path}: an npy, or more than {MAX_LABEL} bytes; expected the text of captions")
        found = lines(data.decode("utf-8-sig"))  # UnicodeDecodeError is a ValueError
        if len(found) > MAX_CAPTIONS:
            raise ValueError(f"{path}: {len(found)} captions; expected at most {MAX_CAPTIONS}")
        if len(found) > 1:
            return found[1:2] if self.captions == "second" else found
        return short_and_whole(found[0]) if found and self.captions == "short" else found


def _facts(options: Options) -> dict[str, dict]:
    """What the schema says of pictures and captions beyond what all imports say; nothing where nothing was given."""
    if options.resolution is not None and options.resolution < 1:
        raise ValueError(f"import simplear: resolution is {options.resolution}; expected pixels, at least 1")
    return {
        "image": {} if options.resolution is None else {"resolution": options.resolution},
        "text": {"caption_space": True} if options.caption_space else {},
    }


def _open(path: Path, options: Options) -> Iterator[tuple[str, MetaFile | CodesFolder]]:
    """(what is added to the input's name, list) of all that an input names."""
    if path.is_dir():
        yield "", CodesFolder(path, options.total)
    elif is_mix(path):
        for name, records in open_mix(path):
            yield name, MetaFile(records, options.root)
    else:
        yield "", MetaFile(ListFile(path), options.root)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return f"not UTF-8: {error}" if isinstance(error, UnicodeDecodeError) else str(error)
