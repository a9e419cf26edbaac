"""nanoGPT `.bin`: raw u16 ids, cut into documents at an id that stands between them, or every so many tokens.

A file of llm.c or modded-nanogpt begins with 256 i32: a magic number, a version and the number of tokens; 20240520,
version 1 is followed by u16 ids, 20240801, version 7 by u32 ones. A document never goes from one file into the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vtrain.data.format import MAX_SAMPLE
from vtrain.data.importers.base import VOCABULARY, Options, map_numbers
from vtrain.data.importers.streams import DocumentStreams

HEADER_BYTES = 1024
HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, dtype
EOS_AT = ("end", "start")
GRAIN = 4096  # documents between two entries of the index
_SCANNED = 1 << 23  # tokens at a time


class TokenFile:
    """One file, memory-mapped, and where its documents end. eos None: after every `length` tokens."""

    def __init__(self, path: Path, eos: int | None, eos_at: str, length: int | None) -> None:
        self.paths, self.eos, self.eos_at, self.length = (path,), eos, eos_at, length
        self.tokens = _map_tokens(path)
        self._starts = [0]  # first token of documents 0, GRAIN, 2 * GRAIN, ...
        self._documents = -(-len(self.tokens) // length) if eos is None else self._index()

    def __len__(self) -> int:
        return self._documents

    def _index(self) -> int:
        count = 0
        for ends in self._ends(0):
            self._starts += ends[GRAIN - 1 - count % GRAIN :: GRAIN].tolist()
            count += len(ends)
        return count

    def _ends(self, begin: int) -> Iterator[np.ndarray]:
        """int64[k] at a time: the token after each document from the one that begins at token `begin` on."""
        last = begin
        for first in range(begin, len(self.tokens), _SCANNED):
            ends = np.flatnonzero(self.tokens[first : first + _SCANNED] == self.eos) + first
            ends = ends + 1 if self.eos_at == "end" else ends[ends > begin]
            if len(ends):
                last = int(ends[-1])
                yield ends
        if last < len(self.tokens):  # what stands behind the last mark is a document, too
            yield np.array([len(self.tokens)])

    def cu(self, first: int, last: int) -> np.ndarray:
        """int64[n+1]: where the documents first..last-1 begin, and where the last one ends; tokens of the file."""
        if self.eos is None:
            return np.minimum(np.arange(first, last + 1) * self.length, len(self.tokens))
        known = self._starts[first // GRAIN]
        found, count = [np.array([known])], 1
        for ends in self._ends(known):
            found.append(ends)
            count += len(ends)
            if count > last - first // GRAIN * GRAIN:
                break
        return np.concatenate(found)[first % GRAIN :][: last - first + 1]

    def read(self, first: int, last: int, cu: np.ndarray) -> np.ndarray:
        return self.tokens[cu[0] : cu[-1]]

    def problems(self, first: int, last: int) -> dict[int, str]:
        return {}


def _map_tokens(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    head = np.fromfile(path, "<i4", 3) if size >= HEADER_BYTES else np.zeros(3, np.int32)
    dtype, offset = np.dtype("<u2"), 0
    if int(head[0]) in HEADERS:
        version, name = HEADERS[int(head[0])]
        dtype, offset = np.dtype(name), HEADER_BYTES
        expected = HEADER_BYTES + int(head[2]) * dtype.itemsize
        if head[1] != version or size != expected:
            raise ValueError(
                f"{path}: magic {head[0]}, version {head[1]}, {head[2]} tokens, {size} bytes; "
                f"expected version {version} and {expected} bytes"
            )
    elif size % dtype.itemsize:
        raise ValueError(f"{path}: {size} bytes; expected u16 ids, an even number")
    return map_numbers(path, dtype, offset, (size - offset) // dtype.itemsize)


class NanoGpt(DocumentStreams):
    """inputs: .bin files. Documents keep the eos that ends (eos_at = "end") or begins (eos_at = "start") them."""

    takes = (*VOCABULARY, "eos", "eos_at", "length")
    kind = "nanogpt"

    def __init__(self, inputs: Sequence[Path], options: Options) -> None:
        if (options.eos is None) == (options.length is None):
            raise ValueError("import nanogpt: give eos, the id between documents, or length, tokens of a document")
        self.eos, self.eos_at, self.length = options.eos, options.eos_at or EOS_AT[0], options.length
        if self.eos_at not in EOS_AT:
            raise ValueError(f"import nanogpt: eos-at is {self.eos_at!r}; expected {' or '.join(EOS_AT)}")
        if self.length is not None and not 1 <= self.length <= MAX_SAMPLE:
            raise ValueError(f"import nanogpt: length is {self.length}; expected 1..{MAX_SAMPLE}")
        super().__init__(inputs, options)
        if self.eos is not None and not 0 <= self.eos < self.schema.vocab.size:
            raise ValueError(f"import nanogpt: eos is {self.eos}; expected 0..{self.schema.vocab.size - 1}")

    def open(self, path: Path, options: Options) -> TokenFile:
        return TokenFile(path, self.eos, self.eos_at, self.length)

    def fingerprint(self) -> dict:
        return {**super().fingerprint(), "eos": self.eos, "eos_at": self.eos_at, "length": self.length}

    def describe(self) -> str:
        cut = f"cut every {self.length} tokens, NOT between documents (no eos was given)"
        if self.eos is not None:
            cut = f"cut at id {self.eos}, the {self.eos_at} of a document"
        return f"{super().describe()}, {cut}"
