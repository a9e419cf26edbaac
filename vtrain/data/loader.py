"""From datasets to the packed batches of each step: mix, permute, pack, compose.

Every rank plans the same global step from lengths alone and composes only its own bins. What a step holds does not
depend on the number of ranks, and the state after a step (cursors and waiting samples) is a small JSON value.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from vtrain.batch import PackedBatch
from vtrain.data.compose import Composer
from vtrain.data.pack import POOL, Packer, bin_cost, deal
from vtrain.data.prefetch import prefetch
from vtrain.data.stream import Misfits, Sample, Source, Stream, check_sources, compose_samples
from vtrain.vocab import Vocabulary

if TYPE_CHECKING:
    from vtrain.data.reader import Dataset

STATE_VERSION = 1
LINEAR_COST = 12288  # c of the bin cost l^2 + c*l: 6 x the width of the decoder, here 2048

log = logging.getLogger(__name__)


@dataclass
class SourceReport:
    """One source in one step.

    documents, tokens: of this step over all ranks; epoch: epochs drawn so far, with their fraction; misfits: so far.
    """

    documents: int
    tokens: int
    epoch: float
    misfits: Misfits


@dataclass
class Step:
    """One step as one rank sees it.

    batches: ceil(bins_per_step / world), all-padding ones where bins are missing. number: counts from 0. bins,
    documents, tokens: real ones over all ranks. sources: by name.
    """

    batches: list[PackedBatch]
    number: int
    bins: int
    documents: int
    tokens: int
    sources: dict[str, SourceReport]


@dataclass(frozen=True)
class _Settings:
    """What decides the contents of the steps. A state is only good for the same settings."""

    seed: int
    pack_tokens: int
    bins_per_step: int
    max_documents: int
    overlong: str
    pool: int
    linear_cost: int

    def __post_init__(self) -> None:
        for name, least in {"pack_tokens": 1, "bins_per_step": 1, "max_documents": 2, "pool": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"loader: {name} is {getattr(self, name)}; expected >= {least}")


class Loader:
    """Iterates the `Step`s of one rank; iterating again goes on after the last step that was handed out.

    pack_tokens: T of every batch. bins_per_step: batches of a step over all ranks. max_documents: S of every batch, the
    padding document included; default pack_tokens // 16 + 2. overlong: what happens to samples above pack_tokens:
    error, drop or crop (counted). prefetch: steps made ahead in a thread, 0 = none. pool: samples that the packer can
    choose from. linear_cost: c of the cost l^2 + c*l by which bins are dealt to ranks. prepare: called with every batch
    in the thread (pinning, host tables). The loader ends when every source has reached its max_epochs.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        composer: Composer,
        vocab: Vocabulary,
        *,
        pack_tokens: int,
        bins_per_step: int,
        max_documents: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        overlong: str = "error",
        prefetch: int = 2,
        pool: int = POOL,
        linear_cost: int = LINEAR_COST,
        prepare: Callable[[PackedBatch], PackedBatch] | None = None,
    ) -> None:
        _check_rank(rank, world)
        check_sources(sources, vocab)
        self.sources, self.composer, self.vocab = list(sources), composer, vocab
        self.rank, self.world, self.prefetch, self.prepare = rank, world, prefetch, prepare
        self.settings = _Settings(
            seed=seed,
            pack_tokens=pack_tokens,
            bins_per_step=bins_per_step,
            max_documents=default_documents(pack_tokens) if max_documents is None else max_documents,
            overlong=overlong,
            pool=pool,
            linear_cost=linear_cost,
        )
        self._weighted = any(composer.weighted(s.dataset.schema) for s in self.sources)
        self._progress = self._plan().progress()

    def __iter__(self) -> Iterator[Step]:
        with closing(prefetch(self._steps(self._progress), self.prefetch)) as steps:
            for step, progress in steps:
                self._progress = progress
                yield step

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands after the last step that its iterator yielded. JSON-able, the same on all ranks."""
        return {"version": STATE_VERSION, "settings": self._identity(), "progress": copy.deepcopy(self._progress)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, on any number of ranks. Iterators made before must not be used any more.

        ValueError names every setting and dataset that differs.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"loader state: version {state.get('version')!r}; expected {STATE_VERSION}")
        theirs, ours = _flat(state["settings"]), _flat(self._identity())
        differing = [
            f"{name} is {theirs.get(name)!r} in the state and {ours.get(name)!r} here"
            for name in dict.fromkeys([*ours, *theirs])
            if theirs.get(name) != ours.get(name)
        ]
        if differing:
            raise ValueError(f"loader state: made with other settings: {'; '.join(differing)}")
        self._progress = self._plan(state["progress"]).progress()

    def _identity(self) -> dict[str, Any]:
        """All that must be equal for a state to be good, by the names that an error shows."""
        sources = {
            s.name: {"hash": s.dataset.hash, "weight": float(s.weight), "max_epochs": s.max_epochs}
            for s in self.sources
        }
        return {
            **asdict(self.settings),
            "composer": self.composer.settings(),
            "sources": list(sources),
            "source": sources,
        }

    def _plan(self, progress: dict[str, Any] | None = None) -> _Plan:
        return _Plan(self.sources, self.composer, self.settings, progress)

    def _steps(self, progress: dict[str, Any]) -> Iterator[tuple[Step, dict[str, Any]]]:
        plan = self._plan(progress)
        while bins := plan.next_bins():
            step = Step(
                batches=self._batches(bins),
                number=plan.steps - 1,
                bins=len(bins),
                documents=sum(len(b) for b in bins),
                tokens=sum(sample.length for b in bins for sample in b),
                sources=plan.reports(bins),
            )
            yield step, plan.progress()

    def _batches(self, bins: list[list[Sample]]) -> list[PackedBatch]:
        """The batches of this rank, in micro-step order."""
        costs = [bin_cost((sample.length for sample in b), self.settings.linear_cost) for b in bins]
        numbers = deal(costs, self.rank, self.world, self.settings.bins_per_step)
        mine = [bins[i] if i is not None else [] for i in numbers]
        documents = iter(compose_samples(self.sources, self.composer, [sample for b in mine for sample in b]))
        batches = [
            PackedBatch.build(
                list(islice(documents, len(b))),
                self.vocab,
                pack_tokens=self.settings.pack_tokens,
                max_documents=self.settings.max_documents,
                weighted=self._weighted,
            )
            for b in mine
        ]
        return [self.prepare(batch) for batch in batches] if self.prepare else batches


class _Plan:
    """The global steps as lists of samples: the part of the loader that is the same on every rank."""

    def __init__(
        self, sources: Sequence[Source], composer: Composer, settings: _Settings, progress: dict[str, Any] | None
    ) -> None:
        self.sources = sources
        self.bins_per_step = settings.bins_per_step
        self.steps = 0
        self.stream = Stream(
            sources,
            composer,
            seed=settings.seed,
            pack_tokens=settings.pack_tokens,
            overlong=settings.overlong,
        )
        waiting: list[tuple[Sample, int]] = []
        if progress is not None:
            self.steps = int(progress["step"])
            self.stream.load(progress["sources"])
            waiting = self.stream.find(progress["waiting"])
        # One sequence of every batch is the padding document.
        self.packer = Packer(self.stream, settings.pack_tokens, settings.max_documents - 1, settings.pool, waiting)

    def next_bins(self) -> list[list[Sample]]:
        """The bins of the next step; fewer than bins_per_step at the end of the data, none after it."""
        bins = list(islice(self.packer, self.bins_per_step))
        self.steps += bool(bins)
        return bins

    def progress(self) -> dict[str, Any]:
        """Steps planned, cursors of the sources, and [source, epoch, position] of every waiting sample."""
        waiting = [[sample.source, sample.epoch, sample.position] for sample, _ in self.packer.waiting()]
        return {"step": self.steps, "sources": self.stream.state(), "waiting": waiting}

    def reports(self, bins: list[list[Sample]]) -> dict[str, SourceReport]:
        documents, tokens = [0] * len(self.sources), [0] * len(self.sources)
        for sample in (sample for b in bins for sample in b):
            documents[sample.source] += 1
            tokens[sample.source] += sample.length
        epochs = [c.epoch + c.position / n for c, n in zip(self.stream.mixture.cursors, self.stream.mixture.sizes)]
        misfits = [copy.copy(m) for m in self.stream.misfits]
        names = [s.name for s in self.sources]
        return {name: SourceReport(*row) for name, *row in zip(names, documents, tokens, epochs, misfits)}


def sequential_batches(
    dataset: Dataset,
    composer: Composer,
    vocab: Vocabulary,
    *,
    pack_tokens: int,
    max_documents: int | None = None,
    rank: int = 0,
    world: int = 1,
    overlong: str = "error",
) -> Iterator[PackedBatch]:
    """One pass in stored order, for validation: every sample once over all ranks, bins filled in order.

    Rank r gets bins r, r + world, ...; all ranks get the same number of batches, all-padding ones at the end where bins
    are missing. Composed as epoch 0. Samples that were dropped or cropped are reported in the log at the end.
    """
    _check_rank(rank, world)
    source = Source(dataset, max_epochs=1)
    check_sources([source], vocab)
    documents = default_documents(pack_tokens) if max_documents is None else max_documents
    stream = Stream([source], composer, seed=0, pack_tokens=pack_tokens, overlong=overlong, stored_order=True)
    bins = _fill_in_order(stream, pack_tokens, documents - 1)
    while group := list(islice(bins, world)):
        yield PackedBatch.build(
            compose_samples([source], composer, group[rank]) if rank < len(group) else [],
            vocab,
            pack_tokens=pack_tokens,
            max_documents=documents,
            weighted=composer.weighted(dataset.schema),
        )
    if stream.misfits[0] != Misfits() and rank == 0:
        log.warning("%s: samples that do not fit %d tokens: %s", source.name, pack_tokens, stream.misfits[0])


def default_documents(pack_tokens: int) -> int:
    """Sequences per batch when none is configured: room for documents of 16 tokens on average."""
    return pack_tokens // 16 + 2


def _fill_in_order(
    stream: Iterable[tuple[Sample, int]], pack_tokens: int, max_documents: int
) -> Iterator[list[Sample]]:
    """Next fit: a bin ends where the next sample does not fit."""
    samples: list[Sample] = []
    room = pack_tokens
    for sample, length in stream:
        if length > room or len(samples) == max_documents:
            yield samples
            samples, room = [], pack_tokens
        samples.append(sample)
        room -= length
    if samples:
        yield samples


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"loader: rank {rank} of {world}; expected 0..{world - 1}")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts with dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return flat
