"""How a plan's state is spelled in JSON: the waiting samples in a few hundred bytes, settings compared by name."""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any

import numpy as np

VERSION = 2
SOURCE, EPOCH, POSITION, START, STOP = range(5)  # rows of a table of waiting samples; stop 0 = to the end
MOST_WAITING = 1 << 24  # what a state may unpack to: far beyond any pool


def spell_waiting(table: np.ndarray) -> str:
    """base64 of int64[5, n]. Epochs and positions are stored as steps from the sample of that source before: small."""
    rows = np.array(table, dtype="<i8", order="C")
    for source in set(rows[SOURCE].tolist()):  # np.unique imports numpy.ma at its first call: 5 ms
        own = np.flatnonzero(rows[SOURCE] == source)
        rows[EPOCH : POSITION + 1, own[1:]] -= table[EPOCH : POSITION + 1, own[:-1]]
    planes = np.ascontiguousarray(rows.view(np.uint8).reshape(-1, 8).T)  # byte k of all numbers
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def read_waiting(text: str) -> np.ndarray:
    """int64[5, n] of `spell_waiting`. ValueError for anything else."""
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), 40 * MOST_WAITING)
    except (TypeError, binascii.Error, zlib.error) as error:
        raise ValueError(f"loader state: the waiting samples cannot be read: {error}") from None
    if len(data) % 40 or not unpacker.eof:
        raise ValueError(f"loader state: the waiting samples are {len(data)} bytes; expected whole ones of 40")
    planes = np.frombuffer(data, np.uint8).reshape(8, len(data) // 8)
    rows = np.ascontiguousarray(planes.T).view("<i8").reshape(5, len(data) // 40).astype(np.int64)
    for source in set(rows[SOURCE].tolist()):
        own = np.flatnonzero(rows[SOURCE] == source)
        rows[EPOCH : POSITION + 1, own] = np.cumsum(rows[EPOCH : POSITION + 1, own], axis=1)
    return rows


def integers(value: Any, count: int, what: str) -> list[int]:
    """`value` where it is a list of so many integers; ValueError otherwise."""
    if not isinstance(value, list) or len(value) != count or not all(type(x) is int for x in value):
        raise ValueError(f"loader state: {what} is {value!r}; expected {count} integers")
    return value


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts with dotted names."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return found


def refuse_differences(theirs: dict[str, Any], ours: dict[str, Any], *, only: set[str] | None = None) -> None:
    """ValueError that names all fields (dotted names) which differ; only: the fields to look at."""
    differing = [
        f"{name} is {theirs.get(name)!r} in the state and {ours.get(name)!r} here"
        for name in dict.fromkeys([*ours, *theirs])
        if theirs.get(name) != ours.get(name) and (only is None or name in only)
    ]
    if differing:
        raise ValueError(f"loader state: made with other settings: {'; '.join(differing)}")
