"""From datasets to the packed batches of each step: mix, permute, pack, compose, read.

Every rank plans the same global step from lengths alone and makes only its own bins. What a step holds does not depend
on the number of ranks, and the state after a step (cursors and waiting samples) is a small JSON value. There are no
worker processes: one thread plans and fills, and its work is done in C++ without the GIL.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtrain.batch import PackedBatch
from vtrain.data.assemble import Assembler, chosen_documents, groups
from vtrain.data.buffers import Buffers
from vtrain.data.compose import Composer, LanguageModel
from vtrain.data.mix import Source, check_sources
from vtrain.data.order import StoredOrder
from vtrain.data.plan import POOL, Misfits, Plan, PlannedStep, SourceReport, bin_cost, deal
from vtrain.data.prefetch import prefetch
from vtrain.data.raw import RawAssembler, RawPacks
from vtrain.vocab import Vocabulary

if TYPE_CHECKING:
    from vtrain.data.reader import Dataset

STATE_EVERY = 16  # steps between states that are written down; those between are planned again when they are asked for
LINEAR_COST = 12288  # c of the bin cost l^2 + c*l: 6 x the width of the decoder, here 2048

log = logging.getLogger(__name__)


@dataclass
class Step:
    """One step as one rank sees it.

    batches: ceil(bins_per_step / world), all-padding ones where bins are missing. number: counts from 0. bins,
    documents, tokens: real ones over all ranks. sources: by name.
    """

    batches: list[PackedBatch] | RawPacks
    number: int
    bins: int
    documents: int
    tokens: int
    sources: dict[str, SourceReport]


class Loader:
    """Iterates the `Step`s of one rank; iterating again goes on after the last step that was handed out.

    composer: of all sources that have none of their own. pack_tokens: T of every batch. bins_per_step: batches of a
    step over all ranks. max_documents: S of every batch, the padding document included; default pack_tokens // 16 + 2.
    caps: slot rows and slot segments of a batch at most. overlong: what happens to samples above pack_tokens: error,
    drop, split or crop (counted). pool: samples that the packer can choose from. linear_cost: c of the cost l^2 + c*l
    by which bins are dealt to ranks.

    raw: steps hold `RawPacks`, the stored samples without labels, instead of batches. tables: what batches also carry,
    of batch.TABLES. prefetch: steps made ahead in a thread, 0 = none. readahead: steps planned before those, whose
    samples the kernel is told to fetch. pinned: batches lie in page-locked memory. prepare: called with every batch in
    the thread (other tables). The loader ends when every source has reached its max_epochs.
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
        caps: tuple[int, int] | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        overlong: str = "error",
        pool: int = POOL,
        linear_cost: int = LINEAR_COST,
        raw: bool = False,
        tables: Sequence[str] = (),
        prefetch: int = 2,
        readahead: int = 0,
        pinned: bool = False,
        prepare: Callable[[PackedBatch], PackedBatch] | None = None,
    ) -> None:
        _check_rank(rank, world)
        check_sources(sources, vocab)
        if isinstance(composer, str):
            raise ValueError(f"loader: composer {composer!r}; expected make_composer({composer!r})")
        self.sources, self.composer = list(sources), composer
        self.rank, self.world, self.bins_per_step, self.linear_cost = rank, world, bins_per_step, linear_cost
        self.prefetch, self.readahead, self.pinned, self.prepare = prefetch, readahead, pinned, prepare
        documents = _checked_documents(max_documents, pack_tokens)
        self._plan_options = {
            "seed": seed,
            "pack_tokens": pack_tokens,
            "bins_per_step": bins_per_step,
            "max_documents": documents - 1,  # one sequence of every batch is the padding document
            "overlong": overlong,
            "pool": pool,
            "caps": caps,
        }
        composers = [s.composer or composer for s in self.sources]
        self._make: Assembler | RawAssembler
        if raw:
            _check_raw(self.sources, composers, tables, prepare)
            self._make = RawAssembler(self.sources, pack_tokens=pack_tokens, max_documents=documents)
        else:
            self._make = Assembler(
                self.sources,
                composers,
                vocab,
                pack_tokens=pack_tokens,
                max_documents=documents,
                tables=tables,
                caps=caps,
            )
        self._state = self._plan().state()  # some steps ago
        self.steps = 0  # handed out, in all runs of which the state was taken up

    def __iter__(self) -> Iterator[Step]:
        plan = self._plan()
        plan.load(self.state_dict())
        with closing(prefetch(self._steps(plan), self.prefetch)) as steps:
            for step, self._state in steps:
                self.steps = step.number + 1
                yield step

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands after the last step that its iterator yielded. JSON-able, the same on all ranks."""
        if self._state["step"] < self.steps:
            plan = self._plan()
            plan.load(self._state)
            while plan.steps < self.steps:
                plan.next_step()
            self._state = plan.state()
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Go on where `state` was taken, on any number of ranks. Iterators made before must not be used any more.

        ValueError names every setting and dataset that differs. strict False takes what may change in a new stage:
        weights, budgets, composers, sources, datasets that have grown (see `Plan.load`).
        """
        plan = self._plan()
        plan.load(state, strict)
        self._state, self.steps = plan.state(), plan.steps

    def _plan(self) -> Plan:
        return Plan(self.sources, self.composer, **self._plan_options)

    def _steps(self, plan: Plan) -> Iterator[tuple[Step, dict[str, Any]]]:
        buffers = Buffers(self.pinned)
        for planned, bins, state in self._planned(plan):
            batches = self._make(planned, bins, buffers.take)
            if self.prepare:
                batches = [self.prepare(batch) for batch in batches]
            step = Step(batches, planned.number, planned.bins, planned.documents, planned.tokens, planned.reports)
            del batches
            yield step, state
            del step  # the memory of its batches is free as soon as the consumer drops them

    def _planned(self, plan: Plan) -> Iterator[tuple[PlannedStep, list[int | None], dict[str, Any]]]:
        """Steps, this rank's bins and a state of a little before; planned `readahead` steps before they are given."""
        ahead: deque[tuple[PlannedStep, list[int | None], dict[str, Any]]] = deque()
        state = plan.state()
        while True:
            while len(ahead) <= self.readahead and (planned := plan.next_step()) is not None:
                costs = bin_cost(planned.length, planned.bin_cu, self.linear_cost)
                bins = deal(costs, self.rank, self.world, self.bins_per_step)
                if self.readahead:
                    self._will_need(planned, bins)
                if plan.steps >= state["step"] + STATE_EVERY:
                    state = plan.state()
                ahead.append((planned, bins, state))
            if not ahead:
                return
            yield ahead.popleft()

    def _will_need(self, planned: PlannedStep, bins: Sequence[int | None]) -> None:
        documents, _ = chosen_documents(planned, bins)
        for source, _, places in groups(planned, documents):
            self.sources[source].dataset.will_need(planned.index[documents[places]])


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
    tables: Sequence[str] = (),
) -> Iterator[PackedBatch]:
    """One pass in stored order, for validation: every sample once over all ranks, bins filled in order.

    Rank r gets bins r, r + world, ...; all ranks get the same number of batches, all-padding ones at the end where bins
    are missing. Composed as epoch 0. Samples that were dropped or cut are reported in the log at the end.
    """
    _check_rank(rank, world)
    source = Source(dataset, max_epochs=1, order=StoredOrder())
    check_sources([source], vocab)
    documents = _checked_documents(max_documents, pack_tokens)
    plan = Plan(
        [source],
        composer,
        seed=0,
        pack_tokens=pack_tokens,
        bins_per_step=world,
        max_documents=documents - 1,
        overlong=overlong,
        pool=1,  # next fit
    )
    make = Assembler([source], [composer], vocab, pack_tokens=pack_tokens, max_documents=documents, tables=tables)
    misfits = Misfits()
    while (step := plan.next_step()) is not None:
        yield from make(step, [rank if rank < step.bins else None])
        misfits = step.reports[source.name].misfits
    if misfits != Misfits() and rank == 0:
        log.warning("%s: samples that do not fit %d tokens: %s", source.name, pack_tokens, misfits)


def _checked_documents(max_documents: int | None, pack_tokens: int) -> int:
    """Sequences per batch; when none are configured, room for documents of 16 tokens on average."""
    documents = pack_tokens // 16 + 2 if max_documents is None else max_documents
    if documents < 2:
        raise ValueError(f"loader: max_documents is {documents}; expected >= 2")
    return documents


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"loader: rank {rank} of {world}; expected 0..{world - 1}")


def _check_raw(sources: Sequence[Source], composers: Sequence[Composer], tables: Sequence[str], prepare: Any) -> None:
    for source, composer in zip(sources, composers):
        if not isinstance(composer, LanguageModel):
            raise ValueError(
                f"source {source.name!r}: raw packs hold samples as they are stored; its composer is "
                f"{composer.settings()['name']}, expected language_model"
            )
    if tables or prepare:
        raise ValueError("loader: raw packs have no tables and are not prepared; remove tables and prepare")
