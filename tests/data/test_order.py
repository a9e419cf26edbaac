import math

import numpy as np
import pytest

from vtrain.data.order import Order, epoch_key
from vtrain.rng import fold

SIZES = [*range(1, 130), 4095, 4096, 4097, 4160, 4161, 5000, 8190, 10007, 65535, 65536, 65537, 262145, 1_000_003]


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_every_order_is_a_bijection(key):
    for n in SIZES:
        ids = Order(n, key)(np.arange(n))
        assert np.array_equal(np.bincount(ids, minlength=n), np.ones(n)), n


def scalar_order(n: int, key: int, p: int) -> int:
    """The specification of the network, one position at a time in Python integers."""
    b = math.isqrt(n)
    b += b * b < n
    a = (n + b - 1) // b
    while True:
        x, y = p // b, p % b
        for r in range(6):
            h = ((y, x)[r % 2] ^ fold(key, r)) & 0xFFFFFFFF
            h ^= h >> 16
            h = h * 0x85EBCA6B % 2**32
            h ^= h >> 13
            h = h * 0xC2B2AE35 % 2**32
            h ^= h >> 16
            if r % 2 == 0:
                x = (x + (h * a >> 32)) % a
            else:
                y = (y + (h * b >> 32)) % b
        p = x * b + y
        if p < n:
            return p


@pytest.mark.parametrize("n", [4096, 4097, 10007, 2**31 + 11, 10**12 + 39, 2**62])
def test_network_equals_the_scalar_specification(n):
    positions = np.random.default_rng(n % 1000).integers(0, n, 300)
    ids = Order(n, 99)(positions.reshape(3, 100))
    assert ids.shape == (3, 100)
    assert ids.ravel().tolist() == [scalar_order(n, 99, int(p)) for p in positions]


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
    for n in (0, -1, 2**62 + 1):
        with pytest.raises(ValueError, match="samples"):
            Order(n, 0)
    for n in (10, 5000):
        order = Order(n, 0)
        assert order(np.array([], dtype=np.int64)).shape == (0,)
        for bad in (-1, n):
            with pytest.raises(IndexError, match=f"order of {n} samples"):
                order(np.array([0, bad]))
