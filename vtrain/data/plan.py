"""The global steps from lengths alone: mix the sources, skip and cut samples, pack them into bins.

Every rank plans the same steps, whatever their number, and composes only its own bins. `_host.Planner` draws and packs;
this module tells it what comes next of each source and spells its state.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from vtrain import _host
from vtrain._host import pack
from vtrain.data import plan_state
from vtrain.data.compose import Composer
from vtrain.data.mix import EXCLUDED, FILTERED, USE, Source, check_sources, fixed_points, plain
from vtrain.data.order import epoch_order
from vtrain.data.plan_state import EPOCH, POSITION, SOURCE, START, STOP

__all__ = ["Misfits", "Plan", "PlannedStep", "Source", "SourceReport", "bin_cost", "check_sources", "deal", "pack"]

OVERLONG = ("error", "drop", "split", "crop")  # in the order of C++'s enum
CUTTING = OVERLONG[2:]
POOL = 512  # waiting samples to choose from: 99.4 to 99.9 % fill; eight times more gains 0.1 %
CHUNK = 4096  # samples of a source whose order and lengths are computed at once

log = logging.getLogger(__name__)


@dataclass
class Misfits:
    """Samples of a source, so far, that were not used (over-long or beyond a cap, empty, excluded by the manifest,
    outside `where` or `tokens`) or cut (over-long)."""

    dropped: int = 0
    cropped: int = 0
    split: int = 0
    empty: int = 0
    excluded: int = 0
    filtered: int = 0


@dataclass
class SourceReport:
    """One source in one step.

    documents, tokens: of this step over all ranks. Of all steps so far and the samples that wait: epoch with its
    fraction, sample_share and token_share of what was drawn in all, misfits; finished: it has left the mixture.
    """

    documents: int
    tokens: int
    epoch: float
    misfits: Misfits
    sample_share: float
    token_share: float
    finished: bool


@dataclass
class PlannedStep:
    """n documents in `bins` bins: bin b holds documents bin_cu[b] .. bin_cu[b+1]-1.

    source int32[n]; epoch, position, index int64[n]: the place in that source's order and the number in its dataset;
    start, length int32[n]: composed tokens start .. start+length-1 go into the bin; full int32[n]: the composed length.
    """

    number: int
    source: np.ndarray
    epoch: np.ndarray
    position: np.ndarray
    index: np.ndarray
    start: np.ndarray
    length: np.ndarray
    full: np.ndarray
    bin_cu: np.ndarray  # int64[bins+1]
    reports: dict[str, SourceReport]

    @property
    def bins(self) -> int:
        return len(self.bin_cu) - 1

    @property
    def documents(self) -> int:
        return len(self.source)

    @property
    def tokens(self) -> int:
        return int(self.length.sum(dtype=np.int64))


class Plan:
    """The steps of a mixture; `next_step()` until None, when every source has reached its max_epochs.

    pack_tokens, max_documents: what a bin holds at most (a loader that pads with one more document asks for one less).
    bins_per_step: over all ranks. overlong: what happens to samples above pack_tokens: error, drop, split into pieces
    of pack_tokens, or crop; the last two are an error where the composer wants its documents whole. pool: samples that
    the packer can choose from; 1 = fill bins in order. caps: (slot rows, frames) of a bin at most, by the composers'
    `extents(dataset, indices, epoch) -> int32[n,2]`; cut samples count as many as they may have, those that no bin can
    hold are over-long.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        composer: Composer,
        *,
        seed: int,
        pack_tokens: int,
        bins_per_step: int,
        max_documents: int,
        overlong: str = "error",
        pool: int = POOL,
        caps: tuple[int, int] | None = None,
    ) -> None:
        if overlong not in OVERLONG:
            raise ValueError(f"overlong is {overlong!r}; expected one of {', '.join(OVERLONG)}")
        for name, value in {"pack_tokens": pack_tokens, "bins_per_step": bins_per_step, "pool": pool}.items():
            if value < 1:
                raise ValueError(f"loader: {name} is {value}; expected >= 1")
        self.sources, self.composer, self.caps = list(sources), composer, caps
        self.seed, self.pack_tokens, self.bins_per_step = seed, pack_tokens, bins_per_step
        self.max_documents, self.overlong, self.pool = max_documents, overlong, pool
        self.steps = 0
        self._parked: dict[str, dict[str, Any]] = {}
        self._sizes = [[(0, len(s.dataset))] for s in self.sources]  # per source: (first epoch, samples per epoch)
        self._orders: dict[int, tuple[tuple[int, int], Any]] = {}  # by source: (epoch, n) and its order
        self._points = fixed_points(self.sources)
        self._planner = self._new_planner()
        self._planner.start(0)
        self._active = [True] * len(self.sources)

    def next_step(self) -> PlannedStep | None:
        """The next step; it has fewer bins at the end of the data, and after it comes None."""
        planner = self._planner
        while (status := planner.run(self.bins_per_step)) != "step":
            if status != "feed":
                self._refuse(status)
            self._feed(planner.source)
        columns = planner.take()
        if not len(columns[0]):
            return None
        self._tell_finished()
        self.steps += 1
        return PlannedStep(self.steps - 1, *columns, self._reports(columns[0], columns[5]))

    def state(self) -> dict[str, Any]:
        """Where the plan stands after the last step. JSON-able, the same on all ranks."""
        for s in range(len(self.sources)):
            self._note_size(s)
        waiting = self._planner.waiting()
        return {
            "version": plan_state.VERSION,
            "step": self.steps,
            "tokens": self._planner.tokens,
            "settings": self._settings(),
            "sources": {source.name: self._row(s, waiting) for s, source in enumerate(self.sources)},
            "waiting": plan_state.spell_waiting(waiting),
            "parked": copy.deepcopy(self._parked),
        }

    def load(self, state: dict[str, Any], strict: bool = True) -> None:
        """Go on where `state` was taken; ValueError names all that differs.

        strict False, for a new stage or an appended dataset: other weights, budgets, composers and sources are taken.
        Cursors and waiting samples stay, sources that are not here are parked in the state until they come back. The
        seed, and the identity and order of a source that goes on, must be the same in any case.
        """
        if state.get("version") != plan_state.VERSION:
            raise ValueError(f"loader state: version {state.get('version')!r}; expected {plan_state.VERSION}")
        try:
            self._load(state, strict)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"loader state: not a state of a plan: {error!r}") from None

    def _load(self, state: dict[str, Any], strict: bool) -> None:
        rows, parked = dict(state["sources"]), dict(state["parked"])
        self._compare(state["settings"], rows, parked, strict)
        names, tables = list(state["settings"]["sources"]), []  # not of the object: JSON writers may sort its keys
        if set(names) != set(rows) or set(rows) & set(parked):
            raise ValueError(f"loader state: sources {names}, rows of {list(rows)}, parked {list(parked)}")
        here = {source.name: s for s, source in enumerate(self.sources)}
        for name in [name for name in sorted(parked) if name in here]:  # what was parked is older: it goes first
            rows[name] = parked.pop(name)
            tables.append(plan_state.read_waiting(rows[name]["waiting"]))
            tables[-1][SOURCE] = len(names)
            names.append(name)
        tables.append(plan_state.read_waiting(state["waiting"]))
        table = np.concatenate(tables, axis=1)
        if table.size and not 0 <= table[SOURCE].min() <= table[SOURCE].max() < len(names):
            raise ValueError(f"loader state: a waiting sample of source {table[SOURCE].max()}; it has {len(names)}")
        for number, name in enumerate(names):
            if name not in here:
                own = table[:, table[SOURCE] == number]
                own[SOURCE] = 0
                parked[name] = {**copy.deepcopy(rows[name]), "waiting": plan_state.spell_waiting(own)}
        numbers = np.array([here.get(name, -1) for name in names] or [0])[table[SOURCE]]
        table[SOURCE] = numbers
        fresh = copy.copy(self)
        fresh.steps, tokens = plan_state.integers([state["step"], state["tokens"]], 2, "step and tokens")
        if min(fresh.steps, tokens) < 0:
            raise ValueError(f"loader state: step {fresh.steps}, tokens {tokens}; expected >= 0")
        fresh._orders, fresh._parked = {}, parked
        fresh._resume({here[n]: row for n, row in rows.items() if n in here}, table[:, numbers >= 0], tokens)
        self.__dict__.update(fresh.__dict__)

    def _resume(self, rows: dict[int, dict[str, Any]], table: np.ndarray, tokens: int) -> None:
        """Make the planner that stands at the cursors of `rows` (by source) with the samples of `table` waiting."""
        planner = self._planner = self._new_planner()
        self._sizes = [[(0, len(s.dataset))] for s in self.sources]
        for s, row in rows.items():
            cursor, name = planner.cursor(s), self.sources[s].name
            at = plan_state.integers(row["at"], 5, f"the cursor of {name!r}")
            cursor.epoch, cursor.position, cursor.samples, cursor.tokens, deficit = at
            planner.set_deficit(s, deficit)
            for kind, count in row.get("misfits", {}).items():
                setattr(cursor, Misfits.__dataclass_fields__[kind].name, count)
            sizes = [plan_state.integers(size, 2, f"an epoch's size of {name!r}") for size in row["sizes"]]
            self._sizes[s] = sizes = [(first, n) for first, n in sizes]
            cursor.n = _size(sizes, cursor.epoch)
            if cursor.epoch < 0 or not 0 <= cursor.position < cursor.n <= len(self.sources[s].dataset):
                raise ValueError(
                    f"loader state: source {name!r} has {len(self.sources[s].dataset)} samples, its cursor is at "
                    f"{cursor.position} of {cursor.n} in epoch {cursor.epoch}"
                )
        planner.start(tokens)
        self._active = [planner.active(s) for s in range(len(self.sources))]
        wanted = self._look_up(table)
        if (bad := planner.restore(wanted)) >= 0:
            self._refuse_sample(int(wanted[0, bad]), int(wanted[3, bad]), int(wanted[6, bad]))

    def _look_up(self, table: np.ndarray) -> np.ndarray:
        """int64[9, n] for the planner: waiting samples with index, length and extents; those that are skipped now are
        left out and counted."""
        columns = np.zeros((9, table.shape[1]), dtype=np.int64)
        columns[[0, 1, 2, 4, 5]] = table[[SOURCE, EPOCH, POSITION, START, STOP]]
        keep = np.zeros(table.shape[1], dtype=bool)
        for s, epoch in sorted(set(zip(*table[[SOURCE, EPOCH]].tolist()))):
            own = np.flatnonzero((table[SOURCE] == s) & (table[EPOCH] == epoch))
            cursor, positions = self._planner.cursor(s), table[POSITION, own]
            passed = cursor.position if epoch == cursor.epoch else _size(self._sizes[s], epoch)
            if not 0 <= epoch <= cursor.epoch or positions.min() < 0 or positions.max() >= passed:
                raise ValueError(
                    f"loader state: a waiting sample at source {self.sources[s].name!r}, epoch {epoch}, positions "
                    f"{positions.min()}..{positions.max()}; {passed} of that epoch were drawn"
                )
            columns[3, own] = self._order(s, epoch, _size(self._sizes[s], epoch))(positions)
            lengths, extents, skip = self._measure(s, columns[3, own], epoch)
            columns[6, own] = lengths
            if extents is not None:
                columns[7:, own] = extents.T
            empty = (skip == USE) & (columns[4, own] >= lengths)
            keep[own] = (skip == USE) & ~empty
            cursor.excluded += int((skip == EXCLUDED).sum())
            cursor.filtered += int((skip == FILTERED).sum())
            cursor.empty += int(empty.sum())
        stop, full = columns[5], columns[6]
        columns[5] = np.where(stop >= full, 0, stop)
        return columns[:, keep]

    def _new_planner(self) -> _host.Planner:
        rows, frames = self.caps or (None, None)
        overlong = OVERLONG.index(self.overlong)
        planner = _host.Planner(self.pack_tokens, self.max_documents, self.pool, overlong, rows, frames)
        for source, (at, weights) in zip(self.sources, self._points):
            planner.add(at, weights, len(source.dataset), source.max_epochs or 0)
        return planner

    def _feed(self, s: int) -> None:
        """Tell the planner the next samples of a source."""
        cursor = self._planner.cursor(s)
        self._note_size(s)
        count = min(CHUNK, cursor.n - cursor.position)
        indices = self._order(s, cursor.epoch, cursor.n).range(cursor.position, count)
        self._planner.feed(s, indices, *self._measure(s, indices, cursor.epoch))

    def _order(self, s: int, epoch: int, n: int) -> Any:
        place, order = self._orders.get(s, (None, None))
        if place != (epoch, n):
            source = self.sources[s]
            order = epoch_order(source.order, n, self.seed, source.dataset.uuid64, epoch)
            self._orders[s] = (epoch, n), order
        return order

    def _measure(self, s: int, indices: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """(composed lengths int32[n], extents int32[n,2] if there are caps, skips u8[n]); 0 for skipped samples."""
        source = self.sources[s]
        composer = source.composer or self.composer
        skip = source.skips(indices)
        used = np.flatnonzero(skip == USE)
        lengths = np.zeros(len(indices), dtype=np.int32)
        extents = None
        if len(used):
            lengths[used] = composer.lengths(source.dataset, indices[used], epoch)
        if self.caps is not None:
            extents = np.zeros((len(indices), 2), dtype=np.int32)
            if len(used) and hasattr(composer, "extents"):
                extents[used] = composer.extents(source.dataset, indices[used], epoch)
        if source.tokens is not None:
            least, most = source.tokens
            skip[used[(lengths[used] < least) | (lengths[used] > most)]] = FILTERED
        if self.overlong in CUTTING and getattr(composer, "whole", False):
            for at in np.flatnonzero((skip == USE) & (lengths > self.pack_tokens))[:1].tolist():
                self._refuse_cut(s, int(indices[at]), int(lengths[at]))
        return lengths, extents, skip

    def _note_size(self, s: int) -> None:
        """An epoch keeps the samples it began with; the first one after an append begins with more."""
        cursor = self._planner.cursor(s)
        if self._sizes[s][-1][1] != cursor.n:
            self._sizes[s].append((cursor.epoch, cursor.n))

    def _refuse(self, status: str) -> None:
        s = self._planner.source
        if status == "overlong":
            self._refuse_sample(s, *self._planner.overlong)
        raise ValueError(
            f"source {self.sources[s].name!r}: {self._planner.cursor(s).n} samples in a row are empty, skipped or "
            f"longer than {self.pack_tokens} tokens; nothing to train on"
        )

    def _refuse_sample(self, s: int, index: int, length: int) -> None:
        caps = f" and (rows, frames) {self.caps}" if self.caps else ""
        raise ValueError(
            f"{self._long(s, index, length)}{caps}; expected smaller ones, or overlong = drop, split or crop"
        )

    def _refuse_cut(self, s: int, index: int, length: int) -> None:
        composer = (self.sources[s].composer or self.composer).settings()["name"]
        raise ValueError(
            f"{self._long(s, index, length)}; overlong = {self.overlong} would cut codes, and {composer} needs all: "
            "expected a larger pack_tokens, a smaller max_caption_tokens, or overlong = drop"
        )

    def _long(self, s: int, index: int, length: int) -> str:
        source = self.sources[s]
        key = int(source.dataset.keys(np.array([index]))[0])
        return f"source {source.name!r}: sample {index} (key {key:#x}) has {length} tokens, a bin {self.pack_tokens}"

    def _tell_finished(self) -> None:
        for s, source in enumerate(self.sources):
            if self._active[s] and not self._planner.active(s):
                self._active[s] = False
                log.info("source %r: %d epochs drawn, it leaves the mixture", source.name, source.max_epochs)

    def _reports(self, source: np.ndarray, length: np.ndarray) -> dict[str, SourceReport]:
        count = len(self.sources)
        documents = np.bincount(source, minlength=count).tolist()
        tokens = np.bincount(source, weights=length, minlength=count).astype(np.int64).tolist()
        cursors = [self._planner.cursor(s) for s in range(count)]
        samples_in_all, tokens_in_all = (
            max(1, sum(counts)) for counts in zip(*((c.samples, c.tokens) for c in cursors))
        )
        return {
            self.sources[s].name: SourceReport(
                documents[s],
                tokens[s],
                cursor.epoch + cursor.position / cursor.n,
                _misfits(cursor),
                cursor.samples / samples_in_all,
                cursor.tokens / tokens_in_all,
                not self._active[s],
            )
            for s, cursor in enumerate(cursors)
        }

    def _settings(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("seed", "pack_tokens", "bins_per_step", "max_documents")}
        found |= {"overlong": self.overlong, "pool": self.pool, "caps": self.caps, "composer": self.composer.settings()}
        found["sources"] = [source.name for source in self.sources]
        return plain(found)

    def _row(self, s: int, waiting: np.ndarray) -> dict[str, Any]:
        """What the state holds of a source: identity, settings, cursor, misfits."""
        cursor, row = self._planner.cursor(s), self._identity(s)
        epochs = waiting[EPOCH, waiting[SOURCE] == s]
        oldest = min(int(epochs.min()) if len(epochs) else cursor.epoch, cursor.epoch)
        sizes = self._sizes[s]
        kept = [size for size, after in pairwise(sizes) if after[0] > oldest] + sizes[-1:]
        row["sizes"] = [list(size) for size in kept]
        row["at"] = [cursor.epoch, cursor.position, cursor.samples, cursor.tokens, self._planner.deficit(s)]
        if misfits := {kind: count for kind, count in asdict(_misfits(cursor)).items() if count}:
            row["misfits"] = misfits
        return row

    def _identity(self, s: int) -> dict[str, Any]:
        source = self.sources[s]
        return {"uuid": f"{source.dataset.uuid64:016x}", "hash": source.dataset.hash[:16], **source.settings()}

    def _compare(self, settings: dict, rows: dict[str, dict], parked: dict[str, dict], strict: bool) -> None:
        moving = ("sizes", "at", "misfits", "waiting")
        known = rows if strict else rows | parked
        theirs = {n: {k: v for k, v in row.items() if k not in moving} for n, row in known.items()}
        ours = {source.name: self._identity(s) for s, source in enumerate(self.sources)}
        a = plan_state.flat({**settings, "source": theirs})
        b = plan_state.flat({**self._settings(), "source": ours})
        firm = tuple(f"source.{name}.{field}" for name in ours if name in theirs for field in ("uuid", "order"))
        always = {name for name in {*a, *b} if name == "seed" or name.startswith(firm)}
        plan_state.refuse_differences(a, b, only=None if strict else always)


def bin_cost(lengths: np.ndarray, bin_cu: np.ndarray, linear_cost: int) -> np.ndarray:
    """int64[bins]: what each bin costs a decoder layer, up to a factor: the sum of l^2 (attention) + linear_cost * l.

    lengths int[n] in the order of the bins, bin_cu int64[bins+1].
    """
    lengths = lengths.astype(np.int64)
    total = np.concatenate(([0], np.cumsum(lengths * (lengths + linear_cost))))
    return total[bin_cu[1:]] - total[bin_cu[:-1]]


def deal(costs: np.ndarray, rank: int, world: int, bins: int) -> list[int | None]:
    """The bins of one rank, one per micro-step: rank r gets bin a * world + r of the bins sorted by cost.

    Ranks that work at the same time so get bins of nearly equal cost. The sort is stable and puts the dearest first
    (the peak of memory comes at once). The list always has ceil(bins / world) entries, None where bins are missing.
    """
    order = np.argsort(-np.asarray(costs, dtype=np.int64), kind="stable").tolist()
    mine = range(rank, -(-bins // world) * world, world)
    return [order[i] if i < len(order) else None for i in mine]


def _size(sizes: list[tuple[int, int]], epoch: int) -> int:
    """Samples of an epoch, 0 where the list does not reach back so far."""
    return next((n for first, n in reversed(sizes) if first <= epoch), 0)


def _misfits(cursor: _host.Cursor) -> Misfits:
    return Misfits(**{name: getattr(cursor, name) for name in Misfits.__dataclass_fields__})
