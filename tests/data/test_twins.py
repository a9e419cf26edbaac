"""Twins against a reader that knows only the layout: rows of every dtype, blobs, and what is refused."""

from __future__ import annotations

import hashlib
import os
import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_model import VOCAB, overwrite, rewrite_footer, slow_read_twin, some_samples, write_shard

from vtrain import failpoints
from vtrain.data.format import Kind, Schema, ShardError, read_pages
from vtrain.data.reader import Shard
from vtrain.data.twins import ROW_DTYPES, BlobWriter, FeatureWriter, Twin, twin_info, twin_path
from vtrain.data.verify import verify

# Largest error of a stored number, relative to itself (f2, bf16) or to the largest of its row (i1: half a step of 127).
ERRORS = {"f4": 0.0, "f2": 2.0**-11, "bf16": 2.0**-8, "i1": 0.5 / 127}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "00000.vts"
    write_shard(path, Schema(VOCAB), some_samples(12))
    return Shard(path)


def _segments(shard) -> int:
    return shard.footer.sections["SEG"].count


def _write_features(folder, shard, rows, counts, *, dtype="f4", cuts=(), name="clip"):
    path = folder / f"00000.{name}.vtf"
    with FeatureWriter(path, shard, name, dim=rows.shape[1], dtype=dtype, producer="tower 1") as writer:
        cu = np.cumsum([0, *counts])
        for first, last in pairwise((0, *cuts, len(counts))):
            writer.append(rows[cu[first] : cu[last]], counts[first:last])
    return path, writer.info


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_kept_within_the_error_of_their_dtype(tmp_path, shard, dtype, data):
    count = _segments(shard)
    counts = np.array(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = (rng.normal(size=(counts.sum(), data.draw(st.integers(1, 9)))) * 100).astype(np.float32)
    rows[rng.random(len(rows)) < 0.2] = 0
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=2)))
    path, info = _write_features(tmp_path, shard, rows, counts, dtype=dtype, cuts=cuts)
    meta, stored = slow_read_twin(path)
    assert meta == {"name": "clip", "kind": "features", "dim": rows.shape[1], "dtype": dtype, "producer": "tower 1"}
    assert [len(segment) for segment in stored] == counts.tolist()
    flat = np.array([row for segment in stored for row in segment], dtype=np.float64).reshape(rows.shape)
    scale = np.abs(rows).max(axis=1, keepdims=True) if dtype == "i1" else np.abs(rows)
    assert (np.abs(flat - rows) <= ERRORS[dtype] * scale * (1 + 1e-6) + (dtype == "f2") * 2.0**-25).all()
    assert (info.segments, info.rows, info.uuid) == (count, len(rows), shard.footer.uuid.hex())
    assert info == twin_info(path)
    assert verify(path) == []

    twin = Twin(path)
    wanted = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=9)), dtype=np.int64)
    found, cu = twin.rows(wanted)
    assert found.dtype == np.float32
    assert twin.counts(wanted).tolist() == np.diff(cu).tolist() == counts[wanted].tolist()
    expected = [row for n in wanted for row in stored[n]]
    np.testing.assert_allclose(found, np.array(expected).reshape(-1, rows.shape[1]), rtol=1e-6)


def test_rounding_is_to_the_nearest_and_ties_go_to_even(tmp_path, shard):
    """bf16 keeps 8 bits of a number: 1 + 2**-8 lies half way between 1 and 1 + 2**-7."""
    numbers = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -(1 + 2.0**-8), 0.0, -0.0, 2.0**-133]
    counts = np.zeros(_segments(shard), np.int64)
    counts[3] = 1
    path, _ = _write_features(tmp_path, shard, np.array([numbers], np.float32), counts, dtype="bf16")
    expected = [1.0, 1 + 2.0**-6, 1 + 2.0**-7, -1.0, 0.0, -0.0, 2.0**-133]
    (row,) = Twin(path).rows([3])[0].tolist()
    assert [struct.pack("<f", x) for x in row] == [struct.pack("<f", x) for x in expected]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_blobs_are_kept_as_they_are(tmp_path, shard, data):
    count = _segments(shard)
    blobs = data.draw(st.lists(st.binary(max_size=20), min_size=count, max_size=count))
    path = tmp_path / "00000.image.vtf"
    cut = data.draw(st.integers(0, count))
    with BlobWriter(path, shard, "image", producer="camera") as writer:
        for part in (blobs[:cut], blobs[cut:]):
            writer.append(b"".join(part), np.array([len(b) for b in part], dtype=np.int64))
    meta, stored = slow_read_twin(path)
    assert meta == {"name": "image", "kind": "blobs", "dim": 0, "dtype": "", "producer": "camera"}
    assert stored == blobs
    assert verify(path) == []
    twin = Twin(path)
    wanted = data.draw(st.lists(st.integers(0, count - 1), max_size=9))
    assert twin.blobs(wanted) == [blobs[n] for n in wanted]
    assert twin.counts(wanted).tolist() == [len(blobs[n]) for n in wanted]
    assert len(twin) == count
    assert twin.info == writer.info
    assert os.listdir(tmp_path) == [path.name]


