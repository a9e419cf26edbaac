"""What a dataset holds, in numbers, and what the packer will make of it. Shards are streamed; memory is bounded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from vtrain.data import exclude
from vtrain.data.format import Modality, Role, read_pages
from vtrain.data.order import Order
from vtrain.data.plan import pack
from vtrain.data.reader import Dataset
from vtrain.rng import fold_array

Progress = Callable[[int, int], None]
CHUNK = 1 << 16  # samples that are looked at together
KEYS_AT_ONCE = 1 << 25  # 256 MB; more keys are compared in several passes
FORECAST_SAMPLES = 1 << 20  # a random part of the dataset is packed: fill is known to 0.01 % long before
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
RANKS = (8, 64)
MICRO_STEPS = 4  # bins of a rank in a step
LINEAR_COST = 12288  # of a layer of width 2048: l^2 attention + 6 * 2048 * l for the rest
_TOKENS = ("TOK", "TOK1", "TOK2")


@dataclass(frozen=True)
class Forecast:
    """Bins of pack_tokens tokens, filled from `samples` samples in a random order; too_long ones do not fit.

    fill: share of the bins' tokens; it and documents are without the last bin. imbalance: by number of ranks, the
    dearest rank of a micro-step over the mean one, in the cost of a decoder layer; absent where bins are too few.
    """

    pack_tokens: int
    samples: int
    too_long: int
    bins: int
    fill: float
    documents: list[int]  # of a bin: least, median, most
    imbalance: dict[int, float]


@dataclass(frozen=True)
class Stats:
    """samples: all; excluded ones are in no other number but bytes. lengths: distinct lengths and how many samples have
    them. modalities: tokens by modality, "bare" = of samples without segments. kinds: samples with such a segment."""

    path: str
    generation: int
    hash: str
    shards: int
    samples: int
    excluded: int
    skipped: int
    tokens: int
    repeated_keys: int
    lengths: list[int]
    counts: list[int]
    modalities: dict[str, int]
    kinds: dict[str, int]
    file_bytes: int
    token_bytes: int
    twin_bytes: dict[str, int]
    raw_bytes_per_token: int
    stored_tokens: int
    forecasts: list[Forecast] = field(default_factory=list)

    def quantile(self, share: float) -> int:
        """The least length that so many of the samples do not exceed."""
        reached = np.cumsum(self.counts)
        at = int(np.searchsorted(reached, share * reached[-1])) if self.lengths else 0
        return self.lengths[at] if self.lengths else 0

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def describe(self) -> str:
        """The report, for people."""
        readable = self.samples - self.excluded
        lines = [
            f"{self.path}: generation {self.generation}, manifest hash {self.hash}",
            f"samples          {self.samples} in {self.shards} shards, {self.excluded} excluded, {self.skipped} source "
            f"records skipped, {self.repeated_keys} with the key of another",
            f"tokens           {self.tokens}, {self.tokens / max(readable, 1):.1f} a sample",
            "lengths          " + ", ".join(f"{name} {length}" for name, length in self._quantiles()),
            *self._byte_lines(),
            "",
            *_table("tokens by modality", self.modalities, max(self.tokens, 1)),
            *_table("samples that have", self.kinds, max(readable, 1)),
        ]
        if self.forecasts:
            lines += ["packing forecast, stored lengths in a random order", *_forecast_lines(self.forecasts)]
        return "\n".join(lines)

    def _quantiles(self) -> list[tuple[str, int]]:
        inner = [(f"{100 * q:g}%", self.quantile(q)) for q in QUANTILES]
        return [("least", self.quantile(0)), *inner, ("most", self.quantile(1))]

    def _byte_lines(self) -> list[str]:
        tokens = max(self.stored_tokens, 1)
        per_token = self.token_bytes / tokens
        fields = (self.file_bytes - self.token_bytes) / max(self.samples, 1)
        whole = self.file_bytes / tokens
        raw = self.raw_bytes_per_token
        lines = [
            f"bytes            {self.file_bytes}: {whole:.3f} a token; ids {per_token:.3f} a token, "
            f"the rest {fields:.1f} a sample",
            f"compression      {whole / 4:.3f} of int32 ids, {whole / raw:.3f} of u{8 * raw} ids, everything counted",
        ]
        return lines + [f"twin {name:<12}{size} bytes" for name, size in self.twin_bytes.items()]


def measure(dataset: Dataset, pack_tokens: Sequence[int] = (), progress: Progress | None = None) -> Stats:
    """Read lengths, segments and keys of all samples that are not excluded, and forecast bins of these sizes."""
    for budget in pack_tokens:
        if not 1 <= budget <= 2**27:  # what the packer takes
            raise ValueError(f"pack_tokens: {budget}; expected 1..{2**27}")
    listed = dataset.manifest
    kept = exclude.without(np.array([[0, len(dataset)]]), listed.excluded)
    lengths, modalities, kinds = _contents(dataset, kept, progress)
    footers = [read_pages(listed.folder / info.file)[0] for info in listed.shards]
    return Stats(
        path=str(dataset.path),
        generation=listed.generation,
        hash=listed.hash,
        shards=len(listed.shards),
        samples=len(dataset),
        excluded=listed.excluded_samples,
        skipped=listed.skipped,
        tokens=sum(length * count for length, count in lengths.items()),
        repeated_keys=_repeated_keys(dataset, kept),
        lengths=list(lengths),
        counts=list(lengths.values()),
        modalities=modalities,
        kinds=kinds,
        file_bytes=sum(info.bytes for info in listed.shards),
        token_bytes=sum(footer.sections[id].bytes for footer in footers for id in _TOKENS if id in footer.sections),
        twin_bytes={
            name: sum((listed.folder / entry["file"]).stat().st_size for entry in twin["files"] if entry)
            for name, twin in listed.twins.items()
        },
        raw_bytes_per_token=next(n for n in (1, 2, 4) if dataset.schema.vocab.size <= 256**n),
        stored_tokens=dataset.tokens,
        forecasts=_forecasts(dataset, kept, pack_tokens),
    )


def _chunks(kept: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers of the ranges' samples, at most CHUNK at a time."""
    for first, last in kept.tolist():
        for start in range(first, last, CHUNK):
            yield np.arange(start, min(last, start + CHUNK))


