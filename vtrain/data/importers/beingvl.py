"""Being-VL: tokenized JSONL (text, image, text of one conversation per line) and npy grids of codes.

A line has token_0 (begin of text and image), token_image (all codes of a grid) and perhaps token_image_new (merged by
visual BPE), token_1 (the conversation); its ids are those of the whole vocabulary. A grid file is an integer npy of
[N, H*W] or [N, H, W] codes, to which `offset` may have been added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vtrain.data.format import SEGMENT
from vtrain.data.importers.base import (
    BATCH_TOKENS,
    VOCABULARY,
    Batch,
    Numbered,
    Options,
    SampleList,
    foreign_ids,
    groups,
    load_array,
    make_schema,
    numbered_keys,
    relative_names,
    sampled_hash,
    skip_entry,
    whole_segments,
    without,
)
from vtrain.data.json_records import Broken, JsonRecords
from vtrain.data.samples import Samples, cumulative
from vtrain.data.schema import Modality, Role, Schema, SegmentFlag
from vtrain.data.sources.record import stable_key

# Llama 3's ids and five specials, the codes of the image tokenizer, the ids that visual BPE adds
TEXT, VISUAL, VBPE = 128261, 8192, 8192
SEPARATOR = 128257  # begins the second and every later turn


class BeingVL(Numbered):
    """inputs: .jsonl and .npy files. merged: take token_image_new. separator: the id that begins a turn of token_1."""

    takes = (*VOCABULARY, "merged", "offset", "separator")
    noun = "records"

    def __init__(self, inputs: Sequence[Path], options: Options) -> None:
        self.schema, tokenizer = make_schema("beingvl", options, text=TEXT, visual=VISUAL, vbpe=VBPE)
        self.assets = {"text_tokenizer": tokenizer} if tokenizer else {}
        self.options = {
            "merged": bool(options.merged),
            "offset": options.offset or 0,
            "separator": SEPARATOR if options.separator is None else options.separator,
        }
        self.names = relative_names(inputs)
        self.files = [
            Grids(path, name, self.schema, self.options["offset"])
            if path.suffix == ".npy"
            else Conversations(path, self.schema, self.options["merged"], self.options["separator"])
            for path, name in zip(inputs, self.names)
        ]
        self.cu = cumulative([len(file) for file in self.files])

    def __len__(self) -> int:
        return int(self.cu[-1])

    def fingerprint(self) -> dict:
        return {**{f"file {name}": file.hash for name, file in zip(self.names, self.files)}, **self.options}

    def describe(self) -> str:
        image = "token_image_new" if self.options["merged"] else "token_image"
        return f"beingvl: {len(self)} records, pictures: {image}, files: {', '.join(self.names)}"

    def read(self, first: int, last: int) -> Iterator[Batch]:
        for file, begin, end in zip(self.files, self.cu[:-1].tolist(), self.cu[1:].tolist()):
            low, high = max(first, begin) - begin, min(last, end) - begin
            if low < high:
                yield from file.read(low, high)


class Grids:
    """An npy of code grids: each is a sample of one image segment. Keys: the file's name and the row."""

    def __init__(self, path: Path, name: str, schema: Schema, offset: int) -> None:
        self.name, self.schema, self.offset = name, schema, offset
        self.codes = load_array(path)
        if self.codes.ndim not in (2, 3):
            raise ValueError(f"{path}: shape {self.codes.shape}; expected (N, H*W) or (N, H, W) codes")
        self.hash = sampled_hash(path)
        side = math.isqrt(math.prod(self.codes.shape[1:]))
        square = (side, side) if side * side == math.prod(self.codes.shape[1:]) else (0, 0)
        self.grid = self.codes.shape[1:] if self.codes.ndim == 3 else square

    def __len__(self) -> int:
        return len(self.codes)

    def read(self, first: int, last: int) -> Iterator[Batch]:
        size = math.prod(self.codes.shape[1:])
        visual = self.schema.vocab["visual"]
        for a, b in groups(np.arange(last - first + 1) * size):
            low, high = first + a, first + b
            codes = self.codes[low:high].reshape(-1).astype(np.int64) - self.offset
            cu, keys = np.arange(high - low + 1) * size, numbered_keys(self.name, low, high - low)
            reasons = foreign_ids(codes, cu, 0, visual.size)
            skipped = [skip_entry(int(keys[row]), f"{self.name}: grid {low + row}", reasons[row]) for row in reasons]
            segments, segment_cu = whole_segments(np.diff(cu), Modality.IMAGE, Role.TARGET)
            segments["t"], segments["h"], segments["w"] = int(all(self.grid)), *self.grid
            samples = Samples(codes + visual.base, cu, segments, segment_cu, keys)
            yield Batch(without(samples, sorted(reasons)), skipped, high - low)


