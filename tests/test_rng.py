"""The counter RNG: three forms of one function, its streams fixed for ever, its draws uniform and its keys apart."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtrain import rng

MASK = 2**64 - 1
words64 = st.integers(0, MASK)
lists64 = st.lists(words64, min_size=1, max_size=20)
GOLDEN = {
    "fold 0 0": 12035550249420947055,
    "fold 2026 caption 7": 13278023378857269924,
    "fold_array 1": [627405149472732430, 16860738450190168606, 1017872750149318733],
    "uniform 3": [0.781499285280747, 0.5267179955718279, 0.7083260617097036],
}


def tensor(values):
    return torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64))


def splitmix(z):
    """The finaliser in exact integers, from the paper's constants."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def slow_fold(key, word):
    gamma = 0x9E3779B97F4A7C15
    return splitmix(((key ^ splitmix((word + gamma) % 2**64)) + gamma) % 2**64)


@given(words64, lists64)
def test_the_three_forms_are_one_function(key, words):
    expected = [slow_fold(key, word) for word in words]
    assert [rng.fold(key, word) for word in words] == expected
    assert rng.fold_array(key, np.array(words, dtype=np.uint64)).tolist() == expected
    folded = rng.fold_tensor(rng.key_tensor(key), tensor(words))
    assert folded.numpy().view(np.uint64).tolist() == expected


@given(words64, lists64)
def test_uniform_is_the_upper_53_bits(key, words):
    drawn = rng.uniform(key, np.array(words, dtype=np.uint64))
    assert drawn.dtype == np.float64
    assert drawn.tolist() == [(slow_fold(key, word) >> 11) * 2.0**-53 for word in words]
    assert (drawn < 1).all()


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_negative_numbers_stand_for_their_bits(key, word):
    expected = rng.fold(key & MASK, word & MASK)
    assert rng.fold(key, word) == expected
    assert int(rng.fold_array(key, np.array([word]))[0]) == expected
    assert int(rng.fold_array(np.array([key]), np.array([word]))[0]) == expected


def test_numpy_scalars_are_keys_and_words_too():
    expected = rng.fold(2**64 - 5, 2**64 - 7)
    assert rng.fold(np.uint64(2**64 - 5), np.uint64(2**64 - 7)) == expected
    assert rng.fold(np.int64(-5), np.int64(-7)) == expected


def test_keys_and_words_broadcast():
    keys, words = np.arange(3, dtype=np.uint64), np.arange(4, dtype=np.uint64)
    table = rng.fold_array(keys[:, None], words)
    assert table.tolist() == [[rng.fold(int(k), int(w)) for w in words] for k in keys]
    twin = rng.fold_tensor(tensor(keys)[:, None], tensor(words))
    assert twin.numpy().view(np.uint64).tolist() == table.tolist()


def test_fold_takes_words_one_after_another():
    assert rng.fold(1, 2, "x", 3) == rng.fold(rng.fold(rng.fold(1, 2), "x"), 3)
    assert rng.fold(7) == 7
    assert len({rng.fold(1, 2, 3), rng.fold(1, 3, 2), rng.fold(2, 1, 3), rng.fold(1, 2)}) == 4


def test_streams_never_change():
    """Golden values: a change here would change every trained model and every composed batch."""
    assert rng.fold(0, 0) == GOLDEN["fold 0 0"]
    assert rng.fold(2026, "caption", 7) == GOLDEN["fold 2026 caption 7"]
    assert rng.fold_array(1, np.array([0, 1, 2**63], dtype=np.uint64)).tolist() == GOLDEN["fold_array 1"]
    assert rng.uniform(3, np.arange(3, dtype=np.uint64)).tolist() == GOLDEN["uniform 3"]


@pytest.mark.parametrize("stride", [1, 2, 256, 2**32])
def test_draws_are_uniform(stride):
    """Chi-square over 256 bins and over pairs of neighbours, for counters and for keys that are counted."""
    n, bins = 1 << 16, 256
    counters = np.arange(n, dtype=np.uint64) * np.uint64(stride)
    for drawn in (rng.uniform(5, counters), rng.uniform(counters, np.uint64(5))):
        pairs = (drawn[:-1] * 16).astype(int) * 16 + (drawn[1:] * 16).astype(int)
        for cells in ((drawn * bins).astype(int), pairs):
            counts = np.bincount(cells, minlength=bins)
            expected = counts.sum() / bins
            chi2 = ((counts - expected) ** 2 / expected).sum()
            assert abs(chi2 - (bins - 1)) < 5 * np.sqrt(2 * (bins - 1))  # five standard deviations


def test_every_bit_of_key_and_word_moves_half_of_the_output():
    samples = rng.fold_array(99, np.arange(256, dtype=np.uint64))
    others = rng.fold_array(98, np.arange(256, dtype=np.uint64))
    before = rng.fold_array(samples, others)
    for bit in range(64):
        flip = np.uint64(1 << bit)
        for after in (rng.fold_array(samples ^ flip, others), rng.fold_array(samples, others ^ flip)):
            share = np.bitwise_count(before ^ after).mean() / 64
            assert 0.47 < share < 0.53  # 256 * 64 fair bits: standard deviation 0.004


def test_no_collisions_among_keys():
    keys = rng.fold_array(np.arange(1000, dtype=np.uint64)[:, None], np.arange(1000, dtype=np.uint64))
    assert len(np.unique(keys)) == keys.size
