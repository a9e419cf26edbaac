"""What is mixed: datasets with their weights, filters and orders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from vtrain.data.compose import Composer
from vtrain.data.order import BlockOrder, StoredOrder
from vtrain.vocab import Vocabulary

if TYPE_CHECKING:
    from vtrain.data.reader import Dataset

USE, EXCLUDED, FILTERED = range(3)  # the skip codes of `_host.Planner`


@dataclass
class Source:
    """A dataset in a mixture.

    weight: relative share of the tokens, or points (tokens of the whole mixture, weight) with straight lines between
    them, two points at one count = a jump. name: the dataset's unless given. max_epochs: None = endless. composer: None
    = the loader's. where: column -> (least, most), both included; tokens: the same for composed lengths; samples
    outside are skipped and counted. order: None = all samples mixed.
    """

    dataset: Dataset
    weight: float | Sequence[tuple[int, float]] = 1.0
    name: str = ""
    max_epochs: int | None = None
    composer: Composer | None = None
    where: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None
    order: BlockOrder | StoredOrder | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dataset, (str, PathLike)):
            raise ValueError(f"source {self.dataset!r}: a path; expected Dataset(path)")
        self.name = self.name or self.dataset.name
        if not len(self.dataset):
            raise ValueError(f"source {self.name!r}: the dataset {self.dataset.name} is empty")
        if self.max_epochs is not None and self.max_epochs < 1:
            raise ValueError(f"source {self.name!r}: max_epochs is {self.max_epochs}; expected >= 1 or None")
        if not (self.order is None or isinstance(self.order, (BlockOrder, StoredOrder))):
            raise ValueError(f"source {self.name!r}: order {self.order!r}; expected a BlockOrder, StoredOrder or None")
        at = [point for point, _ in self.points]
        if not at or at != sorted(at) or any(a == c for a, c in zip(at, at[2:])):
            raise ValueError(
                f"source {self.name!r}: weight {self.weight}: expected points with rising token counts,"
                " at most two of one count"
            )
        columns = getattr(self.dataset.schema, "columns", {})
        for name in self.where:
            if name not in columns:
                known = ", ".join(columns) or "none"
                raise ValueError(f"source {self.name!r}: where names the column {name!r}; the dataset has {known}")

    @property
    def points(self) -> list[tuple[int, float]]:
        """The weight as points (tokens, weight)."""
        if isinstance(self.weight, Sequence):
            return [(int(at), float(weight)) for at, weight in self.weight]
        return [(0, float(self.weight))]

    def settings(self) -> dict[str, Any]:
        """JSON-able, without what is left at its default."""
        found: dict[str, Any] = {"weight": self.points if isinstance(self.weight, Sequence) else float(self.weight)}
        if self.composer is not None:
            found["composer"] = self.composer.settings()
        if self.order is not None:
            found["order"] = {"kind": type(self.order).__name__, **asdict(self.order)}
        optional = {"max_epochs": self.max_epochs, "tokens": self.tokens, "where": dict(self.where) or None}
        return plain(found | {name: value for name, value in optional.items() if value is not None})

    def skips(self, indices: np.ndarray) -> np.ndarray:
        """u8[n]: USE, EXCLUDED by the manifest or FILTERED by `where`. Reads nothing of excluded samples."""
        skip = np.zeros(len(indices), dtype=np.uint8)
        if hasattr(self.dataset, "excluded"):
            skip[self.dataset.excluded(indices)] = EXCLUDED
        for name, (least, most) in self.where.items():
            use = np.flatnonzero(skip == USE)
            values = self.dataset.column(name, indices[use])
            skip[use[~((values >= least) & (values <= most))]] = FILTERED
        return skip


def check_sources(sources: Sequence[Source], vocab: Vocabulary) -> None:
    """ValueError unless all sources mean the same by their ids; names both and the fields that differ."""
    if not sources:
        raise ValueError("no data sources; expected at least one")
    for source in sources:
        if not isinstance(source, Source):
            raise ValueError(f"data sources: found a {type(source).__name__}; expected Source(dataset)")
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


def fixed_points(sources: Sequence[Source]) -> list[tuple[list[int], list[int]]]:
    """Per source (token counts, u32 weights): the largest weight of all is 2**32 - 1, small ones stay above 0."""
    weights = [w for source in sources for _, w in source.points]
    shown = f"mixture weights {[s.weight for s in sources]}"
    if not weights or min(weights) < 0 or not math.isfinite(sum(weights)) or max(weights) <= 0:
        raise ValueError(f"{shown}: expected finite numbers >= 0, one of them > 0")
    times = sorted({at for source in sources for at, _ in source.points})
    between = [times[0] - 1, *((a + b) / 2 for a, b in pairwise(times)), times[-1] + 1]
    if not np.all(sum(np.interp(between, *zip(*source.points)) for source in sources) > 0):
        raise ValueError(f"{shown}: expected one of them > 0 at every number of tokens")
    one, most = 2**32 - 1, max(weights)
    return [
        ([at for at, _ in s.points], [max(1, round(w / most * one)) if w > 0 else 0 for _, w in s.points])
        for s in sources
    ]


def plain(value: Any) -> Any:
    """As it comes back from JSON: tuples as lists, numbers of numpy as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _meaning(source: Source) -> dict[str, Any]:
    schema = source.dataset.schema
    return {
        "vocabulary": str(schema.vocab),
        "specials": dict(schema.specials),
        "text tokenizer": schema.text_tokenizer or "none",
        "image tokenizer": schema.image_tokenizer or "none",
    }
