"""The checks of samples in C++ against the rules as loops over plain Python; the arithmetic of runs and lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_model import VOCAB, Sample, batch, dressed, samples

from vtrain._host import Ids, PlaneBytes, length_histogram
from vtrain.data.format import SEGMENT, Schema, ShardError
from vtrain.data.samples import Samples, check_samples, pack_runs, unpack_runs
from vtrain.vocab import Vocabulary

SCHEMA = Schema(VOCAB)


def test_length_histogram_counts_as_a_loop_does():
    lengths = [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 1000, 2**31 - 1]
    slow = [0] * 64
    for n in lengths:
        octave = max(n, 1).bit_length() - 1
        slow[n if n < 2 else 2 * octave + (n >> (octave - 1) & 1)] += 1
    assert length_histogram(np.array(lengths)).tolist() == slow


def test_run_packing_is_exact_and_bounded():
    lengths, classes = np.array([0, 1, 2**24 - 1]), np.array([255, 0, 7])
    back = unpack_runs(pack_runs(lengths, classes))
    assert [b.tolist() for b in back] == [lengths.tolist(), classes.tolist()]
    with pytest.raises(ValueError, match=r"16777216 tokens"):
        pack_runs([2**24], [0])


def test_samples_and_shards_have_a_largest_size():
    """2**31 tokens as a view that takes no memory."""
    ids = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2**31,), (0,))
    none = np.zeros(0, SEGMENT)
    huge = Samples(ids, np.array([0, 2**31]), none, np.array([0, 0]), np.array([3], dtype=np.uint64))
    with pytest.raises(ShardError, match=r"sample 0x3: OFF: 2147483648 tokens; expected at most 2147483647"):
        check_samples(SCHEMA, huge, "a.vts")


def _slow_is_legal(schema: Schema, sample: Sample) -> bool:
    """The rules of a sample as loops over plain Python."""
    stops = [g[0] for g in sample.segments[1:]] + [len(sample.ids)]
    if sample.key == 0 or (sample.segments and sample.segments[0][0] != 0):
        return False
    for (start, modality, role, _, flags, t, h, w, _), stop in zip(sample.segments, stops):
        if start > stop or modality > 4 or role > 5 or flags > 1:
            return False
        if modality in (1, 2) and flags == 0 and (t, h, w) != (0, 0, 0) and t * h * w != stop - start:
            return False
        names = {0: ["text"], 1: ["visual"], 2: ["visual"]}.get(modality, schema.vocab.names)
        allowed = {i for name in names for i in range(schema.vocab[name].base, schema.vocab[name].end)}
        if not set(sample.ids[start:stop]) <= allowed:
            return False
    if not set(sample.ids) | set(sample.labels or ()) <= set(range(schema.vocab.size)):
        return False
    return not sample.runs or sum(n for n, _ in sample.runs) == len(sample.ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_is_legal_is_what_the_rules_as_a_loop_say(data):
    """One number of a legal batch is changed; the C++ finds exactly what the loop finds, in the first such sample."""
    schema = Schema(VOCAB, labels=True)
    found = dressed(data.draw(samples(VOCAB, max_size=5).filter(bool)), schema)
    bad = data.draw(st.integers(0, len(found) - 1))
    sample = found[bad]
    number = data.draw(st.sampled_from([0, 1, 2, 3, 5, 6, 38, 39, 40, 63, 64, 255]))
    what = data.draw(st.sampled_from(["ids", "labels", "segments", "runs", "key"]))
    if what == "key":
        found[bad] = replace(sample, key=number)
    elif rows := getattr(sample, what):
        row = data.draw(st.integers(0, len(rows) - 1))
        new = number
        if what in ("segments", "runs"):
            column = data.draw(st.integers(0, len(rows[row]) - 1))
            new = (*rows[row][:column], number, *rows[row][column + 1 :])
        found[bad] = replace(sample, **{what: [*rows[:row], new, *rows[row + 1 :]]})
    (ids, cu, segments, segment_cu), options = batch(found, schema=schema)
    dtype = data.draw(st.sampled_from(["u1", "<u2", "<u4", "<i4", "<i8"]))
    portable = data.draw(st.booleans())
    ids, labels = (Ids(values.astype(dtype), portable=portable) for values in (ids, options["labels"]))
    runs, run_cu = options["runs"], options["run_offsets"]
    arrays = Samples(ids, cu, segments, segment_cu, options["keys"], runs, run_cu, labels)
    wrong = [s for s in found if not _slow_is_legal(schema, s)]
    if wrong:
        named = f"sample {wrong[0].key:#x}:" if wrong[0].key else "key 0"
        with pytest.raises(ShardError, match=named):
            check_samples(schema, arrays, "a.vts")
    else:
        numbers = [i for s in found for i in s.ids + s.labels]
        assert check_samples(schema, arrays, "a.vts") == ((min(numbers), max(numbers)) if numbers else None)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_one_id_out_of_range_is_found_at_any_place_of_long_spans(data):
    """Spans longer than a vector and than a chunk of decoded ids, of every dtype, with and without wide vectors."""
    dtype, bits = data.draw(
        st.sampled_from([("u1", 0), ("<u2", 0), ("<u4", 0), ("<i4", 0), ("<i8", 0), ("<u2", 1), ("<u2", 2)])
    )
    length = data.draw(st.integers(1, 200) | st.integers(1000, 3000))
    before = data.draw(st.integers(0, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    size = (250 if dtype == "u1" else 60000) << bits
    schema = Schema(Vocabulary.of(text=size))
    ids = rng.integers(0, size, before + length)
    bad = data.draw(st.none() | st.integers(0, length - 1))
    if bad is not None:
        ids[before + bad] = size + data.draw(st.integers(0, 5))
    spare = rng.integers(0, 2**16, data.draw(st.integers(0, 600)))  # what follows in the arrays
    plane = PlaneBytes(bits) if bits else None
    if plane:
        both = np.concatenate([ids, spare]).astype(np.int32)
        high = np.concatenate([plane.split(both, np.empty(len(both), np.uint16)), plane.rest()])
    stored = Ids(
        np.concatenate([ids, spare]).astype(dtype),
        high if plane else None,
        bits,
        before,
        length,
        portable=data.draw(st.booleans()),
    )
    one = np.array([0, length])
    segments = np.zeros(1, SEGMENT)
    samples = Samples(stored, one, segments, np.array([0, 1]), np.array([9], np.uint64))
    if bad is None:
        assert check_samples(schema, samples, "a.vts") == (ids[before:].min(), ids[before:].max())
    else:
        with pytest.raises(ShardError, match=f"sample 0x9: TOK: token {bad} is id {ids[before + bad]}; "):
            check_samples(schema, samples, "a.vts")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((np.zeros(3),), ValueError),
        ((np.zeros(3, ">u2"),), ValueError),
        ((np.zeros((2, 2), np.int32),), ValueError),
        ((np.zeros(6, np.int32)[::2],), ValueError),
        ((np.zeros(9, np.uint16), np.zeros(1, np.uint8), 1), IndexError),
        ((np.zeros(9, np.uint16), np.zeros(9, np.uint8), 3), ValueError),
        ((np.zeros(9, np.uint32), np.zeros(9, np.uint8), 1), ValueError),
        ((np.zeros(9, np.uint16), None, 0, 10), IndexError),
        ((np.zeros(9, np.uint16), None, 0, 5, 5), IndexError),
        ((np.zeros(9, np.uint16), None, 0, 5, 2**64 - 1), IndexError),
    ],
)
def test_ids_that_are_not_there_are_refused(arguments, error):
    with pytest.raises(error, match="ids: "):
        Ids(*arguments)
