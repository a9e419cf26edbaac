"""Files of token streams cut into documents: what the megatron and nanogpt importers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vtrain.data.importers.base import (
    VOCABULARY,
    Batch,
    Numbered,
    Options,
    foreign_ids,
    groups,
    make_schema,
    numbered_keys,
    relative_names,
    sampled_hash,
    skip_entry,
    whole_segments,
    without,
)
from vtrain.data.samples import Samples, cumulative
from vtrain.data.schema import Modality, Role


class DocumentFile(Protocol):
    """Documents 0..len-1 of one file; `paths`: what it consists of, `tokens`: int[T], all of its ids."""

    paths: tuple[Path, ...]
    tokens: np.ndarray

    def __len__(self) -> int: ...

    def cu(self, first: int, last: int) -> np.ndarray:
        """int64[n+1]: where the documents first..last-1 begin when laid end to end, and where the last one ends."""

    def read(self, first: int, last: int, cu: np.ndarray) -> np.ndarray:
        """integers[T]: their ids, of the stored dtype; cu: what `cu` says of these documents."""

    def problems(self, first: int, last: int) -> dict[int, str]:
        """{document counted from `first`: why it cannot be taken}."""


class DocumentStreams(Numbered):
    """An importer of such files: a document is a sample of one text segment, or without segments where ids of other
    ranges than text may stand in it. Keys come from the file's name and the document's number."""

    takes: tuple[str, ...] = VOCABULARY
    noun = "documents"
    kind: str

    def __init__(self, inputs: Sequence[Path], options: Options) -> None:
        self.schema, tokenizer = make_schema(self.kind, options)
        self.assets = {"text_tokenizer": tokenizer} if tokenizer else {}
        self.files = [self.open(path, options) for path in inputs]
        self.names = relative_names([file.paths[0] for file in self.files])
        self.cu = cumulative([len(file) for file in self.files])

    @abstractmethod
    def open(self, path: Path, options: Options) -> DocumentFile:
        """The file that an input names."""

    def __len__(self) -> int:
        return int(self.cu[-1])

    def fingerprint(self) -> dict:
        return {
            f"file {name}": [sampled_hash(path) for path in file.paths] for name, file in zip(self.names, self.files)
        }

    def describe(self) -> str:
        tokens = sum(len(file.tokens) for file in self.files)
        return f"{self.kind}: {len(self)} documents, {tokens} tokens, files: {', '.join(self.names)}"

    def read(self, first: int, last: int) -> Iterator[Batch]:
        for file, name, begin, end in zip(self.files, self.names, self.cu[:-1].tolist(), self.cu[1:].tolist()):
            low, high = max(first, begin) - begin, min(last, end) - begin
            if low < high:
                cu = file.cu(low, high)
                for a, b in groups(cu):
                    yield self._batch(file, name, low + a, low + b, cu[a : b + 1])

    def _batch(self, file: DocumentFile, name: str, first: int, last: int, cu: np.ndarray) -> Batch:
        ids, cu = file.read(first, last, cu), cu - cu[0]
        keys = numbered_keys(name, first, last - first)
        reasons = foreign_ids(ids, cu, 0, self.schema.vocab.size) | file.problems(first, last)
        bad = sorted(reasons)
        skipped = [skip_entry(int(keys[row]), f"{name}: document {first + row}", reasons[row]) for row in bad]
        segments, segment_cu = whole_segments(np.diff(cu), Modality.TEXT, Role.INPUT)
        if self.schema.vocab.names != ("text",):
            segments, segment_cu = segments[:0], segment_cu * 0
        return Batch(without(Samples(ids, cu, segments, segment_cu, keys), bad), skipped, last - first)
