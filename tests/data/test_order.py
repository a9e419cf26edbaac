import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_plan import slow_block_order, slow_order, slow_position

from vtrain import _host
from vtrain.data.order import BlockOrder, Order, StoredOrder, epoch_key
from vtrain.rng import fold

SIZES = [*range(1, 130), 4095, 4096, 4097, 4160, 4161, 5000, 8190, 10007, 65535, 65536, 65537, 262145, 1_000_003]


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_every_order_is_a_bijection(key):
    for n in SIZES:
        order = Order(n, key)
        ids = order.range(0, n)
        assert np.array_equal(np.bincount(ids, minlength=n), np.ones(n)), n
        assert np.array_equal(ids, order(np.arange(n))), n


@pytest.mark.parametrize("n", [1, 2, 3, 100, 4095, 4096, 4097])
def test_whole_orders_equal_the_slow_one(n):
    for key in (0, 99, -1, 2**64 + 5):
        assert tuple(Order(n, key).range(0, n).tolist()) == slow_order(n, key % 2**64)


@pytest.mark.parametrize("n", [4096, 4097, 10007, 2**31 + 11, 10**12 + 39, 2**62 - 1, 2**62])
def test_network_equals_the_scalar_specification(n):
    order = Order(n, 99)
    positions = np.random.default_rng(n % 1000).integers(0, n, 300)
    expected = [slow_position(n, 99, int(p)) for p in positions]
    ids = order(positions.reshape(3, 100))
    assert ids.shape == (3, 100)
    assert ids.dtype == np.int64
    assert ids.ravel().tolist() == expected == order.portable(positions).tolist()
    for start in (0, n // 2, n - 40):
        assert order.range(start, 40).tolist() == [slow_position(n, 99, start + i) for i in range(40)]


def test_orders_never_change():
    """A resumed run on another version must see the same order: these numbers are for ever."""
    assert Order(10, 1).range(0, 10).tolist() == [8, 6, 2, 4, 9, 5, 7, 1, 0, 3]
    assert Order(5000, epoch_key(3, 7, 2)).range(0, 4).tolist() == [3067, 3555, 697, 1301]
    assert Order(10**12, 5)(np.array([0, 10**12 - 1])).tolist() == [795634862802, 520133383895]
    assert _host.BlockOrder(10**6 + 1, 5, 4096, 64).range(10**6 - 3, 4).tolist() == [574411, 317598, 444815, 755822]


def chi_square_per_degree(cells: np.ndarray, count: int) -> float:
    seen = np.bincount(cells, minlength=count)
    return float(((seen - seen.mean()) ** 2).sum() / seen.mean() / (count - 1))


@pytest.mark.parametrize("n", [4097, 50_000, 300_001])
def test_order_looks_random(n):
    """Statistics over several keys: position, low bits and steps. sqrt(2 / degrees) is one standard deviation."""
    position, bits, steps, serial = [], [], [], []
    for key in range(12):
        ids = Order(n, key)(np.arange(n))
        head = ids[: n // 8]
        position.append(chi_square_per_degree(head * 32 // n, 32))
        bits.append(chi_square_per_degree(head & 63, 64))
        step = np.diff(ids) % n
        steps.append(chi_square_per_degree(step * 64 // n, 64))
        serial.append(np.corrcoef(ids[1:], ids[:-1])[0, 1])
    for name, found in {"position": position, "bits": bits, "steps": steps}.items():
        # Drawing an eighth without replacement shrinks the variance by 7/8; steps are nearly independent.
        assert 0.6 < np.mean(found) < 1.3, (name, found)
    assert np.abs(np.mean(serial)) < 4 / math.sqrt(12 * n)


@pytest.mark.slow
def test_order_is_as_uniform_as_the_target():
    """The mean of chi2 per degree over 6 keys and 3 sizes; every cell is drawn often, so 0.03 are four deviations."""
    found = {"position": [], "bits": [], "steps": []}
    for n in (1_000_003, 3_000_000, 4**11 + 1):
        for key in range(6):
            ids = Order(n, fold(1, key)).range(0, n)
            head = ids[: n // 8]
            found["position"].append(chi_square_per_degree(head * 1024 // n, 1024) * 8 / 7)
            found["bits"].append(chi_square_per_degree(head & 1023, 1024) * 8 / 7)
            found["steps"].append(chi_square_per_degree((np.diff(ids) % n) * 1024 // n, 1024))
            assert abs(np.corrcoef(ids[1:], ids[:-1])[0, 1]) < 0.004
    assert all(0.97 < np.mean(values) < 1.03 for values in found.values()), found


def test_small_orders_are_uniform_over_all_permutations():
    tables = np.array([Order(4, fold(3, key))(np.arange(4)) for key in range(6000)])
    kinds = np.unique(tables @ [1, 4, 16, 64], return_inverse=True)[1]
    assert kinds.max() == 23
    assert chi_square_per_degree(kinds, 24) < 2.2  # 1e-3 of fair shuffles exceed 2.15


@pytest.mark.parametrize("n", [100, 5000])
def test_keys_give_different_orders(n):
    keys = [epoch_key(*args) for args in [(0, 7, 0), (0, 7, 1), (1, 7, 0), (0, 8, 0), (1, 7, 1)]]
    orders = [Order(n, key)(np.arange(n)) for key in keys]
    for i, order in enumerate(orders):
        assert np.array_equal(order, Order(n, keys[i])(np.arange(n)))
        assert all((order == other).mean() < 0.1 for other in orders[:i])


def test_bad_sizes_and_positions():
    for n in (0, -1, 2**62 + 1, 2**70):
        with pytest.raises(ValueError, match=f"the order of {n} samples"):
            Order(n, 0)
        with pytest.raises(ValueError, match="samples"):
            BlockOrder().of(n, 0)
    for order in (Order(10, 0), Order(5000, 0), BlockOrder(3, 2).of(10, 0), BlockOrder(3, 2).of(5000, 0)):
        n = len(order)
        assert order(np.array([], dtype=np.int64)).shape == (0,)
        assert order.range(n, 0).shape == (0,)
        for bad in (-1, n, -(2**63)):
            with pytest.raises(IndexError, match=f"order of {n} samples"):
                order(np.array([0, bad]))
        for start, count in ((0, n + 1), (n, 1), (n + 1, 0), (2**62, 2**62), (-1, 1), (0, -1)):
            with pytest.raises(IndexError):
                order.range(start, count)
    for block, opened in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(ValueError, match="block order"):
            BlockOrder(block, opened)
    with pytest.raises(ValueError, match="window of at most"):
        BlockOrder(2**40, 2**40).of(10, 0)


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 700), key=st.integers(0, 2**64 - 1), block=st.integers(1, 60), opened=st.integers(1, 12))
def test_block_orders_equal_the_slow_one(n, key, block, opened):
    order = BlockOrder(block, opened).of(n, key)
    expected = slow_block_order(n, key, block, opened)
    assert order.range(0, n).tolist() == expected
    assert order(np.arange(n)[::-1]).tolist() == expected[::-1]
    some = slice(n // 3, n // 3 + (n + 1) // 2)
    assert order.range(some.start, min(some.stop, n) - some.start).tolist() == expected[some]


@pytest.mark.parametrize(
    ("n", "block", "opened"),
    [(204_800, 4096, 8), (200_003, 4096, 8), (300_000, 10, 7000), (65_536, 1, 5000), (100_001, 100_000, 1)],
)
def test_large_block_orders_are_bijections_that_stay_in_their_windows(n, block, opened):
    ids = BlockOrder(block, opened).of(n, 5).range(0, n)
    assert np.array_equal(np.bincount(ids, minlength=n), np.ones(n))
    for at in range(0, n if n % block == 0 else 0, block * opened):
        window = ids[at : at + block * opened]
        assert len(np.unique(window // block)) * block == len(window)


def test_the_short_block_lies_anywhere():
    places = [BlockOrder(10, 3).of(95, key).range(0, 95).tolist().index(94) for key in range(400)]
    assert np.histogram(places, 5, (0, 95))[0].min() > 40


def test_a_window_is_well_mixed():
    """Within a window the samples of its blocks come in random order."""
    order = BlockOrder(512, 16).of(512 * 16 * 4, 3)
    for at in range(0, 4 * 8192, 8192):
        blocks = np.unique(order.range(at, 8192) // 512, return_inverse=True)[1]
        assert chi_square_per_degree(blocks[:2048], 16) < 3
        assert abs(np.corrcoef(blocks[1:], blocks[:-1])[0, 1]) < 0.06


def test_stored_order():
    order = StoredOrder().of(9, 3)
    assert order.range(2, 4).tolist() == order(np.arange(2, 6)).tolist() == [2, 3, 4, 5]
