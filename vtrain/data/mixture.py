"""Which source is drawn next: the one that is furthest behind its share of the tokens.

A pure state machine in integers. Every source keeps a cursor of its own (epoch, position), so weights only decide who
is drawn next, and no sample is lost or repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

WEIGHT_ONE = 2**32 - 1  # the fixed-point weight of the heaviest source


@dataclass
class Cursor:
    """Where a source stands: its next sample is `position` of `epoch`; `tokens` were drawn from it so far."""

    epoch: int = 0
    position: int = 0
    tokens: int = 0


class Mixture:
    """Sources by number. `next()` tells whom to draw from, `advance(source, tokens)` records what was drawn.

    weights: >= 0, relative; a source of weight 0 is never drawn. sizes: samples per epoch. max_epochs: per source, None
    = endless; a finished source leaves the mixture and the rest share its place in proportion.
    """

    def __init__(
        self, weights: Sequence[float], sizes: Sequence[int], max_epochs: Sequence[int | None] | None = None
    ) -> None:
        if not weights or min(weights) < 0 or not math.isfinite(sum(weights)) or max(weights) <= 0:
            raise ValueError(f"mixture weights {list(weights)}: expected finite numbers >= 0, one of them > 0")
        self.weights = [_fixed_point(w / max(weights)) for w in weights]
        self.sizes = list(sizes)
        self.max_epochs = list(max_epochs) if max_epochs is not None else [None] * len(self.sizes)
        self.cursors = [Cursor() for _ in self.sizes]
        self._settle()

    def next(self) -> int | None:
        """The source with the largest token deficit, ties to the first; None when all sources are finished."""
        return max(self._active, key=self._deficits.__getitem__) if self._active else None

    def advance(self, source: int, tokens: int) -> None:
        """The sample at the cursor of `source` was drawn and counts `tokens`."""
        cursor, deficits, weights = self.cursors[source], self._deficits, self.weights
        cursor.tokens += tokens
        for i in self._active:
            deficits[i] += weights[i] * tokens
        deficits[source] -= self._weight_sum * tokens
        cursor.position += 1
        if cursor.position == self.sizes[source]:
            cursor.epoch, cursor.position = cursor.epoch + 1, 0
            if cursor.epoch == self.max_epochs[source]:
                self._settle()

    def state(self) -> list[dict[str, int]]:
        """One {epoch, position, tokens} per source."""
        return [asdict(cursor) for cursor in self.cursors]

    def load(self, state: Sequence[dict[str, int]]) -> None:
        """Stand where `state` stood. ValueError when a cursor is outside its source."""
        if len(state) != len(self.sizes):
            raise ValueError(f"mixture state: {len(state)} cursors for {len(self.sizes)} sources")
        cursors = [Cursor(**{name: int(value) for name, value in s.items()}) for s in state]
        for number, (cursor, size) in enumerate(zip(cursors, self.sizes)):
            if not 0 <= cursor.position < size or cursor.epoch < 0 or cursor.tokens < 0:
                raise ValueError(f"mixture state: source {number} has {size} samples, its cursor is {cursor}")
        self.cursors = cursors
        self._settle()

    def _settle(self) -> None:
        """Find the unfinished sources and their deficits, weight * T - weight_sum * tokens, from the cursors.

        T counts one token more than was drawn: then the deficits sum to something positive, the first draw goes to
        the heaviest source and weight 0 is never drawn.
        """
        self._active = [
            i
            for i, cursor in enumerate(self.cursors)
            if self.weights[i] and (self.max_epochs[i] is None or cursor.epoch < self.max_epochs[i])
        ]
        self._weight_sum = sum(self.weights[i] for i in self._active)
        total = 1 + sum(self.cursors[i].tokens for i in self._active)
        self._deficits = [
            weight * total - self._weight_sum * cursor.tokens for weight, cursor in zip(self.weights, self.cursors)
        ]


def _fixed_point(share: float) -> int:
    return max(1, round(share * WEIGHT_ONE)) if share > 0 else 0
