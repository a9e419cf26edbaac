from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_dataset import texts
from slow_plan import slow_bins

from vtrain.data.compose import LanguageModel
from vtrain.data.order import StoredOrder
from vtrain.data.plan import Plan, Source, bin_cost, deal, pack


def bins_of(lengths, *args, **options) -> list[list[int]]:
    order, cu = pack(np.array(lengths, dtype=np.int32), *args, **options)
    assert order.dtype == cu.dtype == np.int64
    return [b.tolist() for b in np.split(order, cu[1:-1])] if len(lengths) else []


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=80),
    pack_tokens=st.integers(40, 120),
    max_documents=st.integers(1, 9),
    pool=st.integers(1, 20),
)
def test_bins_equal_the_slow_rule(lengths, pack_tokens, max_documents, pool):
    found = bins_of(lengths, pack_tokens, pool, max_documents)
    assert found == slow_bins(lengths, pack_tokens, max_documents, pool)


class WithExtents(LanguageModel):
    """The slot rows and frames of a sample, by its number."""

    def __init__(self, extents):
        object.__setattr__(self, "table", np.array(extents, dtype=np.int32).reshape(-1, 2))

    def extents(self, dataset, indices, epoch):
        return self.table[indices]


@settings(max_examples=150, deadline=None)
@given(
    samples=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=60),
    caps=st.tuples(st.integers(7, 20), st.integers(5, 9)),
    pool=st.integers(1, 20),
    max_documents=st.integers(1, 9),
)
def test_capped_bins_equal_the_slow_rule(samples, caps, pool, max_documents):
    """The samples of a plan in stored order, with few lengths: the first of a length often does not fit."""
    lengths, extents = [s[0] for s in samples], [s[1:] for s in samples]
    one = Source(texts(lengths), max_epochs=1, order=StoredOrder())
    sizes = {"pack_tokens": 30, "bins_per_step": 10**6, "max_documents": max_documents, "pool": pool}
    step = Plan([one], WithExtents(extents), seed=0, caps=caps, **sizes).next_step()
    found = [b.tolist() for b in np.split(step.index, step.bin_cu[1:-1])]
    assert found == slow_bins(lengths, 30, max_documents, pool, extents, caps)


@pytest.mark.parametrize("pack_tokens", [63, 64, 65, 4095, 4096, 4097, 262_144, 300_000])
def test_wide_ranges_of_lengths(pack_tokens):
    """Every number of levels of the set of lengths, and lengths at the edges of its words."""
    draw = np.random.default_rng(pack_tokens)
    edges = [n for k in range(0, 19) for n in (2**k - 1, 2**k, 2**k + 1) if 1 <= n <= pack_tokens]
    lengths = np.concatenate((draw.integers(1, pack_tokens + 1, 150), draw.choice(edges, 150))).tolist()
    assert bins_of(lengths, pack_tokens, 30) == slow_bins(lengths, pack_tokens, 10**9, 30)


@pytest.mark.parametrize(("low", "high", "pack_tokens"), [(64, 1300, 8192), (1, 64, 64), (30, 30, 100), (5, 9, 4096)])
def test_every_sample_once_and_no_bin_overfull(low, high, pack_tokens):
    lengths = np.random.default_rng(0).integers(low, high + 1, 50_000, dtype=np.int32)
    order, cu = pack(lengths, pack_tokens, max_documents=100)
    assert np.array_equal(np.bincount(order), np.ones(len(lengths)))
    fill = np.add.reduceat(lengths[order], cu[:-1])
    assert 0 < fill.min() <= fill.max() <= pack_tokens
    assert np.diff(cu).max() <= 100


def grids_and_text(n: int) -> np.ndarray:
    """Pictures of 256 to 2048 codes in grids of many shapes, a few texts without one, all with a caption."""
    draw = np.random.default_rng(3)
    height, width = draw.integers(16, 65, (2, 4 * n))
    codes = (height * width)[(height * width <= 2048) & (height <= 2.5 * width) & (width <= 2.5 * height)][:n]
    codes[draw.random(n) < 0.1] = 0
    return (codes + draw.integers(16, 65, n)).astype(np.int32)


