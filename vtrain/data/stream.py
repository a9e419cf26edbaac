"""The mixed stream of samples: which sample of which source comes next, and how many tokens it will take.

Nothing is composed here: the stream reads lengths only, so every rank can follow the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vtrain.batch import Document
from vtrain.data.compose import Composer
from vtrain.data.mixture import Mixture
from vtrain.data.order import Order, epoch_key
from vtrain.vocab import Vocabulary

if TYPE_CHECKING:
    from vtrain.data.reader import Dataset

OVERLONG = ("error", "drop", "crop")
LOOK_AHEAD = 1024  # samples whose order and lengths are computed at once


@dataclass
class Source:
    """A dataset in a mixture.

    weight: relative share of the tokens; name: the dataset's unless given; max_epochs: None = endless.
    """

    dataset: Dataset
    weight: float = 1.0
    name: str = ""
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        self.name = self.name or self.dataset.name
        if not len(self.dataset):
            raise ValueError(f"source {self.name!r}: the dataset {self.dataset.name} is empty")
        if self.max_epochs is not None and self.max_epochs < 1:
            raise ValueError(f"source {self.name!r}: max_epochs is {self.max_epochs}; expected >= 1 or None")


class Sample(NamedTuple):
    """A drawn sample. index: its number in the dataset of `source`; length: the tokens it takes in a bin; cut: those
    that are cut off its end."""

    source: int
    epoch: int
    position: int
    index: int
    length: int
    cut: int = 0


@dataclass
class Misfits:
    """Samples of a source, so far, that were not used (over-long, empty) or cut (over-long)."""

    dropped: int = 0
    cropped: int = 0
    empty: int = 0


class Stream:
    """An iterator of (Sample, length): sources by token share, samples in the order of the epoch.

    overlong: what happens to samples above `pack_tokens`: error, drop or crop; samples without tokens are skipped. All
    are counted in `misfits` (by source number). stored_order: no shuffling. Ends when all sources reached max_epochs.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        composer: Composer,
        *,
        seed: int,
        pack_tokens: int,
        overlong: str,
        stored_order: bool = False,
    ) -> None:
        if overlong not in OVERLONG:
            raise ValueError(f"overlong is {overlong!r}; expected one of {', '.join(OVERLONG)}")
        self.sources, self.composer = sources, composer
        self.seed, self.pack_tokens, self.overlong, self.stored_order = seed, pack_tokens, overlong, stored_order
        self.mixture = Mixture(
            [s.weight for s in sources], [len(s.dataset) for s in sources], [s.max_epochs for s in sources]
        )
        self.misfits = [Misfits() for _ in sources]
        self._orders: dict[int, tuple[int, Order]] = {}  # by source: the epoch in use and its order
        self._ahead: dict[int, tuple[int, int, list[int], list[int]]] = {}  # by source: epoch, start, indices, lengths
        self._fruitless = [(0, 0)] * len(sources)  # tokens when the last useful sample came, misfits since

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[Sample, int]:
        mixture = self.mixture
        while (source := mixture.next()) is not None:
            epoch, position = mixture.cursors[source].epoch, mixture.cursors[source].position
            index, stored = self._look_up(source, epoch, position)
            length = stored if 0 < stored <= self.pack_tokens else self._misfit(source, index, stored)
            mixture.advance(source, length)
            if length:
                return Sample(source, epoch, position, index, length, stored - length), length
        raise StopIteration

    def state(self) -> list[dict[str, int]]:
        """Per source: cursor and misfits. JSON-able."""
        return [cursor | asdict(misfits) for cursor, misfits in zip(self.mixture.state(), self.misfits)]

    def load(self, state: Sequence[dict[str, int]]) -> None:
        names = Misfits.__dataclass_fields__
        self.mixture.load([{k: v for k, v in s.items() if k not in names} for s in state])
        self.misfits = [Misfits(**{k: int(s[k]) for k in names}) for s in state]
        self._fruitless = [(0, 0)] * len(state)

    def find(self, places: Sequence[Sequence[int]]) -> list[tuple[Sample, int]]:
        """Samples drawn earlier, from their [source, epoch, position]. ValueError for a place that was not passed."""
        found: list[tuple[Sample, int] | None] = [None] * len(places)
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (source, epoch, position) in enumerate(places):
            if not self._was_passed(source, epoch, position):
                raise ValueError(
                    f"loader state: a waiting sample at source {source}, epoch {epoch}, position {position}"
                )
            groups.setdefault((source, epoch), []).append(i)
        for (source, epoch), numbers in groups.items():
            positions = np.array([places[i][2] for i in numbers], dtype=np.int64)
            for i, index, stored in zip(numbers, *self._order_and_lengths(source, epoch, positions)):
                length = min(stored, self.pack_tokens)
                found[i] = Sample(source, epoch, places[i][2], index, length, stored - length), length
        return found

    def _was_passed(self, source: int, epoch: int, position: int) -> bool:
        if not (0 <= source < len(self.sources) and 0 <= position < len(self.sources[source].dataset)):
            return False
        cursor = self.mixture.cursors[source]
        return (0, 0) <= (epoch, position) < (cursor.epoch, cursor.position)

    def _look_up(self, source: int, epoch: int, position: int) -> tuple[int, int]:
        """(index, length) of one place; computed for LOOK_AHEAD places at a time."""
        ahead_epoch, start, indices, lengths = self._ahead.get(source, (-1, 0, [], []))
        if epoch != ahead_epoch or not 0 <= position - start < len(indices):
            start = position
            stop = min(start + LOOK_AHEAD, len(self.sources[source].dataset))
            indices, lengths = self._order_and_lengths(source, epoch, np.arange(start, stop))
            self._ahead[source] = epoch, start, indices, lengths
        return indices[position - start], lengths[position - start]

    def _order_and_lengths(self, source: int, epoch: int, positions: np.ndarray) -> tuple[list[int], list[int]]:
        dataset = self.sources[source].dataset
        if self.stored_order:
            indices = positions
        else:
            order_epoch, order = self._orders.get(source, (-1, None))
            if epoch != order_epoch:
                order = Order(len(dataset), epoch_key(self.seed, dataset.uuid64, epoch))
                self._orders[source] = epoch, order
            indices = order(positions)
        return indices.tolist(), self.composer.lengths(dataset, indices, epoch).tolist()

    def _misfit(self, source: int, index: int, length: int) -> int:
        """The tokens that an empty or over-long sample takes after all, counted; 0 = it is skipped."""
        name, dataset = self.sources[source].name, self.sources[source].dataset
        if length == 0:
            self.misfits[source].empty += 1
        elif self.overlong == "crop":
            self.misfits[source].cropped += 1
            return self.pack_tokens
        elif self.overlong == "drop":
            self.misfits[source].dropped += 1
        else:
            key = int(dataset.keys(np.array([index]))[0])
            raise ValueError(
                f"source {name!r}: sample {index} (key {key:#x}) has {length} tokens, a bin {self.pack_tokens}; "
                "expected shorter ones, or overlong = drop or crop"
            )
        tokens, misfits = self._fruitless[source]
        drawn = self.mixture.cursors[source].tokens
        misfits = misfits + 1 if tokens == drawn else 1
        self._fruitless[source] = drawn, misfits
        if misfits == len(dataset):
            raise ValueError(
                f"source {name!r}: {misfits} samples in a row are empty or longer than {self.pack_tokens} tokens; "
                "nothing to train on"
            )
        return 0


