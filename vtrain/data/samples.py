"""What a legal batch of samples is: the checks that the writer and `verify` share, and the arithmetic of ragged arrays.

N samples, M segments, R loss runs. `cu` arrays are int64[n+1] starting at 0: row i of a flat array is cu[i]:cu[i+1].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vtrain.data.format import MAX_RUN, MAX_SAMPLE, RUN_LENGTH_BITS, Modality, Role, Schema, SegmentFlag, ShardError


@dataclass
class Samples:
    """Samples laid end to end. ids: integers[T]; segments: SEGMENT[M]; keys: u64[N]; runs: u32[R] or None."""

    ids: np.ndarray
    cu: np.ndarray
    segments: np.ndarray
    segment_cu: np.ndarray
    keys: np.ndarray
    runs: np.ndarray | None = None
    run_cu: np.ndarray | None = None


def cumulative(lengths: np.ndarray) -> np.ndarray:
    """int64[n+1]: 0 and the running sums."""
    cu = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=cu[1:])
    return cu


def ragged(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64[sum(lengths)]: starts[0], starts[0]+1, ... (lengths[0] of them), then from starts[1], and so on."""
    cu = cumulative(lengths)
    return np.repeat(starts - cu[:-1], lengths) + np.arange(cu[-1])


def segment_lengths(starts: np.ndarray, segment_cu: np.ndarray, sample_lengths: np.ndarray) -> np.ndarray:
    """int64[M] tokens of each segment: up to the next start of the sample or the sample's end. Negative = broken."""
    stops = np.empty(len(starts), dtype=np.int64)
    stops[:-1] = starts[1:]
    filled = np.diff(segment_cu) > 0
    stops[segment_cu[1:][filled] - 1] = sample_lengths[filled]
    return stops - starts


