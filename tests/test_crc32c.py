"""crc32c: the published vectors, a bit-by-bit model from the definition, and the hardware paths against the tables."""

from __future__ import annotations

import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtrain._host import crc32c, crc32c_blocks, crc32c_combine, crc32c_lanes, crc32c_portable

EACH = pytest.mark.parametrize("crc", [crc32c, crc32c_lanes, crc32c_portable])
FAST = pytest.mark.parametrize("crc", [crc32c, crc32c_lanes])
FOLD = 256  # bytes that the path of VPCLMULQDQ takes at a time, twice as many at least
LANES = 3 * 4096  # that of SSE4.2

# RFC 3720, appendix B.4 (bytes there are in the order of transmission), and the usual check value.
ISCSI_READ = bytes.fromhex(
    "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018 28000000 00000000 02000000 00000000"
)
VECTORS = {
    "empty": (b"", 0),
    "zeros": (bytes(32), 0x8A9136AA),
    "ones": (b"\xff" * 32, 0x62A8AB43),
    "rising": (bytes(range(32)), 0x46DD794E),
    "falling": (bytes(range(31, -1, -1)), 0x113FDB5C),
    "iscsi read": (ISCSI_READ, 0xD9963A56),
    "check": (b"123456789", 0xE3069283),
}


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def bitwise_model(data: bytes) -> int:
    """The remainder of the message over GF(2) by the Castagnoli polynomial, a bit at a time."""
    register = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            feedback = (register ^ (byte >> bit)) & 1
            register = (register >> 1) ^ (0x82F63B78 if feedback else 0)
    return register ^ 0xFFFFFFFF


@EACH
@pytest.mark.parametrize("name", VECTORS)
def test_published_vectors(crc, name):
    data, expected = VECTORS[name]
    assert crc(data) == expected


@EACH
@given(data=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_equals_the_bitwise_model(crc, data):
    assert crc(data) == bitwise_model(data)


@FAST
@pytest.mark.parametrize("start", [0, 1, 3, 7])
@pytest.mark.parametrize("unit", [8, 2 * FOLD, 3 * FOLD, 4096, LANES, 5 * LANES + 4099])
def test_hardware_paths_equal_the_tables_at_any_length_and_alignment(crc, unit, start):
    for size in (0, unit - 1, unit, unit + 1, unit + FOLD - 1):
        data = noise(size + start)[start:]
        assert crc(data) == crc32c_portable(data)
        assert crc(data, 0xDEADBEEF) == crc32c_portable(data, 0xDEADBEEF)


@given(size=st.integers(0, 4 * LANES), start=st.integers(0, 16), cut=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_continuing_and_combining_equal_one_pass(size, start, cut):
    data = noise(size + start, seed=size)[start:]
    first, second = np.split(data, [int(cut * size)])
    whole = crc32c_portable(data)
    assert crc32c(second, crc32c(first)) == whole
    assert crc32c_combine(crc32c(first), crc32c(second), len(second)) == whole


def crc_of_zeros(size: int) -> int:
    """The crc of `size` zero bytes out of doublings: one step for each binary digit of `size`."""
    crc, power, power_size = 0, crc32c(b"\0"), 1
    while size:
        if size & 1:
            crc = crc32c_combine(crc, power, power_size)
        power, power_size = crc32c_combine(power, power, power_size), 2 * power_size
        size >>= 1
    return crc


def test_combine_reaches_beyond_32_bits_of_length():
    assert crc_of_zeros(70_001) == crc32c(bytes(70_001))
    head, size, part = crc32c(b"head"), (1 << 40) + 12345, (1 << 33) + 7
    in_two = crc32c_combine(crc32c_combine(head, crc_of_zeros(part), part), crc_of_zeros(size - part), size - part)
    assert crc32c_combine(head, crc_of_zeros(size), size) == in_two


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 50_000])
@pytest.mark.parametrize("block", [1000, 4096, 1 << 20])
def test_blocks_are_the_checksums_of_the_pieces(size, block):
    data = noise(size)
    found = crc32c_blocks(data, block)
    assert found.dtype == np.uint32
    assert found.tolist() == [crc32c_portable(data[at : at + block]) for at in range(0, size, block)]


def test_every_flipped_bit_is_seen():
    data = bytearray(noise(600).tobytes())
    whole = crc32c(data)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert crc32c(data) != whole
        data[bit // 8] ^= 1 << bit % 8


def test_any_contiguous_buffer_is_taken_as_its_bytes():
    numbers = np.arange(60, dtype="<u4").reshape(3, 4, 5)
    expected = crc32c(numbers.tobytes())
    for same in (numbers, memoryview(numbers), bytearray(numbers.tobytes()), array.array("I", numbers.ravel())):
        assert crc32c(same) == expected
    assert crc32c(numbers[1:2]) == crc32c(numbers[1].tobytes())
    assert crc32c(numbers[:, :0]) == 0


@pytest.mark.parametrize("function", [crc32c, crc32c_portable, lambda data: crc32c_blocks(data, 16)])
@pytest.mark.parametrize("view", [np.s_[::2], np.s_[:, ::2], np.s_[::-1], np.s_[:, 1:]])
def test_a_buffer_with_gaps_is_refused(function, view):
    with pytest.raises(ValueError, match="not contiguous"):
        function(np.arange(64, dtype=np.uint8).reshape(8, 8)[view])


def test_what_is_no_buffer_is_refused():
    with pytest.raises(TypeError):
        crc32c("text")
    with pytest.raises(ValueError, match="block must be positive"):
        crc32c_blocks(b"data", 0)