def test_bins_are_nearly_full():
    for lengths, least in (
        (np.random.default_rng(3).integers(64, 1301, 100_000), 0.999),
        (grids_and_text(100_000), 0.994),
    ):
        order, cu = pack(lengths, 8192)
        fill = np.add.reduceat(lengths[order], cu[:-1])[:-40] / 8192  # the last ones drain the pool
        assert fill.mean() >= least


def test_no_sample_starves():
    """Each bin holds the oldest waiting sample, so a sample waits for at most as many bins as were older than it."""
    lengths = np.random.default_rng(4).integers(64, 1301, 10_000)
    lengths[100::500] = 8192  # nothing fits beside these
    packed, oldest = set(), 0
    for samples in bins_of(lengths, 8192):
        while oldest in packed:
            oldest += 1
        assert oldest in samples
        assert max(samples) - len(packed) <= 512 + len(samples)
        packed |= set(samples)


def test_a_sample_may_wait_very_long():
    """The ring of waiting samples has to grow: one that fits nowhere but first, while thousands of others pass."""
    lengths = [50, 99, *([1] * 3000), *([60, 40] * 500)]
    assert bins_of(lengths, 100, 4, 3) == slow_bins(lengths, 100, 3, 4)
    lengths = [60, *([99] * 60), *([40] * 900)]
    assert bins_of(lengths, 1000, 100) == slow_bins(lengths, 1000, 10**9, 100)


def test_samples_that_cannot_fit_are_refused():
    for length in (0, 101, -5):
        with pytest.raises(ValueError, match=rf"sample 1 has {length} tokens; expected 1\.\.100"):
            pack(np.array([3, length]), 100)
    for sizes in ((0, 1, 1), (100, 0, 1), (100, 1, 0), (2**40, 1, 1)):
        with pytest.raises(ValueError, match="expected all >= 1"):
            pack(np.array([], dtype=np.int32), sizes[0], sizes[1], sizes[2])
    assert pack(np.array([], dtype=np.int32), 100)[1].tolist() == [0]


def test_cost():
    lengths, cu = np.array([3, 5, 2**20, 7], dtype=np.int32), np.array([0, 2, 2, 4])
    assert bin_cost(lengths, cu, 10).tolist() == [9 + 25 + 80, 0, 2**40 + 49 + 10 * (2**20 + 7)]
    assert bin_cost(lengths[:0], np.array([0]), 10).tolist() == []


@pytest.mark.parametrize("bins", [1, 2, 5, 6, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_deal_gives_every_bin_once_and_equal_micro_steps(bins, world):
    costs = np.random.default_rng(6).integers(0, 5, bins)  # with ties
    dealt = [deal(costs, rank, world, bins) for rank in range(world)]
    assert {len(d) for d in dealt} == {-(-bins // world)}
    order = [d[a] for a in range(len(dealt[0])) for d in dealt]
    assert order[bins:] == [None] * (len(order) - bins)
    assert order[:bins] == sorted(range(bins), key=lambda i: (-costs[i], i))


def test_deal_at_the_end_of_the_data():
    assert [deal([5, 9], rank, 2, 6) for rank in range(2)] == [[1, None, None], [0, None, None]]


def test_ranks_work_equally_long():
    """The dearest of 64 ranks in each of 4 micro-steps against their mean, with the cost of a decoder 2048 wide."""
    lengths = grids_and_text(60_000)
    order, cu = pack(lengths, 8192)
    costs = bin_cost(lengths[order], cu, 6 * 2048)
    slowest = []
    for at in range(0, len(costs) - 255, 256):
        step = costs[at : at + 256]
        dealt = step[np.array([deal(step, rank, 64, 256) for rank in range(64)])]
        slowest += (dealt.max(axis=0) / dealt.mean(axis=0)).tolist()
    assert Counter(np.array(slowest) < 1.1)[True] > 0.95 * len(slowest)
    assert np.mean(slowest) <= 1.02
