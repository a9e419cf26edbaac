"""The rules of order, mixture, packer and plan in their plainest form: lists, scans and Python integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

import numpy as np

from vtrain.rng import fold, fold_array

ONE = 2**32


def slow_position(n: int, key: int, p: int) -> int:
    """The Feistel network of an order, one position at a time."""
    b = math.isqrt(n - 1) + 1
    a = -(-n // b)
    while True:
        x, y = divmod(p, b)
        for r in range(6):
            h = ((y, x)[r % 2] ^ fold(key, r)) & 0xFFFFFFFF
            h ^= h >> 16
            h = h * 0x85EBCA6B % ONE
            h ^= h >> 13
            h = h * 0xC2B2AE35 % ONE
            h ^= h >> 16
            if r % 2 == 0:
                x = (x + (h * a >> 32)) % a
            else:
                y = (y + (h * b >> 32)) % b
        p = x * b + y
        if p < n:
            return p


@cache
def slow_order(n: int, key: int) -> tuple[int, ...]:
    """All of an order; below 4096 samples a shuffle in which entry i swaps with one of 0..i."""
    if n >= 4096:
        return tuple(slow_position(n, key, p) for p in range(n))
    draws = (fold_array(key, np.arange(n)) >> np.uint64(32)).tolist()
    table = list(range(n))
    for i in range(n - 1, 0, -1):
        other = draws[i] * (i + 1) >> 32
        table[i], table[other] = table[other], table[i]
    return tuple(table)


def slow_block_order(n: int, key: int, block: int, opened: int) -> list[int]:
    """Blocks as lists: the full ones in the order of one key, the short one at a drawn place; windows by another."""
    blocks = [list(range(at, min(at + block, n))) for at in range(0, n, block)]
    count = len(blocks)
    full, short = [b for b in blocks if len(b) == block], [b for b in blocks if len(b) < block]
    shuffled = [full[i] for i in slow_order(len(full), fold(key, 0))] if full else []
    if short:
        shuffled.insert(fold(key, 1) * count >> 64, short[0])
    ids = []
    for number, at in enumerate(range(0, count, opened)):
        window = [i for b in shuffled[at : at + opened] for i in b]
        ids += [window[i] for i in slow_order(len(window), fold(key, 2 + number))]
    return ids


def slow_bins(
    lengths: Sequence[int],
    pack_tokens: int,
    max_documents: int,
    pool: int,
    extents: Sequence[tuple[int, int]] | None = None,
    caps: tuple[float, float] = (math.inf, math.inf),
) -> list[list[int]]:
    """Bins of sample numbers: oldest first while they fit, then the longest that fits, the oldest of equals."""
    coming = [(i, n, *(extents[i] if extents is not None else (0, 0))) for i, n in enumerate(lengths)]
    waiting, bins = [], []
    while coming or waiting:
        while coming and len(waiting) < pool:
            waiting.append(coming.pop(0))
        chosen = []
        while len(chosen) < max_documents:
            while coming and len(waiting) < pool:
                waiting.append(coming.pop(0))
            room = [limit - sum(c[k] for c in chosen) for k, limit in ((1, pack_tokens), (2, caps[0]), (3, caps[1]))]
            fitting = [w for w in waiting if all(w[k + 1] <= room[k] for k in range(3))]
            if not fitting:
                break
            take = waiting[0] if waiting[0] in fitting else max(fitting, key=lambda w: (w[1], -waiting.index(w)))
            waiting.remove(take)
            chosen.append(take)
        bins.append([c[0] for c in chosen])
    return bins


def slow_weight(points: list[tuple[int, float]], most: float, tokens: int) -> int:
    """u32 fixed point: constant before the first and after the last point, straight between, the later of a jump."""
    fixed = [(at, max(1, round(w / most * (ONE - 1))) if w > 0 else 0) for at, w in points]
    before = [p for p in fixed if p[0] <= tokens]
    after = [p for p in fixed if p[0] > tokens]
    if not before or not after:
        return before[-1][1] if before else after[0][1]
    (a, low), (b, high) = before[-1], after[0]
    return math.floor(low + Fraction(high - low) * (tokens - a) / (b - a))


def slow_shares(raw: list[int]) -> list[int]:
    """Weights that sum to 2^32, the rounding to the heaviest."""
    if not sum(raw):
        return raw
    shares = [max(1, w * ONE // sum(raw)) if w else 0 for w in raw]
    shares[raw.index(max(raw))] += ONE - sum(shares)
    return shares


@dataclass
class Place:
    """Where a source stands, and which size each of its epochs has."""

    epoch: int = 0
    position: int = 0
    deficit: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    skipped: int = 0


@dataclass
class SlowPlan:
    """`Plan` over sources by name, with all state in plain lists; `stage` changes what a stage may change."""

    sources: list
    composer: object
    seed: int
    pack_tokens: int
    bins_per_step: int
    max_documents: int
    overlong: str
    pool: int

    def __post_init__(self) -> None:
        self.tokens = 0
        self.places: dict[str, Place] = {}
        self.waiting: list[tuple] = []  # (name, epoch, position, start, stop; None = to the end)
        self.parked: dict[str, list[tuple]] = {}

    def stage(self, sources: list, **settings) -> None:
        names = [s.name for s in sources]
        back = [w for name in sorted(self.parked) if name in names for w in self.parked.pop(name)]
        for source in self.sources:
            if source.name not in names:
                self.parked[source.name] = [w for w in self.waiting if w[0] == source.name]
        self.sources = sources
        for name, value in settings.items():
            setattr(self, name, value)
        before = back + [w for w in self.waiting if w[0] in names]
        self.waiting = []
        for name, epoch, position, start, stop in before:
            full = self.measure(name, epoch, position)
            if full and start < full:
                self.place(name, epoch, position, start, full if stop is None or stop > full else stop, full)

    def source(self, name: str):
        return next(s for s in self.sources if s.name == name)

    def size(self, name: str, epoch: int) -> int:
        sizes = self.places.setdefault(name, Place()).sizes
        return sizes.setdefault(epoch, len(self.source(name).dataset))

    def index(self, name: str, epoch: int, position: int) -> int:
        n, dataset = self.size(name, epoch), self.source(name).dataset
        return slow_order(n, fold(self.seed, "order", dataset.uuid64, epoch))[position]

    def measure(self, name: str, epoch: int, position: int) -> int:
        """The composed length, 0 for a sample that is left out."""
        source, index = self.source(name), self.index(name, epoch, position)
        if source.dataset.excluded([index])[0]:
            return 0
        return int((source.composer or self.composer).lengths(source.dataset, np.array([index]), epoch)[0])

    def place(self, name: str, epoch: int, position: int, start: int, stop: int, full: int) -> int:
        """Let a sample wait, whole, cut or not at all; the tokens of it that do."""
        end = None if stop == full else stop
        if stop - start <= self.pack_tokens:
            self.waiting.append((name, epoch, position, start, end))
            return stop - start
        if self.overlong == "drop":
            return 0
        if self.overlong == "crop":
            self.waiting.append((name, epoch, position, start, end))
            return self.pack_tokens
        for at in range(start, stop, self.pack_tokens):
            last = at + self.pack_tokens >= stop
            self.waiting.append((name, epoch, position, at, end if last else at + self.pack_tokens))
        return stop - start

    def draw(self) -> bool:
        most = max(w for s in self.sources for _, w in s.points)
        places = [self.places.setdefault(s.name, Place()) for s in self.sources]
        open_ = [s.max_epochs is None or p.epoch < s.max_epochs for s, p in zip(self.sources, places)]
        points = sorted(at for s, o in zip(self.sources, open_) if o for at, _ in s.points if at > self.tokens)
        for tokens in (self.tokens, *points):  # where all that is scheduled for now has left, what comes next begins
            shares = slow_shares([slow_weight(s.points, most, tokens) if o else 0 for s, o in zip(self.sources, open_)])
            if any(shares):
                break
        if not any(shares):
            return False
        chosen = max((p.deficit + w, -i) for i, (p, w) in enumerate(zip(places, shares)) if w)
        number = -chosen[1]
        name, place = self.sources[number].name, places[number]
        self.size(name, place.epoch)
        full = self.measure(name, place.epoch, place.position)
        tokens = self.place(name, place.epoch, place.position, 0, full, full) if full else 0
        place.skipped += tokens == 0
        for p, share in zip(places, shares):
            p.deficit += share * tokens
        place.deficit -= ONE * tokens
        self.tokens += tokens
        place.position += 1
        if place.position == self.size(name, place.epoch):
            place.epoch, place.position = place.epoch + 1, 0
            self.size(name, place.epoch)
        return True

    def next_step(self) -> list[list[tuple]]:
        """Bins of (name, epoch, position, index, start, length, full)."""
        bins = []
        while len(bins) < self.bins_per_step:
            chosen, room = [], self.pack_tokens
            while len(chosen) < self.max_documents:
                while len(self.waiting) < self.pool and self.draw():
                    pass
                items = [self.item(w) for w in self.waiting]
                fitting = [i for i, item in enumerate(items) if item[5] <= room]
                if not fitting:
                    break
                take = 0 if items[0][5] <= room else max(fitting, key=lambda i: (items[i][5], -i))
                del self.waiting[take]
                chosen.append(items[take])
                room -= items[take][5]
            if not chosen:
                break
            bins.append(chosen)
        return bins

    def item(self, waiting: tuple) -> tuple:
        name, epoch, position, start, stop = waiting
        full = self.measure(name, epoch, position)
        length = min((full if stop is None else stop) - start, self.pack_tokens)
        return name, epoch, position, self.index(name, epoch, position), start, length, full