def _contents(
    dataset: Dataset, kept: np.ndarray, progress: Progress | None
) -> tuple[dict[int, int], dict[str, int], dict[str, int]]:
    """(samples by length, rising; tokens by modality; samples by role and modality of a segment they have)."""
    lengths: Counter[int] = Counter()
    tokens = np.zeros(len(Modality) + 1, dtype=np.int64)  # the last: of samples without segments
    kinds = np.zeros(len(Role) * len(Modality), dtype=np.int64)
    total, done = int((kept[:, 1] - kept[:, 0]).sum()), 0
    for numbers in _chunks(kept):
        own = dataset.lengths(numbers)
        lengths.update(dict(zip(*(column.tolist() for column in np.unique(own, return_counts=True)))))
        segments, cu = dataset.segments(numbers)
        tokens[:-1] += np.bincount(segments["modality"], segments["length"], len(Modality)).astype(np.int64)
        tokens[-1] += own[np.diff(cu) == 0].sum()
        sample = np.repeat(np.arange(len(numbers)), np.diff(cu))
        kind = segments["role"].astype(np.int64) * len(Modality) + segments["modality"]
        kinds += np.bincount(np.unique(sample * len(kinds) + kind) % len(kinds), minlength=len(kinds))
        done += len(numbers)
        if progress is not None:
            progress(done, total)
    names = [modality.name.lower() for modality in Modality]
    return (
        dict(sorted(lengths.items())),
        {name: count for name, count in zip([*names, "bare"], tokens.tolist()) if count},
        {
            f"{role.name.lower()} {name}": count
            for role in Role
            for name, count in zip(names, kinds[role * len(names) :].tolist())
            if count
        },
    )


