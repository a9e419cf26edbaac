"""Composers turn stored facts (captions, code grids, turns) into finished sequences.

Everything random is drawn from (seed, epoch, sample key), so a document is the same on any rank and after any resume.
No composer reads tokens: a document is a list of pieces, and the loader reads them straight into its batches. `lengths`
is what mixture, packer and cost use; it equals the lengths of what `compose` makes.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from vtrain.data.samples import cumulative, ragged
from vtrain.data.schema import Modality, Role
from vtrain.rng import fold, uniform

if TYPE_CHECKING:
    from vtrain.data.reader import Dataset
    from vtrain.data.schema import Schema

T2I, SOI = "<|t2i|>", "<|soi|>"
STORED, SLOT = -2, -1  # in Pieces.token: ids of a sample, rows of its features
BY_RUNS = np.float32(np.nan)  # in Pieces.weight: what the sample's loss runs say


@dataclass
class Pieces:
    """n documents as runs of m pieces, nothing read yet: document i is made of the pieces cu[i]:cu[i+1].

    cu: int64[n+1]. By piece: token int32[m], STORED, SLOT or the id of a literal; sample int64[m], its number in the
    dataset (-1 for literals); start int32[m], first token in the sample, at SLOT first row among all its feature rows;
    count int32[m], tokens or slot rows, for literals how often the id is repeated; weight float32[m], of these tokens
    as targets, BY_RUNS = by the stored loss runs. labels: stored ids have the stored labels, and weight is theirs.
    features: the twin that slot rows come from.
    """

    cu: np.ndarray
    sample: np.ndarray
    start: np.ndarray
    count: np.ndarray
    token: np.ndarray
    weight: np.ndarray
    labels: bool = False
    features: str = ""

    def lengths(self) -> np.ndarray:
        """int64[n] rows of the documents."""
        return np.diff(cumulative(self.count)[self.cu])


class Composer(Protocol):
    """What the loader asks of a composer. indices: int64[n] sample numbers of `dataset`; epoch: of that dataset.

    One whose documents have slot rows also has `extents(dataset, indices, epoch) -> int32[n, 2]`: slot rows, frames.
    One whose documents mean nothing in part has `whole = True`: overlong = split or crop is an error for them.
    """

    def lengths(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> np.ndarray:
        """int32[n], exactly the lengths of what `compose` makes."""

    def compose(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> Pieces:
        """n documents."""

    def weighted(self, schema: Schema) -> bool:
        """Whether batches carry weights other than 0 and 1."""

    def settings(self) -> dict[str, Any]:
        """JSON-able name and options: a resumed run must have the same."""


@dataclass(frozen=True)
class _Named:
    """A composer is its name and its options; all take a seed, so that configs can treat them alike."""

    seed: int = 0

    def settings(self) -> dict[str, Any]:
        return {"name": type(self).name, **asdict(self)}


@dataclass(frozen=True)
class TextToImage(_Named):
    """`<|t2i|>` prefix caption `<|soi|>` codes; without its caption `<|t2i|><|soi|>` codes.

    A sample has any number of captions (text segments of role input) and one picture (an image segment of role target).
    sample_short: one of the captions is drawn uniformly; false: the second of several, or the only one (captions that
    were also stored shortened are stored after their short form). prefixes: ids of texts, one of which is drawn
    uniformly for every caption that is kept; none = no prefix. drop_caption: probability of leaving the caption out,
    and the prefix with it. text_weight: loss weight of prefix, caption and `<|soi|>` as targets (0 = codes only; codes
    weigh 1). max_caption_tokens: longer captions lose their end, 0 = no limit; prefixes and codes are never cut. Stored
    loss runs and labels are not used.
    """

    name = "text_to_image"
    whole = True  # codes come last: a document that is cut would lose a part of its picture

    drop_caption: float = 0.1
    text_weight: float = 1.0
    max_caption_tokens: int = 0
    sample_short: bool = True
    prefixes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.drop_caption <= 1:
            raise ValueError(f"text_to_image: drop_caption is {self.drop_caption}; expected 0..1")
        if not 0 <= self.text_weight < float("inf"):
            raise ValueError(f"text_to_image: text_weight is {self.text_weight}; expected a number >= 0")
        if self.max_caption_tokens < 0:
            raise ValueError(f"text_to_image: max_caption_tokens is {self.max_caption_tokens}; expected >= 0")
        if any(token < 0 for prefix in self.prefixes for token in prefix):
            raise ValueError(f"text_to_image: prefixes is {self.prefixes}; expected ids >= 0")

    def settings(self) -> dict[str, Any]:
        """As of all composers, but what came later is named only where it is used: older states stay good."""
        found = super().settings()
        if self.sample_short:
            del found["sample_short"]
        if not self.prefixes:
            del found["prefixes"]
        return found

    def weighted(self, schema: Schema) -> bool:
        return self.text_weight not in (0.0, 1.0)

    def lengths(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> np.ndarray:
        parts = self._parts(dataset, indices, epoch)
        return (2 + parts.prefix_length + parts.caption_length + parts.image_length).astype(np.int32)

    def compose(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> Pieces:
        parts = self._parts(dataset, indices, epoch)
        cu = cumulative(4 + parts.prefix_length)  # every token of a prefix is a piece of its own
        m, t2i, image = int(cu[-1]), cu[:-1], cu[1:] - 1
        soi, caption = image - 1, image - 2
        token, sample = np.empty(m, dtype=np.int32), np.full(m, -1, dtype=np.int64)
        start, count = np.zeros(m, dtype=np.int32), np.ones(m, dtype=np.int32)
        weight = np.full(m, self.text_weight, dtype=np.float32)
        token[t2i], token[soi] = _special(dataset, T2I), _special(dataset, SOI)
        if self.prefixes:
            tokens = np.array([t for prefix in self.prefixes for t in prefix], dtype=np.int32)
            first = cumulative(self._prefix_lengths)[parts.prefix]
            token[ragged(t2i + 1, parts.prefix_length)] = tokens[ragged(first, parts.prefix_length)]
        token[caption], sample[caption] = STORED, indices
        start[caption], count[caption] = parts.caption_at, parts.caption_length
        token[image], sample[image], weight[image] = STORED, indices, 1.0
        start[image], count[image] = parts.image_at, parts.image_length
        return Pieces(cu=cu, sample=sample, start=start, count=count, token=token, weight=weight)

    def _parts(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> _Parts:
        segments, cu = dataset.segments(indices)
        sample = np.repeat(np.arange(len(indices)), np.diff(cu))
        is_caption = (segments["modality"] == Modality.TEXT) & (segments["role"] == Role.INPUT)
        is_image = (segments["modality"] == Modality.IMAGE) & (segments["role"] == Role.TARGET)
        keys = dataset.keys(indices)
        images = np.bincount(sample[is_image], minlength=len(indices))
        if np.any(images != 1):
            bad = int(np.argmax(images != 1))
            raise ValueError(
                f"{dataset.name}: sample {int(keys[bad]):#x} has {images[bad]} target image segments; "
                "text_to_image expects 1"
            )
        image_at, image_length = (segments[name][is_image].astype(np.int64) for name in ("start", "length"))

        captions = np.bincount(sample[is_caption], minlength=len(indices))
        which = self._choice(keys, epoch, "caption", captions) if self.sample_short else np.minimum(captions - 1, 1)
        kept = (captions > 0) & (self._draw(keys, epoch, "drop_caption") >= self.drop_caption)
        caption_at, caption_length, prefix, prefix_length = np.zeros((4, len(indices)), dtype=np.int64)
        chosen = np.flatnonzero(is_caption)[(np.cumsum(captions) - captions + which)[kept]]
        caption_at[kept], caption_length[kept] = segments["start"][chosen], segments["length"][chosen]
        if self.max_caption_tokens:
            caption_length = np.minimum(caption_length, self.max_caption_tokens)
        if self.prefixes:
            prefix = self._choice(keys, epoch, "prefix", len(self.prefixes))
            prefix_length = np.where(kept, self._prefix_lengths[prefix], 0)
        return _Parts(prefix, prefix_length, caption_at, caption_length, image_at, image_length)

    @property
    def _prefix_lengths(self) -> np.ndarray:
        return np.array([len(prefix) for prefix in self.prefixes], dtype=np.int64)

    def _choice(self, keys: np.ndarray, epoch: int, field: str, among: np.ndarray | int) -> np.ndarray:
        """int64[n], uniform in 0..among-1."""
        return np.floor(self._draw(keys, epoch, field) * among).astype(np.int64)

    def _draw(self, keys: np.ndarray, epoch: int, field: str) -> np.ndarray:
        return uniform(fold(self.seed, epoch), keys ^ np.uint64(fold(0, field)))


class _Parts(NamedTuple):
    """What documents of text_to_image are made of, int64[n] each: the number of the prefix, places in the sample.

    A caption of length 0 is one that was left out, or an empty one; the prefix of a dropped caption has length 0, too.
    """

    prefix: np.ndarray
    prefix_length: np.ndarray
    caption_at: np.ndarray
    caption_length: np.ndarray
    image_at: np.ndarray
    image_length: np.ndarray


@dataclass(frozen=True)
class LanguageModel(_Named):
    """The sample's ids as they are, scored by its loss runs (none = every token), with its labels if it has some."""

    name = "language_model"

    def weighted(self, schema: Schema) -> bool:
        return any(weight not in (0.0, 1.0) for weight in schema.loss_weights)

    def lengths(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> np.ndarray:
        return dataset.lengths(indices)

    def compose(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> Pieces:
        n = len(indices)
        return Pieces(
            cu=np.arange(n + 1, dtype=np.int64),
            sample=np.asarray(indices, dtype=np.int64),
            start=np.zeros(n, dtype=np.int32),
            count=dataset.lengths(indices),
            token=np.full(n, STORED, dtype=np.int32),
            weight=np.full(n, BY_RUNS),
            labels=dataset.schema.labels,
        )


@dataclass(frozen=True)
class Chat(_Named):
    """The stored turns as they are (joined by a template at import); pictures are slots.

    train_on: assistant = only segments of role assistant are scored, all = every token. features: the twin with the
    rows of feature segments; such a segment takes as many slot rows as the twin has for it. Stored labels are used,
    stored loss runs are not.
    """

    name = "chat"

    train_on: str = "assistant"
    features: str = ""

    def __post_init__(self) -> None:
        if self.train_on not in ("assistant", "all"):
            raise ValueError(f"chat: train_on is {self.train_on!r}; expected assistant or all")

    def weighted(self, schema: Schema) -> bool:
        return False

    def lengths(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> np.ndarray:
        if not self.features:
            return dataset.lengths(indices)
        return (dataset.lengths(indices) + self.extents(dataset, indices, epoch)[:, 0]).astype(np.int32)

    def extents(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> np.ndarray:
        """int32[n, 2]: slot rows and slot segments (frames) of the documents."""
        if not self.features:
            return np.zeros((len(indices), 2), dtype=np.int32)
        counts, cu = dataset.features(self.features).counts(indices)
        rows = np.diff(cumulative(counts)[cu])
        frames = np.diff(cumulative(counts > 0)[cu])
        return np.stack([rows, frames], axis=1).astype(np.int32)

    def compose(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> Pieces:
        segments, cu = dataset.segments(indices)
        sample_of = np.repeat(np.arange(len(indices)), np.diff(cu))
        is_slot = (segments["modality"] == Modality.FEATURE) & (segments["length"] == 0)
        start, count = segments["start"].astype(np.int32), segments["length"].astype(np.int32)
        bare = (np.diff(cu) == 0) & (dataset.lengths(indices) > 0)
        if bare.any():
            raise ValueError(_sample(dataset, indices, bare) + "has no segments; chat expects turns")
        if self.features:
            rows, _ = dataset.features(self.features).counts(indices)
            stray = (rows > 0) & ~is_slot
            if stray.any():
                raise ValueError(
                    _sample(dataset, indices, sample_of[stray])
                    + f"has rows of {self.features} at a segment with tokens; chat expects them at feature segments"
                )
            before = cumulative(rows)
            first = before[:-1] - before[cu[sample_of]]  # among all rows of the sample
            start, count = np.where(is_slot, first, start), np.where(is_slot, rows, count)
        elif is_slot.any():
            raise ValueError(
                _sample(dataset, indices, sample_of[is_slot])
                + "has feature segments; chat expects the name of the twin with their rows as its option features"
            )
        scored = (segments["role"] == Role.ASSISTANT) | (self.train_on == "all")
        return Pieces(
            cu=cu,
            sample=np.asarray(indices, dtype=np.int64)[sample_of],
            start=start.astype(np.int32),
            count=count.astype(np.int32),
            token=np.where(is_slot, SLOT, STORED).astype(np.int32),
            weight=scored.astype(np.float32),
            labels=dataset.schema.labels,
            features=self.features,
        )


COMPOSERS: dict[str, type] = {c.name: c for c in (TextToImage, LanguageModel, Chat)}


def make_composer(name: str, **options: Any) -> Composer:
    """A composer by the name that configs use. ValueError names an unknown composer or option and the known ones."""
    if name not in COMPOSERS:
        raise ValueError(_unknown("composer", name, COMPOSERS))
    known = [f.name for f in fields(COMPOSERS[name])]
    for option in options:
        if option not in known:
            raise ValueError(_unknown(f"option of the composer {name!r}", option, known))
    return COMPOSERS[name](**options)


def _unknown(what: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {what}: {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")


def _special(dataset: Dataset, name: str) -> int:
    if name not in dataset.schema.specials:
        raise ValueError(f"{dataset.name}: its text tokenizer has no special token {name!r}, which text_to_image needs")
    return dataset.schema.specials[name]


def _sample(dataset: Dataset, indices: np.ndarray, found: np.ndarray) -> str:
    """The beginning of an error about the first of `found`: flags int64[n] or places among the indices."""
    at = int(np.argmax(found)) if found.dtype == bool else int(found[0])
    return f"{dataset.name}: sample {int(dataset.keys(np.asarray(indices)[at : at + 1])[0]):#x} "
