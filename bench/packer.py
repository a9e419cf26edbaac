"""The order of an epoch and the packing of bins: rates, evenness, fill, and what the ranks of a step wait for.

    PYTHONPATH=. python bench/packer.py [--rounds 5] [--out FILE] [--quick]

order      rates in millions of positions per second beside numpy's permutation (8 bytes a sample); evenness as mean
           chi2 / df over keys and sizes, 1 = random: of positions, of low bits, of the steps from a sample to the next
packing    2^20 samples of five length laws: rate, fill; `ranks` is the mean over steps of max / mean over 64 ranks, of
           sum l^2 with a bin a rank, and of a layer's cost l^2 + c l with the 4 bins a rank of a step dealt by cost
Bins of best-fit-decreasing packers are shuffled first: they come sorted by length, which no training could use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from harness import Rows

from vtrain.data.order import Order
from vtrain.data.plan import pack
from vtrain.data.samples import cumulative

RANKS = 64
MICRO_STEPS = 4
LINEAR_COST = 6 * 2048  # c of a layer's cost: the width of the model is 2048
CHUNK = 1 << 20  # positions of a call
BINS = 64  # of the contingency tables
STEP_BINS = 1024
SIZES = (10_007, 1_000_003, 10_000_019)
WINDOW = 16384  # samples that a best-fit-decreasing packer sees at once
Bins = tuple[np.ndarray, np.ndarray]  # order int64[n] of the samples, bin_cu int64[bins + 1]


def grids(random: np.random.Generator, n: int, longest_text: int) -> np.ndarray:
    """Pictures of four sizes, small ones more often, and their captions."""
    return random.choice([256, 576, 1024, 2048], n, p=[0.4, 0.3, 0.2, 0.1]) + random.integers(16, longest_text + 1, n)


def clips(random: np.random.Generator, n: int) -> np.ndarray:
    return np.where(random.random(n) < 0.02, 4096 + random.integers(16, 129, n), grids(random, n, 128))


# Name -> (pack_tokens, lengths of n samples).
LAWS: dict[str, tuple[int, Callable[[np.random.Generator, int], np.ndarray]]] = {
    "uniform 64-1300": (8192, lambda random, n: random.integers(64, 1301, n)),
    "grids 256-2048 + text 16-384": (8192, lambda random, n: grids(random, n, 384)),
    "grids 256-2048 + text 16-128": (8192, lambda random, n: grids(random, n, 128)),
    "grids + 2 % clips of 4096": (16384, clips),
    "lognormal 32-8192": (8192, lambda random, n: np.clip(random.lognormal(6.0, 1.2, n), 32, 8192).astype(np.int64)),
}


def vtrain_ids(n: int, key: int) -> Iterator[np.ndarray]:
    order = Order(n, key)
    for first in range(0, n, CHUNK):
        yield order.range(first, min(CHUNK, n - first))


def numpy_ids(n: int, key: int) -> Iterator[np.ndarray]:
    yield np.random.default_rng(key).permutation(n)


# The ids of an epoch in its order, in pieces.
ORDERS = {"numpy permutation": numpy_ids, "vtrain Order": vtrain_ids}


def order_rates(rows: Rows, rounds: int, sizes: tuple[int, ...]) -> None:
    for n in sizes:
        baseline = None
        for name, ids in ORDERS.items():
            values = []
            for key in range(rounds + 1):
                start = time.perf_counter()
                for _ in ids(n, key):
                    pass
                values.append(n / (time.perf_counter() - start) / 1e6)
            row = rows.add("order", name, values[1:], "M/s", shape={"samples": n}, baseline=baseline)
            baseline = baseline or row["p50"]


def table_chi2(a: np.ndarray, b: np.ndarray) -> float:
    """chi2 / df of two columns of numbers below BINS: 1 when they have nothing to do with one another."""
    table = np.bincount(a * BINS + b, minlength=BINS * BINS).reshape(BINS, BINS).astype(np.float64)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum() / (BINS - 1) ** 2)


def evenness(ids: np.ndarray) -> dict[str, float]:
    n = len(ids)
    positions = np.arange(n)
    steps = (ids[1:] - ids[:-1]) % n
    found = np.bincount(steps * STEP_BINS // n, minlength=STEP_BINS)
    expected = (n - 1) / STEP_BINS
    return {
        "chi2/df of positions": table_chi2(positions * BINS // n, ids * BINS // n),
        "chi2/df of low bits": table_chi2(positions % BINS, ids % BINS),
        "chi2/df of steps": float(((found - expected) ** 2).sum() / expected / (STEP_BINS - 1)),
        "|serial r|": abs(float(np.corrcoef(ids[:-1], ids[1:])[0, 1])),
    }


def order_evenness(rows: Rows, keys: int, sizes: tuple[int, ...]) -> None:
    for name, ids in ORDERS.items():
        found = [evenness(np.concatenate(list(ids(n, key)))) for n in sizes for key in range(keys)]
        for statistic in found[0]:
            values = [f[statistic] for f in found]
            mean = round(float(np.mean(values)), 4)
            rows.add(f"order, {statistic}", name, values, "", shape={"samples": sizes, "keys": keys}, mean=mean)


def next_fit(lengths: np.ndarray, pack_tokens: int) -> Bins:
    starts, room = [0], pack_tokens
    for number, length in enumerate(lengths.tolist()):
        if length > room:
            starts.append(number)
            room = pack_tokens
        room -= length
    return np.arange(len(lengths)), np.array([*starts, len(lengths)])


def olmo(lengths: np.ndarray, pack_tokens: int) -> Bins:
    from olmo_core.data.utils import InstancePacker

    parts = []
    for first in range(0, len(lengths), WINDOW):
        stops = np.cumsum(lengths[first : first + WINDOW])
        spans = np.stack([stops - lengths[first : first + WINDOW], stops], axis=1)
        bins, spans, _ = InstancePacker(pack_tokens).pack_documents(spans)
        numbers = first + np.searchsorted(stops, spans[:, 0], side="right")
        parts += [numbers[b] for b in bins]
    return np.concatenate(parts), cumulative(np.array([len(p) for p in parts]))


def trl(lengths: np.ndarray, pack_tokens: int) -> Bins:
    """It moves the tokens as well: one byte each here, the number of the sample in its first four."""
    import pyarrow as pa
    from datasets import Dataset
    from trl import pack_dataset

    cu = cumulative(lengths)
    tokens = np.zeros(cu[-1], dtype=np.uint8)
    tokens[cu[:-1, None] + np.arange(4)] = np.arange(len(lengths), dtype="<u4").view(np.uint8).reshape(-1, 4)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(cu, pa.int32()), pa.array(tokens))})
    options = {"batch_size": WINDOW, "keep_in_memory": True}
    packed = pack_dataset(Dataset(table), pack_tokens, strategy="bfd", map_kwargs=options).with_format("arrow")[:]
    sizes = packed["seq_lengths"].combine_chunks()
    flat = packed["input_ids"].combine_chunks().values.to_numpy()
    starts = cumulative(sizes.values.to_numpy())[:-1]
    order = flat[starts[:, None] + np.arange(4)].copy().view("<u4").ravel()
    return order.astype(np.int64), sizes.offsets.to_numpy().astype(np.int64)


def shuffled_bins(order: np.ndarray, bin_cu: np.ndarray) -> Bins:
    bins = np.split(order, bin_cu[1:-1])
    new = np.random.default_rng(0).permutation(len(bins))
    return np.concatenate([bins[i] for i in new]), cumulative(np.diff(bin_cu)[new])


# Name -> (packer, package, whether its bins are shuffled before ranks get them, samples it is given).
PACKERS: dict[str, tuple[Callable[[np.ndarray, int], Bins], str, bool, int]] = {
    "vtrain, pool 512": (lambda lengths, tokens: pack(lengths, tokens, pool=512), "", False, 1 << 20),
    "vtrain, pool 4096": (lambda lengths, tokens: pack(lengths, tokens, pool=4096), "", False, 1 << 20),
    "next fit (Python)": (next_fit, "", False, 1 << 20),
    "OLMo-core InstancePacker": (olmo, "ai2-olmo-core", True, 1 << 17),
    "TRL bfd": (trl, "trl", True, 1 << 17),
}


def waits(costs: np.ndarray, micro_steps: int) -> float:
    """Mean over steps of what the slowest ranks take / what a rank takes on average, bins dealt by cost."""
    steps = len(costs) // (RANKS * micro_steps)
    dealt = np.sort(costs[: steps * RANKS * micro_steps].reshape(steps, -1), axis=1).reshape(steps, micro_steps, RANKS)
    return float((dealt.max(2).sum(1) / dealt.mean(2).sum(1)).mean())


def check(order: np.ndarray, bin_cu: np.ndarray, lengths: np.ndarray, pack_tokens: int) -> np.ndarray:
    """The tokens of each bin, of a packing that is one."""
    tokens = np.add.reduceat(lengths[order], bin_cu[:-1])
    if (np.bincount(order, minlength=len(lengths)) != 1).any() or tokens.max() > pack_tokens:
        raise ValueError("not a packing: a sample is missing or twice there, or a bin is too full")
    return tokens


def packing(rows: Rows, rounds: int, samples: int) -> None:
    for law, (pack_tokens, draw) in LAWS.items():
        baseline = None  # our own first one
        for name, (packer, package, shuffle, most) in PACKERS.items():
            lengths = draw(np.random.default_rng(0), min(samples, most)).astype(np.int32)
            row = {"shape": {"law": law, "pack_tokens": pack_tokens, "samples": len(lengths)}, "package": package}
            values = []
            try:
                for _ in range(rounds + 1):
                    start = time.perf_counter()
                    order, bin_cu = packer(lengths, pack_tokens)
                    values.append(len(lengths) / (time.perf_counter() - start) / 1e6)
                tokens = check(order, bin_cu, lengths, pack_tokens)
            except Exception as error:  # a peer that is missing or fails is a result
                rows.add("pack", name, [], "M samples/s", error=f"{type(error).__name__}: {error}"[:200], **row)
                continue
            baseline = baseline or float(np.median(values[1:]))
            rows.add("pack", name, values[1:], "M samples/s", baseline=baseline, **row)
            rows.add("fill", name, [100 * tokens[:-1].mean() / pack_tokens], "%", **row)
            if shuffle:
                order, bin_cu = shuffled_bins(order, bin_cu)
            at, square = lengths[order].astype(np.float64), bin_cu[:-1]
            rows.add("ranks, l^2", name, [waits(np.add.reduceat(at**2, square), 1)], "max/mean", **row)
            layer = np.add.reduceat(at**2 + LINEAR_COST * at, square)
            rows.add("ranks, layer cost", name, [waits(layer, MICRO_STEPS)], "max/mean", **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    parser.add_argument("--quick", action="store_true", help="a look: fewer rounds, keys, sizes and samples")
    arguments = parser.parse_args()
    rows = Rows("packer", arguments.out)
    quick = arguments.quick
    rounds = 2 if quick else arguments.rounds
    order_rates(rows, rounds, (1_000_003,) if quick else (1_000_003, 100_000_007))
    order_evenness(rows, 2 if quick else 6, SIZES[:2] if quick else SIZES)
    packing(rows, rounds, 1 << 16 if quick else 1 << 20)


if __name__ == "__main__":
    main()
