"""The corpora of the data benches: made from a fixed seed, the same on every machine.

`plain`: 200,000 samples of 64..1300 ids, uniform in the vocabulary. `pictures`: 60,000 samples of a caption (16..64
text ids) and a picture of 32 x 32 codes. Sizes shrink with `scale`, for a quick look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vtrain.data.format import SEGMENT
from vtrain.data.samples import cumulative, pack_runs, ragged
from vtrain.data.schema import Modality, Role, Schema
from vtrain.vocab import Vocabulary

PACK_TOKENS = 8192  # of every packed batch
PICTURE = 32  # codes on a side
BATCH = 4096  # samples of one append_batch
# The name of a variant -> (ids in the vocabulary, numpy dtype that peers store, our store).
VARIANTS = {
    "int32": (131072, np.dtype("<i4"), "u32"),
    "uint16": (64000, np.dtype("<u2"), "u16"),
    "17-bit": (131072, np.dtype("<i4"), "u16+1"),
}


@dataclass(frozen=True)
class Corpus:
    """kind: plain or pictures; variant: of VARIANTS."""

    kind: str
    variant: str
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.variant}"

    @property
    def shape(self) -> dict[str, int]:
        """What a row says of it."""
        return {"samples": len(self.lengths), "tokens": int(self.cu[-1])}

    @property
    def vocabulary(self) -> int:
        return VARIANTS[self.variant][0]

    @property
    def dtype(self) -> np.dtype:
        return VARIANTS[self.variant][1]

    @property
    def id_store(self) -> str:
        return VARIANTS[self.variant][2]

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64[N]."""
        random = np.random.default_rng(0)
        if self.kind == "plain":
            return random.integers(64, 1301, int(200_000 * self.scale))
        return random.integers(16, 65, int(60_000 * self.scale)) + PICTURE**2

    @cached_property
    def cu(self) -> np.ndarray:
        """int64[N + 1]."""
        return cumulative(self.lengths)

    @cached_property
    def ids(self) -> np.ndarray:
        """int32 or uint16[tokens], the samples end to end."""
        random = np.random.default_rng(1)
        if self.kind == "plain":
            return random.integers(0, self.vocabulary, self.cu[-1], dtype=self.dtype)
        ids = random.integers(0, self._text, self.cu[-1], dtype=self.dtype)
        codes = random.integers(self._text, self.vocabulary, (len(self.lengths), PICTURE**2), dtype=self.dtype)
        ids[ragged(self.cu[1:] - PICTURE**2, np.full(len(self.lengths), PICTURE**2))] = codes.ravel()
        return ids

    def samples(self) -> Iterator[np.ndarray]:
        """One array after the other."""
        for start, stop in zip(self.cu[:-1].tolist(), self.cu[1:].tolist()):
            yield self.ids[start:stop]

    @property
    def _text(self) -> int:
        """Ids of the text range; the codes have the rest."""
        return self.vocabulary if self.kind == "plain" else self.vocabulary - 16384

    @property
    def schema(self) -> Schema:
        if self.kind == "plain":
            return Schema(Vocabulary.of(text=self._text))
        vocabulary = Vocabulary.of(text=self._text, visual=self.vocabulary - self._text)
        return Schema(vocabulary, specials={"<|t2i|>": 0, "<|soi|>": 1})

    @cached_property
    def batches(self) -> list[dict[str, np.ndarray]]:
        """The arguments of `ShardWriter.append_batch`, BATCH samples at a time.

        A plain sample has two segments and two loss runs (a turn of the user, which is not scored, and the answer), a
        picture sample its caption and its codes.
        """
        return [self._batch(first) for first in range(0, len(self.lengths), BATCH)]

    def _batch(self, first: int) -> dict[str, np.ndarray]:
        cu = self.cu[first : first + BATCH + 1]
        lengths = np.diff(cu)
        count = len(lengths)
        split = lengths // 4 if self.kind == "plain" else lengths - PICTURE**2
        segments = np.zeros((count, 2), dtype=SEGMENT)
        segments["start"][:, 1] = split
        segments["role"] = (Role.USER, Role.ASSISTANT) if self.kind == "plain" else (Role.INPUT, Role.TARGET)
        two = np.arange(count + 1) * 2
        batch = {"ids": self.ids[cu[0] : cu[-1]], "offsets": cu - cu[0], "segment_offsets": two}
        batch["keys"] = np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)
        if self.kind == "plain":
            runs = np.stack([split, lengths - split], axis=1)
            batch |= {"runs": pack_runs(runs.ravel(), np.tile([0, 1], count)), "run_offsets": two}
        else:
            segments["modality"][:, 1] = Modality.IMAGE
            for axis, size in {"t": 1, "h": PICTURE, "w": PICTURE}.items():
                segments[axis][:, 1] = size
        return {**batch, "segments": segments.ravel()}


@dataclass(frozen=True)
class Way:
    """A way to keep a corpus: write(corpus, folder) and counts(corpus, folder), the tokens of one batch after another
    without end. package: whose version a row tells."""

    write: Callable[[Corpus, Path], None]
    counts: Callable[[Corpus, Path], Iterator[int]]
    package: str = ""


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