def test_the_bytes_do_not_depend_on_the_batches(tmp_path, shard):
    counts = np.arange(_segments(shard)) % 3
    rows = np.random.default_rng(0).normal(size=(counts.sum(), 5)).astype(np.float32)
    contents = set()
    for cuts in ((), (1,), (2, 2, 9)):
        path, _ = _write_features(tmp_path, shard, rows, counts, dtype="i1", cuts=cuts)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def _filled(shard, rows):
    counts = np.zeros(_segments(shard), np.int64)
    counts[2] = len(rows)
    return np.array(rows, np.float32), counts


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        ("f4", np.nan),
        ("f4", np.inf),
        ("f2", 65520.0),
        ("bf16", 3.4e38),
        ("bf16", np.nan),
        ("i1", np.inf),
        ("i1", np.nan),
    ],
)
def test_numbers_that_a_dtype_cannot_hold_are_refused_by_segment(tmp_path, shard, dtype, number):
    rows, counts = _filled(shard, [[1.0, 2.0], [3.0, number]])
    with pytest.raises(ValueError, match=f"segment 2: a row of numbers that {dtype} cannot hold"):
        _write_features(tmp_path, shard, rows, counts, dtype=dtype)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("rows", "counts", "message"),
    [
        (np.zeros((2, 3), np.float32), [1, 1], r"rows are float32\[2, 3\]; expected float32\[R, 2\]"),
        (np.zeros((2, 2), np.int64), [1, 1], "rows are int64"),
        (np.zeros((2, 2), np.float32), [1, 2], "counts of 3 in all; expected 2"),
        (np.zeros((2, 2), np.float32), [3, -1], "counts -1..3"),
        (np.zeros((2, 2), np.float32), [2.0], "counts are float64"),
        (np.zeros((2, 2), np.float32), [2, *[0] * 99], "100 segments; expected"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_leave_no_trace(tmp_path, shard, rows, counts, message):
    good, good_counts = _filled(shard, [[1.0, 2.0]])
    with FeatureWriter(tmp_path / "00000.clip.vtf", shard, "clip", dim=2, dtype="f4", producer="") as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(rows, counts)
        writer.append(good, good_counts)
    assert [len(segment) for segment in slow_read_twin(tmp_path / "00000.clip.vtf")[1]] == good_counts.tolist()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("00000.clip.vtf", {"dim": 0}, "rows of 0 'f4'; expected at least 1 of f4, f2, bf16, i1"),
        ("00000.clip.vtf", {"dtype": "f8"}, "rows of 2 'f8'"),
        ("00000.other.vtf", {}, "00000.other.vtf: name: expected 00000.clip.vtf, the twin clip of 00000.vts"),
        ("00000.Clip.vtf", {"name": "Clip"}, "twin 'Clip': expected a name of 1..12 of a-z, 0-9 and _"),
    ],
)
def test_bad_options_are_refused_before_a_file_exists(tmp_path, shard, name, options, message):
    options = {"name": "clip", "dim": 2, "dtype": "f4", "producer": "", **options}
    with pytest.raises(ValueError, match=message):
        FeatureWriter(tmp_path / name, shard, **options)
    assert os.listdir(tmp_path) == []


def test_a_twin_of_too_few_segments_is_not_finished(tmp_path, shard):
    with (
        pytest.raises(ShardError, match=f"1 segments; expected {_segments(shard)} as 00000.vts"),
        BlobWriter(tmp_path / "00000.image.vtf", shard, "image", producer="") as writer,
    ):
        writer.append(b"abc", [3])
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="abandoned"):
        writer.close()


@pytest.mark.parametrize("segments", [[-1], [99], [2**63], [0.5], [[0]], np.array([2**64 - 1], np.uint64)])
def test_segments_that_are_not_there_are_an_index_error(tmp_path, shard, segments):
    path, _ = _write_features(tmp_path, shard, *_filled(shard, [[1.0]]))
    for method in (Twin(path).counts, Twin(path).rows):
        with pytest.raises(IndexError):
            method(segments)