def compose_samples(sources: Sequence[Source], composer: Composer, samples: Sequence[Sample]) -> list[Document]:
    """The documents of `samples`, in their order: one call of the composer per source and epoch."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault((sample.source, sample.epoch), []).append(i)
    documents: list[Document | None] = [None] * len(samples)
    for (source, epoch), numbers in groups.items():
        dataset = sources[source].dataset
        indices = np.array([samples[i].index for i in numbers], dtype=np.int64)
        for i, document in zip(numbers, composer.compose(dataset, indices, epoch)):
            promised = samples[i].length + samples[i].cut
            if len(document) != promised:
                raise RuntimeError(
                    f"source {sources[source].name!r}: sample {samples[i].index} (key {document.key:#x}) was composed "
                    f"to {len(document)} tokens, its composer promised {promised}"
                )
            document.source = source
            documents[i] = _cropped(document, samples[i].length) if samples[i].cut else document
    return documents


def check_sources(sources: Sequence[Source], vocab: Vocabulary) -> None:
    """ValueError unless all sources mean the same by their ids; names both and the fields that differ."""
    if not sources:
        raise ValueError("no data sources; expected at least one")
    names = [s.name for s in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"data sources: names repeat: {', '.join(names)}")
    first = sources[0]
    for other in sources[1:]:
        a, b = _meaning(first), _meaning(other)
        differing = "; ".join(f"{field}: {a[field]} and {b[field]}" for field in a if a[field] != b[field])
        if differing:
            raise ValueError(f"sources {first.name!r} and {other.name!r} cannot be mixed: {differing}")
    if first.dataset.schema.vocab != vocab:
        raise ValueError(f"source {first.name!r}: its vocabulary is {first.dataset.schema.vocab}; expected {vocab}")


def _meaning(source: Source) -> dict[str, Any]:
    schema = source.dataset.schema
    return {
        "vocabulary": str(schema.vocab),
        "specials": dict(schema.specials),
        "text tokenizer": schema.text_tokenizer or "none",
        "image tokenizer": schema.image_tokenizer or "none",
    }


def _cropped(document: Document, length: int) -> Document:
    return replace(
        document,
        ids=document.ids[:length],
        loss=None if document.loss is None else document.loss[:length],
        positions=None if document.positions is None else document.positions[:length],
    )
