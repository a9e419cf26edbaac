"""Megatron-LM `.bin` + `.idx`: every document becomes a language-model sample.

`.idx`, little endian, without alignment: 9 bytes magic, u64 version 1, u8 dtype code, u64 sequences S, u64 document
bounds D, i32[S] lengths, i64[S] byte offsets in `.bin`, i64[D] document bounds (rising sequence numbers, the first 0,
the last S), and optionally i8[S] modes (0 = text, other values mark what is not). A document is the sequences between
two bounds, joined.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from vtrain.data.importers.base import Options, map_numbers
from vtrain.data.importers.streams import DocumentStreams
from vtrain.data.samples import cumulative, ragged

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_HEAD = struct.Struct("<9sQBQQ")
_CHECKED = 1 << 20  # index rows that are checked at a time


class IndexedFile:
    """One pair of files, memory-mapped; every offset has been checked against `.bin` when the constructor returns."""

    def __init__(self, path: Path) -> None:
        stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        self.idx, self.bin = self.paths = tuple(stem.with_name(stem.name + suffix) for suffix in (".idx", ".bin"))
        self.dtype, sequences, bounds = self._header()
        size, expected = self.idx.stat().st_size, _HEAD.size + 12 * sequences + 8 * bounds
        if size not in (expected, expected + sequences):
            raise ValueError(
                f"{self.idx}: {size} bytes; expected {expected} for {sequences} sequences and {bounds} document "
                f"bounds, or {expected + sequences} with modes"
            )
        self.lengths = map_numbers(self.idx, "<i4", _HEAD.size, sequences)
        self.offsets = map_numbers(self.idx, "<i8", _HEAD.size + 4 * sequences, sequences)
        self.bounds = map_numbers(self.idx, "<i8", _HEAD.size + 12 * sequences, bounds)
        self.modes = map_numbers(self.idx, "i1", expected, sequences) if size > expected else None
        self._check()
        self.tokens = map_numbers(self.bin, self.dtype, 0, self.bin.stat().st_size // self.dtype.itemsize)

    def __len__(self) -> int:
        return max(len(self.bounds) - 1, 0)

    def _header(self) -> tuple[np.dtype, int, int]:
        for file in (self.idx, self.bin):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; a Megatron dataset is a .bin and an .idx")
        with open(self.idx, "rb") as file:
            head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(MAGIC):
            raise ValueError(f"{self.idx}: starts with {head[:9]!r}; expected {MAGIC!r}: not a Megatron index")
        _, version, code, sequences, bounds = _HEAD.unpack(head)
        if version != VERSION:
            raise ValueError(f"{self.idx}: version {version}; expected {VERSION}")
        dtype = np.dtype(DTYPES.get(code, "V1"))
        if dtype.kind not in "iu":
            names = ", ".join(f"{c} ({np.dtype(d).name})" for c, d in DTYPES.items() if np.dtype(d).kind in "iu")
            found = f"{code} ({dtype.name})" if code in DTYPES else str(code)
            raise ValueError(f"{self.idx}: dtype code {found}; expected integers: {names}")
        return dtype, sequences, bounds

    def _check(self) -> None:
        """ValueError for the first sequence that lies outside `.bin` and the first bound that does not rise."""
        size = self.bin.stat().st_size
        for first in range(0, len(self.lengths), _CHECKED):
            lengths = self.lengths[first : first + _CHECKED].astype(np.int64)
            offsets = self.offsets[first : first + _CHECKED].astype(np.int64)
            # the length is compared alone, too: a sum with an offset near 2**63 would wrap
            room = size - lengths * self.dtype.itemsize
            bad = (lengths < 0) | (room < 0) | (offsets < 0) | (offsets > room) | (offsets % self.dtype.itemsize != 0)
            if bad.any():
                at = int(np.argmax(bad))
                raise ValueError(
                    f"{self.idx}: sequence {first + at}: {lengths[at]} tokens at byte {offsets[at]}; "
                    f"expected {self.dtype.itemsize}-byte tokens inside the {size} bytes of {self.bin.name}"
                )
        last = 0
        for first in range(0, len(self.bounds), _CHECKED):
            bounds = self.bounds[first : first + _CHECKED].astype(np.int64)
            bad = np.diff(bounds, prepend=last) < 0
            if bad.any() or (first == 0 and bounds[0] != 0):
                at = int(np.argmax(bad))
                raise ValueError(f"{self.idx}: document bound {first + at}: {bounds[at]}; expected rising from 0")
            last = int(bounds[-1])
        if last != len(self.lengths):
            raise ValueError(f"{self.idx}: the last document ends at sequence {last}; expected {len(self.lengths)}")

    def cu(self, first: int, last: int) -> np.ndarray:
        """int64[n+1]: where the documents first..last-1 begin, in tokens, when laid end to end."""
        bounds = self.bounds[first : last + 1].astype(np.int64)
        return cumulative(self.lengths[bounds[0] : bounds[-1]])[bounds - bounds[0]]

    def read(self, first: int, last: int, cu: np.ndarray) -> np.ndarray:
        """integers[T]: the tokens of the documents first..last-1, wherever their sequences lie in `.bin`."""
        begin, end = int(self.bounds[first]), int(self.bounds[last])
        lengths = self.lengths[begin:end].astype(np.int64)
        starts = self.offsets[begin:end].astype(np.int64) // self.dtype.itemsize
        if len(starts) and np.array_equal(starts[1:], (starts + lengths)[:-1]):  # as Megatron writes it
            return self.tokens[starts[0] : starts[-1] + lengths[-1]]
        return self.tokens[ragged(starts, lengths)]

    def problems(self, first: int, last: int) -> dict[int, str]:
        """{document counted from `first`: reason} for those with a sequence that is not text."""
        if self.modes is None:
            return {}
        bounds = self.bounds[first : last + 1].astype(np.int64)
        marked = np.flatnonzero(self.modes[bounds[0] : bounds[-1]]) + bounds[0]
        documents = np.searchsorted(bounds, marked, side="right") - 1
        return {
            int(document): f"sequence {sequence} has mode {self.modes[sequence]}; expected 0, text"
            for document, sequence in zip(documents[::-1].tolist(), marked[::-1].tolist())  # the first one stays
        }


class Megatron(DocumentStreams):
    """inputs: prefixes, or names of the .bin or .idx files."""

    kind = "megatron"

    def open(self, path: Path, options: Options) -> IndexedFile:
        return IndexedFile(path)
