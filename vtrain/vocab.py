"""A vocabulary is an ordered list of named id ranges (text, visual, vbpe, ...), each stored as a table of its own.

Ids are global: `base` of a range is the sum of the sizes before it. A range's table has `rows` rows, its size padded
to a multiple of 128 (aligned matrix products, even shards); the padding is never an id and is stripped on export.
"""

from __future__ import annotations

import bisect
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROW_MULTIPLE = 128


@dataclass(frozen=True)
class Range:
    """Ids `base .. base + size - 1`, stored in a table of `rows` rows."""

    name: str
    base: int
    size: int

    @property
    def end(self) -> int:
        return self.base + self.size

    @property
    def rows(self) -> int:
        return -(-self.size // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class Vocabulary:
    """Ranges in id order. Build with `Vocabulary.of(text=151672, visual=64000)`."""

    ranges: tuple[Range, ...]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ValueError("a vocabulary needs at least one range")
        base = 0
        for r in self.ranges:
            if not (isinstance(r.name, str) and r.name.isidentifier()):  # tables are parameters of that name
                raise ValueError(f"vocabulary range {r.name!r}: expected a name of letters, digits and underscores")
            if r.base != base or r.size <= 0:
                raise ValueError(
                    f"vocabulary range {r.name!r}: base {r.base}, size {r.size}; expected base {base} and size > 0"
                )
            base = r.end
        if len({r.name for r in self.ranges}) != len(self.ranges):
            raise ValueError(f"vocabulary: range names repeat: {[r.name for r in self.ranges]}")
        if base >= 2**31:
            raise ValueError(f"vocabulary: {base} ids; ids are int32 in batches")

    @classmethod
    def of(cls, **sizes: int) -> Vocabulary:
        return cls.from_json(list(sizes.items()))

    @classmethod
    def from_json(cls, value: Sequence) -> Vocabulary:
        """The inverse of `to_json`: [["text", 151672], ["visual", 64000]]."""
        ranges, base = [], 0
        for name, size in value:  # names may repeat here: the constructor refuses them
            size = operator.index(size)  # TypeError for 1.5 and "64"
            ranges.append(Range(name, base, size))
            base += size
        return cls(tuple(ranges))

    def to_json(self) -> list:
        return [[r.name, r.size] for r in self.ranges]

    def __str__(self) -> str:
        return json.dumps(self.to_json())

    @property
    def size(self) -> int:
        return self.ranges[-1].end

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(r.name for r in self.ranges)

    @cached_property
    def bases(self) -> list[int]:
        return [r.base for r in self.ranges]

    @cached_property
    def sizes(self) -> list[int]:
        return [r.size for r in self.ranges]

    def __getitem__(self, name: str) -> Range:
        for r in self.ranges:
            if r.name == name:
                return r
        raise KeyError(f"the vocabulary has no range {name!r}; it has {', '.join(self.names)}")

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def index_of(self, token: int) -> int:
        """The number of the range that holds one id; ValueError outside the vocabulary."""
        if not 0 <= token < self.size:
            raise ValueError(f"id {token} is outside the vocabulary 0..{self.size - 1}")
        return bisect.bisect_right(self.bases, token) - 1

    def classify(self, ids: np.ndarray) -> np.ndarray:
        """The range number of every id, -1 for negative ids (ignored labels, slot rows). int8, shape of `ids`."""
        return (np.searchsorted(self.bases, ids, side="right") - 1).astype(np.int8)