def _repeated_keys(dataset: Dataset, kept: np.ndarray) -> int:
    """How many samples have a key that an earlier one has, exactly; keys are compared by classes of their hash."""
    total = int((kept[:, 1] - kept[:, 0]).sum())
    passes = -(-total // KEYS_AT_ONCE)
    repeated = 0
    for number in range(passes):
        found = []
        for samples in _chunks(kept):
            keys = dataset.keys(samples)
            found.append(keys[fold_array(0, keys) % np.uint64(passes) == number] if passes > 1 else keys)
        keys = np.sort(np.concatenate(found))
        repeated += int((keys[1:] == keys[:-1]).sum())
    return repeated


def _forecasts(dataset: Dataset, kept: np.ndarray, pack_tokens: Sequence[int]) -> list[Forecast]:
    """Of a random part of the samples: FORECAST_SAMPLES of them, or all."""
    sizes = kept[:, 1] - kept[:, 0]
    total = int(sizes.sum())
    if not total or not pack_tokens:
        return []
    rank = Order(total, 0)(np.arange(min(total, FORECAST_SAMPLES)))
    ends = np.cumsum(sizes)
    of_range = np.searchsorted(ends, rank, side="right")
    lengths = dataset.lengths(kept[of_range, 0] + rank - (ends - sizes)[of_range])
    return [forecast(lengths, budget) for budget in pack_tokens]


def forecast(lengths: np.ndarray, pack_tokens: int) -> Forecast:
    """Pack samples of these lengths (int32[n], in the order in which they arrive); empty ones are left out."""
    fitting = lengths[(lengths > 0) & (lengths <= pack_tokens)]
    order, cu = pack(fitting, pack_tokens)
    packed = fitting[order].astype(np.int64)
    sums = np.add.reduceat(packed, cu[:-1]) if len(packed) else packed
    costs = np.add.reduceat(packed * (packed + LINEAR_COST), cu[:-1]) if len(packed) else packed
    whole = slice(0, max(len(sums) - 1, 1))  # the last bin is what was left over
    documents = np.sort(np.diff(cu)[whole])
    return Forecast(
        pack_tokens=pack_tokens,
        samples=len(fitting),
        too_long=int((lengths > pack_tokens).sum()),
        bins=len(sums),
        fill=float(sums[whole].mean() / pack_tokens) if len(sums) else 0.0,
        documents=[int(documents[at]) for at in (0, len(documents) // 2, -1)] if len(documents) else [0, 0, 0],
        imbalance={ranks: found for ranks in RANKS if (found := _imbalance(costs, ranks)) is not None},
    )


def _imbalance(costs: np.ndarray, ranks: int) -> float | None:
    """The mean over micro-steps of the dearest rank's cost over the mean; steps of `ranks * MICRO_STEPS` bins."""
    bins = ranks * MICRO_STEPS
    steps = len(costs) // bins
    if not steps:
        return None
    dealt = -np.sort(-costs[: steps * bins].reshape(steps, bins), axis=1)
    together = dealt.reshape(steps * MICRO_STEPS, ranks)  # ranks that work at the same time get neighbours in cost
    return float((together.max(axis=1) / together.mean(axis=1)).mean())


def _table(title: str, counts: dict[str, int], whole: int) -> list[str]:
    rows = sorted(counts.items(), key=lambda row: -row[1])
    return [title, *(f"  {name:<20} {count:>14}  {100 * count / whole:6.2f} %" for name, count in rows), ""]


def _forecast_lines(forecasts: Sequence[Forecast]) -> list[str]:
    ranks = "".join(f"{f'{n} ranks':>11}" for n in RANKS)
    lines = [f"  {'bin':>8} {'fill %':>7} {'bins':>9} {'documents a bin':>18} {'too long':>9}{ranks}"]
    for f in forecasts:
        documents = f"{f.documents[0]}..{f.documents[1]}..{f.documents[2]}"
        balance = "".join(f"{f.imbalance[n]:>11.3f}" if n in f.imbalance else f"{'-':>11}" for n in RANKS)
        lines.append(f"  {f.pack_tokens:>8} {100 * f.fill:>7.2f} {f.bins:>9} {documents:>18} {f.too_long:>9}{balance}")
    some = forecasts[0]
    note = f"  {some.samples + some.too_long} samples packed; documents: least..median..most; ranks: dearest over mean "
    return [*lines, f"{note}cost of a layer, {MICRO_STEPS} micro-steps"]
