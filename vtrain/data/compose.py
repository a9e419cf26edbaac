"""Composers turn stored facts (captions, code grids, turns) into finished sequences.

Everything random is drawn from (seed, epoch, sample key), so a document is the same on any rank and after any resume.
`lengths` reads no tokens: mixture, packer and cost need only it, and it must equal what `compose` makes.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vtrain.batch import Document
from vtrain.data.format import Modality, Role
from vtrain.data.samples import unpack_runs
from vtrain.rng import fold, uniform

if TYPE_CHECKING:
    from vtrain.data.format import Schema
    from vtrain.data.reader import Dataset

T2I, SOI = "<|t2i|>", "<|soi|>"


class Composer(Protocol):
    """What the loader asks of a composer. indices: int64[n] sample numbers of `dataset`; epoch: of that dataset."""

    def lengths(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> np.ndarray:
        """int32[n], exactly the lengths of what `compose` makes."""

    def compose(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> list[Document]:
        """n documents, keyed by their sample keys."""

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
    """`<|t2i|>` caption `<|soi|>` codes; without its caption `<|t2i|><|soi|>` codes.

    A sample has any number of captions (text segments of role input, one is drawn uniformly) and one picture (an image
    segment of role target). drop_caption: probability of leaving the caption out. text_weight: loss weight of caption
    and `<|soi|>` as targets (0 = codes only; codes weigh 1). max_caption_tokens: longer captions lose their end, 0 = no
    limit; codes are never cut.
    """

    name = "text_to_image"

    drop_caption: float = 0.1
    text_weight: float = 1.0
    max_caption_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop_caption <= 1:
            raise ValueError(f"text_to_image: drop_caption is {self.drop_caption}; expected 0..1")
        if not 0 <= self.text_weight < float("inf"):
            raise ValueError(f"text_to_image: text_weight is {self.text_weight}; expected a number >= 0")
        if self.max_caption_tokens < 0:
            raise ValueError(f"text_to_image: max_caption_tokens is {self.max_caption_tokens}; expected >= 0")

    def weighted(self, schema: Schema) -> bool:
        return self.text_weight not in (0.0, 1.0)

    def lengths(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> np.ndarray:
        _, caption_length, _, image_length = self._parts(dataset, indices, epoch)
        return (2 + caption_length + image_length).astype(np.int32)

    def compose(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> list[Document]:
        t2i, soi = (np.array([_special(dataset, name)], dtype=np.int32) for name in (T2I, SOI))
        parts = self._parts(dataset, indices, epoch)
        ids, cu = dataset.read(indices)
        documents = []
        for start, key, caption_at, caption, image_at, image in zip(cu[:-1], dataset.keys(indices).tolist(), *parts):
            caption_ids = ids[start + caption_at : start + caption_at + caption]
            codes = ids[start + image_at : start + image_at + image]
            loss = None
            if self.text_weight != 1:
                loss = np.full(2 + caption + image, self.text_weight, dtype=np.float32)
                loss[2 + caption :] = 1.0
            documents.append(Document(np.concatenate((t2i, caption_ids, soi, codes)), key=key, loss=loss))
        return documents

    def _parts(
        self, dataset: Dataset, indices: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """int64[n] each: start in the sample and length of the caption (length 0 = left out) and of the codes."""
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
        first = np.cumsum(captions) - captions
        choice = first + np.floor(self._draw(keys, epoch, "caption") * captions).astype(np.int64)
        kept = (captions > 0) & (self._draw(keys, epoch, "drop_caption") >= self.drop_caption)
        caption_at, caption_length = np.zeros((2, len(indices)), dtype=np.int64)
        chosen = segments[is_caption][choice[kept]]
        caption_at[kept], caption_length[kept] = chosen["start"], chosen["length"]
        if self.max_caption_tokens:
            caption_length = np.minimum(caption_length, self.max_caption_tokens)
        return caption_at, caption_length, image_at, image_length

    def _draw(self, keys: np.ndarray, epoch: int, field: str) -> np.ndarray:
        return uniform(fold(self.seed, epoch), keys ^ np.uint64(fold(0, field)))


@dataclass(frozen=True)
class LanguageModel(_Named):
    """The sample's ids as they are, scored by the sample's loss runs (none = every token)."""

    name = "language_model"

    def weighted(self, schema: Schema) -> bool:
        return any(weight not in (0.0, 1.0) for weight in schema.loss_weights)

    def lengths(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> np.ndarray:
        return dataset.lengths(indices)

    def compose(self, dataset: Dataset, indices: np.ndarray, epoch: int) -> list[Document]:
        ids, cu = dataset.read(indices)
        runs, run_cu = dataset.loss_runs(indices)
        run_lengths, run_classes = unpack_runs(runs)
        run_weights = np.array(dataset.schema.loss_weights, dtype=np.float32)[run_classes]
        documents = []
        for i, key in enumerate(dataset.keys(indices).tolist()):
            own = slice(run_cu[i], run_cu[i + 1])
            loss = np.repeat(run_weights[own], run_lengths[own]) if own.start < own.stop else None
            documents.append(Document(ids[cu[i] : cu[i + 1]], key=key, loss=loss))
        return documents


COMPOSERS: dict[str, type] = {c.name: c for c in (TextToImage, LanguageModel)}


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
