"""What a legal batch of samples is: the checks that the writer and `verify` share, and the arithmetic of ragged arrays.

N samples, M segments, R loss runs. `cu` arrays are int64[n+1] starting at 0: row i of a flat array is cu[i]:cu[i+1].
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from vtrain._host import Ids
from vtrain._host import check_samples as _first_broken_rule
from vtrain.data.format import (
    MAX_RUN,
    MAX_SAMPLE,
    RUN_LENGTH_BITS,
    Modality,
    Role,
    Schema,
    SegmentFlag,
    ShardError,
)


@dataclass
class Samples:
    """Samples laid end to end. segments: SEGMENT[M]; keys: u64[N]; runs: u32[R] or None.

    ids, labels: integers[T] (labels may be None), or as `_host.Ids` what a shard stores of them.
    """

    ids: np.ndarray | Ids
    cu: np.ndarray
    segments: np.ndarray
    segment_cu: np.ndarray
    keys: np.ndarray
    runs: np.ndarray | None = None
    run_cu: np.ndarray | None = None
    labels: np.ndarray | Ids | None = None


def cumulative(lengths: np.ndarray) -> np.ndarray:
    """int64[n+1]: 0 and the running sums."""
    cu = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=cu[1:])
    return cu


def ragged(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64[sum(lengths)]: starts[0], starts[0]+1, ... (lengths[0] of them), then from starts[1], and so on."""
    cu = cumulative(lengths)
    return np.repeat(starts - cu[:-1], lengths) + np.arange(cu[-1])


def pack_runs(lengths: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """u32[R] loss runs as they are stored; a run has at most 2**24 - 1 tokens."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and (lengths.min() < 0 or lengths.max() > MAX_RUN):
        raise ValueError(f"loss run of {lengths.max()} tokens; a run holds 0..{MAX_RUN}")
    return lengths.astype(np.uint32) | (np.asarray(classes, dtype=np.uint8).astype(np.uint32) << RUN_LENGTH_BITS)


def unpack_runs(runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64[R] lengths, u8[R] loss classes) of stored runs."""
    return (runs & np.uint32(MAX_RUN)).astype(np.int64), (runs >> np.uint32(RUN_LENGTH_BITS)).astype(np.uint8)


class Rule(IntEnum):
    """The rules of a sample in the order in which they are asked; the numbers are those of csrc check.cpp."""

    LEGAL = 0
    KEY = 1
    FIRST_START = 2
    STARTS = 3
    MODALITY = 4
    ROLE = 5
    FLAGS = 6
    GRID = 7
    SEGMENT_ID = 8
    ID = 9
    RUNS = 10
    LABEL = 11


def check_samples(schema: Schema, s: Samples, name: str) -> tuple[int, int] | None:
    """(lowest, highest) of all ids and labels, None of none.

    Raise ShardError for the first sample that breaks a rule of the format; the message names file and key.
    """
    lengths = np.diff(s.cu)
    if len(lengths) and lengths.max() > MAX_SAMPLE:
        key = int(s.keys[np.argmax(lengths)])
        raise ShardError(f"{name}: sample {key:#x}: OFF: {lengths.max()} tokens; expected at most {MAX_SAMPLE}")
    rule, sample, item, value, low, high = _first_broken_rule(
        _as_ids(s.ids),
        s.cu,
        np.ascontiguousarray(s.segments),
        s.segment_cu,
        s.keys,
        s.runs,
        s.run_cu,
        None if s.labels is None else _as_ids(s.labels),
        schema.id_spans,
        schema.vocab.size,
        len(Role),
    )
    if rule != Rule.LEGAL:
        raise ShardError(f"{name}: {_message(schema, s, Rule(rule), sample, item, value)}")
    return (low, high) if low <= high else None


def _as_ids(ids: np.ndarray | Ids) -> Ids:
    if isinstance(ids, Ids):
        return ids
    native = ids.dtype.newbyteorder("=")
    if native.kind not in "iu" or native.str[1:] in ("i1", "i2", "u8"):
        native = np.dtype(np.int64)
    return Ids(np.ascontiguousarray(ids, dtype=native))


def _message(schema: Schema, s: Samples, rule: Rule, sample: int, item: int, value: int) -> str:
    """What rule is broken. item: the segment or token of the sample; value: tokens of the segment, id, sum of runs."""
    if rule == Rule.KEY:
        return f"KEY: sample {sample} of the batch has key 0; that means padding"
    key, length = f"sample {int(s.keys[sample]):#x}", int(s.cu[sample + 1] - s.cu[sample])
    if rule == Rule.RUNS:
        return f"{key}: RUN: loss runs of {value} tokens; expected {length} or none"
    if rule in (Rule.ID, Rule.LABEL):
        what = "TOK: token {} is id" if rule == Rule.ID else "LBL: token {} has label"
        return f"{key}: {what.format(item)} {value}; expected one of the vocabulary: 0..{schema.vocab.size - 1}"
    if rule == Rule.SEGMENT_ID:
        return f"{key}: TOK: token {item} is id {value}; expected one of {_holder(schema, s, sample, item)}"
    expected = {
        Rule.FIRST_START: "the first segment to start at 0",
        Rule.STARTS: "starts that rise and stay inside the sample",
        Rule.MODALITY: f"modality {_codes(Modality)}",
        Rule.ROLE: f"role {_codes(Role)}",
        Rule.FLAGS: f"flags {_codes(SegmentFlag)}",
        Rule.GRID: "t * h * w tokens, or t = h = w = 0",
    }[rule]
    segment = s.segments[s.segment_cu[sample] + item]
    fields = ", ".join(f"{field} {segment[field]}" for field in segment.dtype.names)
    return f"{key}: SEG: segment {item} has {value} tokens, {fields}; expected {expected}"


def _holder(schema: Schema, s: Samples, sample: int, token: int) -> str:
    """The segment that token `token` of a sample lies in, and the ids that it may have."""
    segments = s.segments[s.segment_cu[sample] : s.segment_cu[sample + 1]]
    segment = segments[np.searchsorted(segments["start"], token, side="right") - 1]
    modality = Modality(segment["modality"])
    low, high = schema.id_span(modality, bool(segment["flags"] & SegmentFlag.MERGED))
    return f"{modality.name.lower()} segments: {f'{low}..{high - 1}' if high else 'no range of their own'}"


def _codes(names: type[IntEnum]) -> str:
    return ", ".join(f"{code.value} ({code.name.lower()})" for code in names)
