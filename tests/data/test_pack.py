from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtrain.data.pack import Packer, bin_cost, deal


def stream(lengths):
    return iter(list(enumerate(lengths)))


def slow_bins(lengths: list[int], pack_tokens: int, max_documents: int, pool: int) -> list[list[int]]:
    """The rule in its plainest form: lists, scans, nothing clever."""
    coming, waiting, bins = list(enumerate(lengths)), [], []
    while coming or waiting:
        chosen, room = [], pack_tokens
        while len(chosen) < max_documents:
            while coming and len(waiting) < pool:
                waiting.append(coming.pop(0))
            fitting = [w for w in waiting if w[1] <= room]
            if not fitting:
                break
            take = waiting[0] if waiting[0][1] <= room else max(fitting, key=lambda w: (w[1], -w[0]))
            waiting.remove(take)
            chosen.append(take[0])
            room -= take[1]
        bins.append(chosen)
    return bins


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=80),
    pack_tokens=st.integers(40, 120),
    max_documents=st.integers(1, 9),
    pool=st.integers(1, 20),
)
def test_bins_equal_the_slow_rule(lengths, pack_tokens, max_documents, pool):
    assert list(Packer(stream(lengths), pack_tokens, max_documents, pool)) == slow_bins(
        lengths, pack_tokens, max_documents, pool
    )


@pytest.mark.parametrize(("low", "high", "pack_tokens"), [(64, 1300, 8192), (1, 64, 64), (30, 30, 100), (5, 9, 4096)])
def test_every_sample_once_and_no_bin_overfull(low, high, pack_tokens):
    lengths = np.random.default_rng(0).integers(low, high + 1, 5000).tolist()
    bins = list(Packer(stream(lengths), pack_tokens, 100))
    assert Counter(i for b in bins for i in b) == Counter(range(5000))
    assert all(0 < sum(lengths[i] for i in b) <= pack_tokens and len(b) <= 100 for b in bins)


def test_bins_are_nearly_full():
    lengths = np.random.default_rng(3).integers(64, 1301, 20_000).tolist()
    bins = list(Packer(stream(lengths), 8192, 1000))[:-40]  # the last ones drain the pool
    fill = sum(lengths[i] for b in bins for i in b) / (8192 * len(bins))
    assert fill >= 0.99


def test_no_sample_starves():
    """Each bin holds the oldest waiting sample, so a sample waits for at most as many bins as were older than it."""
    lengths = np.random.default_rng(4).integers(64, 1301, 10_000).tolist()
    lengths[100::500] = [8192] * len(lengths[100::500])  # nothing fits beside these
    packed = set()
    for number, samples in enumerate(Packer(stream(lengths), 8192, 1000)):
        oldest = min(set(range(number, 10_000)) - packed) if number % 50 == 0 else None
        assert oldest is None or oldest in samples
        early = max(samples) - len(packed)
        assert early <= 512 + len(samples)
        packed |= set(samples)


@pytest.mark.parametrize("after", [0, 1, 7, 30])
def test_waiting_samples_are_the_whole_state(after):
    lengths = np.random.default_rng(5).integers(1, 100, 900).tolist()
    whole = list(Packer(stream(lengths), 300, 8, pool=50))
    source = stream(lengths)
    first = Packer(source, 300, 8, pool=50)
    head = [next(first) for _ in range(after)]
    second = Packer(source, 300, 8, pool=50, waiting=first.waiting())
    assert head + list(second) == whole


def test_samples_that_cannot_fit_are_refused():
    for length in (0, 101):
        with pytest.raises(ValueError, match=r"expected 1\.\.100"):
            next(Packer(stream([length]), 100, 4))
    with pytest.raises(ValueError, match="all >= 1"):
        Packer(stream([]), 100, 0)


def test_cost():
    assert bin_cost([3, 5], 10) == 9 + 25 + 80
    assert bin_cost([], 10) == 0


@pytest.mark.parametrize("bins", [1, 2, 5, 6, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_deal_gives_every_bin_once_and_equal_micro_steps(bins, world):
    costs = np.random.default_rng(6).integers(0, 5, bins).tolist()  # with ties
    dealt = [deal(costs, rank, world, bins) for rank in range(world)]
    assert {len(d) for d in dealt} == {-(-bins // world)}
    order = [d[a] for a in range(len(dealt[0])) for d in dealt]
    assert order[bins:] == [None] * (len(order) - bins)
    expected = sorted(range(bins), key=lambda i: (-costs[i], i))
    assert order[:bins] == expected


def test_deal_at_the_end_of_the_data():
    assert [deal([5, 9], rank, 2, 6) for rank in range(2)] == [[1, None, None], [0, None, None]]