@pytest.mark.parametrize("value", [0, 9, 2**63, 2**64 - 1])
def test_damaged_offsets_are_refused_before_they_are_used(tmp_path, shard, value):
    counts = np.ones(_segments(shard), np.int64)
    path, _ = _write_features(tmp_path, shard, np.ones((len(counts), 2), np.float32), counts, dtype="i1")
    section = read_pages(path, Kind.FEATURES)[0].sections["ROWO"]
    overwrite(path, section.offset + 8 * 6, value.to_bytes(8, "little"), checksums=True)
    for broken in ([5], [6], [3, 5, 6]):
        if value == 9 and broken == [5]:
            continue  # 5..9 is legal, 9..7 is not
        if value == 0 and broken == [6]:
            continue
        with pytest.raises(ShardError, match=r"ROWO: segment [56] spans"):
            Twin(path).rows(broken)
    Twin(path).rows([3, 4, 7])


def _footer(path):
    return read_pages(path, *Kind)[0]


def test_lies_of_a_twin_are_refused_at_opening(tmp_path, shard):
    path, _ = _write_features(tmp_path, shard, *_filled(shard, [[1.0, 2.0]]), dtype="i1")
    content = path.read_bytes()
    meta = _footer(path).sections["META"]
    text = content[meta.offset : meta.offset + meta.bytes]
    wrong = [
        text.replace(b'"dim":2', b'"dim":1'),
        text.replace(b'"i1"', b'"f2"'),
        text.replace(b"features", b"blobs   "),
    ]
    for spelling in [*wrong, text.replace(b'"dim"', b'"din"'), text.replace(b"clip", b"CLIP"), b"[".ljust(len(text))]:
        assert spelling != text
        overwrite(path, meta.offset, spelling, checksums=True)
        with pytest.raises(ShardError, match="META: expected the text of sha256"):
            Twin(path)
        rewrite_footer(path, schema_hash=hashlib.sha256(spelling).hexdigest())
        with pytest.raises(ShardError, match=r"00000.clip.vtf: (META: |section ROW: )"):
            Twin(path)
        assert len(verify(path)) == 1
        path.write_bytes(content)
    for change, message in (
        ({"tokens": 3}, "section (SCALE|ROW)"),
        ({"samples": 1}, "section ROWO: .* items, expected 2"),
        ({"sections": {id: s for id, s in _footer(path).sections.items() if id != "SCALE"}}, "section SCALE: expected"),
        ({"sections": {id: s for id, s in _footer(path).sections.items() if id != "ROWO"}}, "no section ROWO"),
    ):
        rewrite_footer(path, **change)
        with pytest.raises(ShardError, match=message):
            Twin(path)
        path.write_bytes(content)


def test_a_twin_is_no_shard_and_features_are_no_blobs(tmp_path, shard):
    path, _ = _write_features(tmp_path, shard, *_filled(shard, [[1.0]]))
    with pytest.raises(ShardError, match="a file of kind features; expected shard"):
        Shard(path)
    with pytest.raises(ShardError, match="a file of kind shard; expected features or blobs"):
        Twin(shard.path)
    with pytest.raises(ValueError, match="a twin of features; expected blobs"):
        Twin(path).blobs([0])


def test_twins_of_one_shard_can_be_written_at_once(tmp_path, shard):
    count = _segments(shard)
    names = ("a", "b")
    writers = [BlobWriter(tmp_path / f"00000.{name}.vtf", shard, name, producer="") for name in names]
    assert len(os.listdir(tmp_path)) == 2
    for name, writer in zip(names, writers, strict=True):
        writer.append(name.encode() * count, np.ones(count, np.int64))
    for writer in writers:
        writer.close()
    assert [Twin(twin_path(tmp_path / "00000.vts", name)).blobs([0]) for name in names] == [[b"a"], [b"b"]]


def _killed_at(path, shard, blobs: list[bytes], fault: str) -> bool:
    """Write a twin in a child process with a failpoint set; whether it died of it."""
    child = os.fork()
    if child == 0:
        failpoints.activate({"VTRAIN_FAILPOINT": fault})
        try:
            with BlobWriter(path, shard, "image", producer="") as writer:
                for blob in blobs:
                    writer.append(blob, [len(blob)])
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9


def test_a_writer_killed_at_any_point_leaves_the_old_twin_and_a_new_one_replaces_it_whole(tmp_path, shard):
    path = tmp_path / "00000.image.vtf"
    old, new = ([bytes([value]) * n for n in range(_segments(shard))] for value in (1, 2))
    assert not _killed_at(path, shard, old, "")
    before = path.read_bytes()
    kills = 0
    for operation in ("write", "fsync", "rename"):
        for number in range(1, 99):
            if not _killed_at(path, shard, new, f"{operation}:image.vtf#{number}:kill"):
                break
            kills += 1
            assert path.read_bytes() == before
            assert [name[:5] for name in os.listdir(tmp_path) if name != path.name] == [".tmp-"]
            assert verify(path) == []
        assert slow_read_twin(path)[1] == new
        path.write_bytes(before)
    assert kills > 15
    assert os.listdir(tmp_path) == [path.name]