def pack_runs(lengths: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """u32[R] loss runs as they are stored; a run has at most 2**24 - 1 tokens."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 0 or lengths.max() > MAX_RUN):
        raise ValueError(f"loss run of {lengths.max()} tokens; a run holds 0..{MAX_RUN}")
    return lengths.astype(np.uint32) | (np.asarray(classes, dtype=np.uint8).astype(np.uint32) << RUN_LENGTH_BITS)


def unpack_runs(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64[R] lengths, u8[R] loss classes) of stored runs."""
    return (runs & np.uint32(MAX_RUN)).astype(np.int64), (runs >> np.uint32(RUN_LENGTH_BITS)).astype(np.uint8)


def check_samples(schema: Schema, s: Samples, name: str) -> None:
    """Raise ShardError for the first sample that breaks a rule of the format; the message names file and key."""
    lengths, counts = np.diff(s.cu), np.diff(s.segment_cu)
    sample_of = np.repeat(np.arange(len(lengths)), counts)
    spans = segment_lengths(s.segments["start"].astype(np.int64), s.segment_cu, lengths)
    if (s.keys == 0).any():
        raise ShardError(f"{name}: KEY: sample {np.argmax(s.keys == 0)} of the batch has key 0; that means padding")
    if len(lengths) and lengths.max() > MAX_SAMPLE:
        key = int(s.keys[np.argmax(lengths)])
        raise ShardError(f"{name}: sample {key:#x}: OFF: {lengths.max()} tokens; expected at most {MAX_SAMPLE}")
    _check_segments(s, spans, sample_of, name)
    _check_ids(schema, s, spans, sample_of, name)
    if s.runs is not None:
        _check_runs(s, lengths, name)


def _check_segments(s: Samples, spans: np.ndarray, sample_of: np.ndarray, name: str) -> None:
    records, numbers = s.segments, np.arange(len(s.segments)) - s.segment_cu[sample_of]
    t, h, w = (records[axis].astype(np.int64) for axis in "thw")
    picture = np.isin(records["modality"], (Modality.IMAGE, Modality.VIDEO))
    merged = (records["flags"] & SegmentFlag.MERGED) != 0
    unknown_flags = records["flags"] > sum(SegmentFlag)
    rules = (
        ((numbers == 0) & (records["start"] != 0), "the first segment to start at 0"),
        (spans < 0, "starts that rise and stay inside the sample"),
        (records["modality"] >= len(Modality), f"modality {_codes(Modality)}"),
        (records["role"] >= len(Role), f"role {_codes(Role)}"),
        (unknown_flags, f"flags {_codes(SegmentFlag)}"),
        (picture & ~merged & (t + h + w > 0) & (t * h * w != spans), "t * h * w tokens, or t = h = w = 0"),
    )
    for broken, expected in rules:
        if broken.any():
            at = int(np.argmax(broken))
            fields = ", ".join(f"{field} {records[field][at]}" for field in records.dtype.names)
            raise ShardError(
                f"{name}: sample {int(s.keys[sample_of[at]]):#x}: SEG: segment {numbers[at]} has {spans[at]} tokens, "
                f"{fields}; expected {expected}"
            )


def _codes(names: type[IntEnum]) -> str:
    return ", ".join(f"{code.value} ({code.name.lower()})" for code in names)


def _check_runs(s: Samples, lengths: np.ndarray, name: str) -> None:
    sums = np.diff(cumulative(unpack_runs(s.runs)[0])[s.run_cu])
    wrong = (np.diff(s.run_cu) > 0) & (sums != lengths)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ShardError(
            f"{name}: sample {int(s.keys[at]):#x}: RUN: loss runs of {sums[at]} tokens; expected {lengths[at]} or none"
        )


def _check_ids(schema: Schema, s: Samples, spans: np.ndarray, sample_of: np.ndarray, name: str) -> None:
    """Every id lies in the range of its segment's modality; ids of samples without segments in the vocabulary.

    One minimum and one maximum per segment (`reduceat`): the spans tile the ids, so each ends where the next starts.
    """
    table = np.array([[schema.id_span(m, merged) for m in Modality] for merged in (False, True)], dtype=np.int64)
    modality = s.segments["modality"].astype(np.int64)
    bounds = table[(s.segments["flags"] & SegmentFlag.MERGED).astype(np.int64), modality]
    starts = s.cu[sample_of] + s.segments["start"]
    filled = spans > 0
    starts, sample_of, bounds, modality = starts[filled], sample_of[filled], bounds[filled], modality[filled]
    bare = np.flatnonzero((np.diff(s.segment_cu) == 0) & (np.diff(s.cu) > 0))
    if len(bare):
        starts, sample_of = np.concatenate([starts, s.cu[bare]]), np.concatenate([sample_of, bare])
        bounds = np.concatenate([bounds, np.broadcast_to((0, schema.vocab.size), (len(bare), 2))])
        modality = np.concatenate([modality, np.full(len(bare), -1)])
        order = np.argsort(starts)
        starts, sample_of, bounds, modality = starts[order], sample_of[order], bounds[order], modality[order]
    if not len(starts):
        return
    bad = (np.minimum.reduceat(s.ids, starts) < bounds[:, 0]) | (np.maximum.reduceat(s.ids, starts) >= bounds[:, 1])
    if bad.any():
        at = int(np.argmax(bad))
        (low, high), sample = bounds[at].tolist(), int(sample_of[at])
        ids = s.ids[starts[at] : starts[at + 1] if at + 1 < len(starts) else None]
        token = int(np.argmax((ids < low) | (ids >= high)))
        holder = "the vocabulary" if modality[at] < 0 else f"{Modality(modality[at]).name.lower()} segments"
        allowed = f"{low}..{high - 1}" if high else "no range of their own"
        raise ShardError(
            f"{name}: sample {int(s.keys[sample]):#x}: TOK: token {starts[at] + token - s.cu[sample]} "
            f"is id {ids[token]}; expected one of {holder}: {allowed}"
        )