class Conversations:
    """A tokenized JSONL. A sample is token_0, the picture and the turns of token_1. Keys: the content of the line."""

    def __init__(self, path: Path, schema: Schema, merged: bool, separator: int) -> None:
        self.records = JsonRecords(path)
        if self.records.is_list:
            raise ValueError(f"{path}: a JSON list; expected a line per conversation")
        self.schema, self.merged, self.separator = schema, merged, separator
        self.hash = [path.stat().st_size, f"{self.records.crc:08x}"]

    def __len__(self) -> int:
        return len(self.records)

    def read(self, first: int, last: int) -> Iterator[Batch]:
        found = SampleList()
        for _, name, value in self.records.read(first, last):
            try:
                found.add(*self._sample(value))
            except ValueError as error:
                found.skip(stable_key(name), name, str(error))
            if found.tokens >= BATCH_TOKENS:
                yield found.batch()
                found = SampleList()
        yield found.batch()

    def _sample(self, value: object) -> tuple[list[np.ndarray], np.ndarray, int]:
        """(ids of each segment, the segments, key) of a line; ValueError tells what is wrong with it."""
        if isinstance(value, Broken):
            raise ValueError(value.reason)
        if not isinstance(value, dict):
            raise ValueError(f"{type(value).__name__}; expected an object")
        head, tail = self._ids(value, "token_0", Modality.TEXT), self._ids(value, "token_1", Modality.TEXT)
        codes = self._ids(value, "token_image", Modality.IMAGE)
        image = self._ids(value, "token_image_new", Modality.IMAGE) if self.merged else codes
        turns = [turn for turn in np.split(tail, np.flatnonzero(tail == self.separator)) if len(turn)]
        segments = np.zeros(2 + len(turns), dtype=SEGMENT)
        segments["modality"][1], segments["role"][2:] = Modality.IMAGE, Role.TARGET
        segments["flags"][1] = SegmentFlag.MERGED if self.merged else 0
        side = math.isqrt(len(codes))
        if codes.size and side * side == len(codes):
            segments["t"][1], segments["h"][1], segments["w"][1] = 1, side, side
        pieces = [head, image, *turns]
        key = stable_key(str(value.get("image")), *(piece.astype("<i8").tobytes() for piece in (head, codes, tail)))
        return pieces, segments, key

    def _ids(self, value: dict, field: str, modality: Modality) -> np.ndarray:
        """int64[k] of a list of ids, all of the modality's range."""
        if field not in value:
            raise ValueError(f"no {field}; it has {', '.join(value)}")
        ids = value[field]
        try:
            found = np.array(ids if isinstance(ids, list) and set(map(type, ids)) <= {int} else None, dtype=np.int64)
        except (TypeError, OverflowError):
            raise ValueError(f"{field}: expected a list of integers") from None
        low, high = self.schema.id_span(modality, merged=field == "token_image_new")
        reasons = foreign_ids(found, np.array([0, len(found)]), low, high)
        if reasons:
            raise ValueError(f"{field}: {reasons[0]}")
        return found
