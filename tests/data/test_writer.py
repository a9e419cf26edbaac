"""The writer against a reader that knows only the layout; what it refuses; and that nothing half-written has a name."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_model import VOCAB, Sample, batch, dressed, samples, slow_read, some_samples, write_shard

from vtrain._host import crc32c, crc32c_blocks
from vtrain.data import format
from vtrain.data.container import BlockChecksums, ContainerWriter
from vtrain.data.format import (
    COLUMN_DTYPES,
    SEGMENT,
    STORES,
    Modality,
    Role,
    Schema,
    SegmentFlag,
    ShardError,
    read_pages,
)
from vtrain.data.verify import verify
from vtrain.data.writer import ShardWriter
from vtrain.vocab import Vocabulary

SCHEMA = Schema(VOCAB)
# Vocabularies whose last id is the last that a store holds, or the first of the next one.
BORDERS = (255, 256, 257, 2**16, 2**16 + 1, 2**17, 2**17 + 1, 2**18, 2**18 + 1, 2**31 - 1)
COLUMNS = {f"c{n}": dtype for n, dtype in enumerate(COLUMN_DTYPES)}
FULL = Schema(Vocabulary.of(text=100, visual=2**17 - 100), columns={"quality": "<f4", "class": "<u2"}, labels=True)


@pytest.mark.parametrize("size", BORDERS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_appended_is_in_the_file(tmp_path, size, data):
    vocab = Vocabulary.of(text=100, visual=size - 100)
    columns = data.draw(st.sampled_from([{}, COLUMNS]))
    schema = Schema(vocab, columns=columns, labels=data.draw(st.booleans()))
    found = dressed(data.draw(samples(vocab)), schema)
    cuts = tuple(sorted(data.draw(st.lists(st.integers(0, len(found)), max_size=2))))
    store = data.draw(st.sampled_from([None, *(s.name for s in STORES.values() if s.capacity >= size)]))
    path = tmp_path / "a.vts"
    info = write_shard(path, schema, found, cuts=cuts, id_store=store)
    spelling, stored = slow_read(path)
    if any(s.runs for s in found):
        found = [replace(s, runs=s.runs or []) for s in found]
    assert stored == found
    assert spelling == schema.to_json()
    assert (info.samples, info.tokens, info.bytes) == (
        len(found),
        sum(len(s.ids) for s in found),
        os.stat(path).st_size,
    )
    assert verify(path) == []
    assert os.listdir(tmp_path) == ["a.vts"]


@pytest.mark.parametrize("store", ["u8", "u16+1", "u16+2"])
def test_the_bytes_do_not_depend_on_the_batches(tmp_path, store):
    schema = SCHEMA if store == "u8" else FULL
    found = dressed(some_samples(40, vocab=schema.vocab), schema)
    for name, cuts in (("a", ()), ("b", (1, 1, 7, 39)), ("c", tuple(range(1, 40)))):
        write_shard(tmp_path / f"{name}.vts", schema, found, cuts=cuts, uuid=b"u" * 16, id_store=store)
    one, *others = [(tmp_path / f"{name}.vts").read_bytes() for name in "abc"]
    assert others == [one, one]


@pytest.mark.parametrize(("store", "size"), [("u16+1", 2**17), ("u16+2", 2**18)])
def test_planes_hold_the_high_bits_of_long_samples(tmp_path, store, size):
    rng = np.random.default_rng(0)
    schema = Schema(Vocabulary.of(text=size), labels=True)
    found = []
    for key, n in enumerate((1, 4001, 7, 0, 2500, 3), start=1):
        ids, labels = (rng.integers(0, size, n).tolist() for _ in range(2))
        found.append(Sample(key, ids, labels=labels))
    path = tmp_path / "a.vts"
    write_shard(path, schema, found, cuts=(1, 3, 4))
    assert read_pages(path)[0].store.name == store
    assert slow_read(path)[1] == found
    assert verify(path) == []


def test_runs_may_come_in_some_batches_only(tmp_path):
    bare, scored = some_samples(3, seed=1), some_samples(4, seed=2)
    with ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16)) as writer:
        for part, with_runs in ((bare, False), (scored, True), (bare, False)):
            arguments, keywords = batch(part, with_runs)
            writer.append_batch(*arguments, **keywords)
    expected = [[], [], [], *(s.runs for s in scored), [], [], []]
    assert [s.runs for s in slow_read(tmp_path / "a.vts")[1]] == expected


def test_offsets_may_name_a_window_of_larger_arrays(tmp_path):
    (ids, offsets, segments, segment_offsets), options = batch(some_samples(10))
    with ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16)) as writer:
        options["keys"], options["run_offsets"] = options["keys"][3:8], options["run_offsets"][3:9]
        writer.append_batch(ids, offsets[3:9], segments, segment_offsets[3:9], **options)
    assert slow_read(tmp_path / "a.vts")[1] == some_samples(10)[3:8]


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "u4", "i8", "u8", ">i4"])
def test_ids_come_in_any_integer_type(tmp_path, dtype):
    found = [Sample(1, [0, 39, 5], [(0, 0, 0, 0, 0, 0, 0, 0, 0)]), Sample(2, [63])]
    (ids, *rest), options = batch(found, with_runs=False)
    with ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16), id_store="u32") as writer:
        writer.append_batch(ids.astype(dtype), *rest, **options)
    assert slow_read(tmp_path / "a.vts")[1] == found


@settings(max_examples=50, deadline=None)
@given(pieces=st.lists(st.binary(max_size=40), max_size=12), block=st.integers(1, 33))
def test_streamed_block_checksums_equal_those_of_the_whole(pieces, block):
    stream = BlockChecksums(block)
    for piece in pieces:
        assert stream.update(memoryview(piece)) == crc32c(piece)
    assert stream.result().tolist() == crc32c_blocks(np.frombuffer(b"".join(pieces) or b"", np.uint8), block).tolist()


def _segment(start, modality=Modality.TEXT, role=Role.INPUT, flags=0, grid=(0, 0, 0)):
    return (start, modality, role, 0, flags, *grid, 0)


IMAGE = Modality.IMAGE
REFUSED = {
    "text id in the visual range": (Sample(5, [1, 40], [_segment(0)]), "token 1 is id 40; .* text segments: 0..39"),
    "text id in a picture": (
        Sample(5, [40, 63, 39], [_segment(0, IMAGE)]),
        "token 2 is id 39; .* image segments: 40..63",
    ),
    "id after the vocabulary": (Sample(5, [64], [_segment(0, IMAGE)]), "token 0 is id 64; .*: 40..63"),
    "negative id": (Sample(5, [3, -1], [_segment(0)]), "token 1 is id -1"),
    "id without segment": (Sample(5, [0, 63, 64]), "token 2 is id 64; expected one of the vocabulary: 0..63"),
    "key 0": (Sample(0, [1]), "KEY: sample 2 of the batch has key 0"),
    "gap before the first segment": (Sample(5, [1, 2], [_segment(1)]), "expected the first segment to start at 0"),
    "falling starts": (Sample(5, [1] * 4, [_segment(0), _segment(3), _segment(2)]), "segment 1 has -1 tokens"),
    "start after the end": (Sample(5, [1, 2], [_segment(0), _segment(3)]), "segment 1 has -1 tokens, start 3"),
    "unknown modality": (Sample(5, [1], [_segment(0, 5)]), r"modality 5,.*expected modality 0 \(text\), 1 \(image\)"),
    "unknown role": (Sample(5, [1], [_segment(0, role=6)]), r"role 6,.*expected role 0 \(input\)"),
    "unknown flag": (Sample(5, [1], [_segment(0, flags=2)]), r"flags 2,.*expected flags 1 \(merged\)"),
    "grid of another size": (
        Sample(5, [40] * 6, [_segment(0, IMAGE, grid=(1, 2, 2))]),
        "segment 0 has 6 tokens.*t 1, h 2",
    ),
    "half a grid": (Sample(5, [40] * 6, [_segment(0, IMAGE, grid=(0, 2, 3))]), r"expected t \* h \* w tokens"),
    "overflowing grid": (Sample(5, [], [_segment(0, IMAGE, grid=(65535, 65535, 65535))]), "expected t"),
    "short runs": (Sample(5, [1, 2, 3], [], [(1, 0), (1, 1)]), "RUN: loss runs of 2 tokens; expected 3 or none"),
    "long runs": (Sample(5, [1], [], [(1, 0), (1, 1)]), "RUN: loss runs of 2 tokens; expected 1 or none"),
    "id among many": (Sample(5, [7] * 50 + [40] + [7] * 50, [_segment(0)]), "token 50 is id 40; .* text segments"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_illegal_samples_are_refused_by_key_and_leave_no_trace(tmp_path, case):
    bad, message = REFUSED[case]
    good = some_samples(6)
    with ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16)) as writer:
        arguments, options = batch(good[:4])
        writer.append_batch(*arguments, **options)
        arguments, options = batch([good[0], good[5], bad, good[1]])
        with pytest.raises(ShardError, match=message) as error:
            writer.append_batch(*arguments, **options)
        assert str(tmp_path / "a.vts") in str(error.value)
        assert bad.key == 0 or "sample 0x5:" in str(error.value)
        arguments, options = batch(good[4:])
        writer.append_batch(*arguments, **options)
    assert slow_read(tmp_path / "a.vts")[1] == good


def test_merged_pictures_need_no_full_grid_and_may_hold_visual_bpe_ids(tmp_path):
    schema = Schema(Vocabulary.of(text=10, visual=10, vbpe=10))
    merged = _segment(0, IMAGE, flags=SegmentFlag.MERGED, grid=(1, 4, 4))
    write_shard(tmp_path / "a.vts", schema, [Sample(1, [10, 19, 20, 29], [merged])])
    with pytest.raises(ShardError, match=r"token 1 is id 9; .*: 10..29"):
        write_shard(tmp_path / "b.vts", schema, [Sample(1, [29, 9], [merged])])
    with pytest.raises(ShardError, match=r"token 0 is id 20; .*: 10..19"):
        write_shard(tmp_path / "b.vts", schema, [Sample(1, [20], [_segment(0, IMAGE)])])
    with pytest.raises(ShardError, match="no range of their own"):
        write_shard(tmp_path / "b.vts", Schema(Vocabulary.of(text=10)), [Sample(1, [2], [_segment(0, IMAGE)])])


FIVE = {
    "TOK": [Sample(1, [1] * 5)],
    "KEY": [Sample(key, []) for key in range(1, 6)],
    "SEG": [Sample(1, [], [_segment(0)] * 5)],
    "RUN": [Sample(1, [1], [], [(1, 0), *[(0, 0)] * 4])],
}


@pytest.mark.parametrize("section", FIVE)
def test_a_shard_refuses_more_rows_than_its_offsets_can_count(tmp_path, monkeypatch, section):
    monkeypatch.setattr(format, "MAX_ROWS", 9)
    arguments, options = batch(FIVE[section])
    with ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16)) as writer:
        writer.append_batch(*arguments, **options)
        with pytest.raises(ShardError, match=f"{section}: 10 items; a shard holds at most 9"):
            writer.append_batch(*arguments, **options)
    assert slow_read(tmp_path / "a.vts")[1] == [replace(s, runs=s.runs or []) for s in FIVE[section]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": [0, 2, 1, 3]}, "offsets: 4 numbers for 3 samples and 3 items"),
        ({"offsets": [0, 1, 2, 4]}, r"expected 4 rising ones in 0..3"),
        ({"offsets": [-1, 1, 2, 3]}, "offsets"),
        ({"offsets": [0, 3]}, "offsets: 2 numbers for 3 samples"),
        ({"segment_offsets": [0, 0, 0, 1]}, "segment_offsets: 4 numbers for 3 samples and 0 items"),
        ({"ids": np.zeros(3)}, "ids are float64"),
        ({"keys": [1.0, 2.0, 3.0]}, "keys are float64"),
        ({"segments": np.zeros((0, 9), np.int64)}, "segments are int64"),
        ({"runs": np.zeros(3, np.uint32)}, "runs and run_offsets go together"),
        ({"runs": np.zeros(3, np.uint32), "run_offsets": [0, 1, 2, 9]}, "run_offsets"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(tmp_path, change, message):
    good = {"ids": [1, 2, 3], "offsets": [0, 1, 2, 3], "segments": np.zeros(0, SEGMENT), "segment_offsets": [0] * 4}
    with ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16)) as writer, pytest.raises(ValueError, match=message):
        writer.append_batch(**{**good, "keys": [1, 2, 3], **change})


def _full_batch(**changes) -> dict:
    good = {"ids": [1, 2, 3], "offsets": [0, 1, 2, 3], "segments": np.zeros(0, SEGMENT), "segment_offsets": [0] * 4}
    columns = {"quality": [0.5, 1, 2], "class": [0, 1, 65535]}
    return {**good, "keys": [1, 2, 3], "labels": [0, 2**17 - 1, 5], "columns": columns, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "labels missing; the schema says labels=True"),
        ({"labels": [1, 2]}, "labels: 2 for 3 ids"),
        ({"labels": [1.0, 2.0, 3.0]}, "labels are float64, expected integers"),
        ({"labels": [1, 2, 2**17]}, r"sample 0x3: LBL: token 0 has label 131072; expected one of .*: 0..131071"),
        ({"labels": [1, -100, 3]}, r"sample 0x2: LBL: token 0 has label -100"),
        ({"columns": None}, "columns: found none; the schema has class, quality"),
        ({"columns": {"quality": [1, 2, 3]}}, "columns: found quality; the schema has class, quality"),
        ({"columns": {"quality": [1, 2], "class": [1, 2, 3]}}, r"column quality: int64 of shape \(2,\); .* numbers"),
        ({"columns": {"quality": [1, 2, 3], "class": [1, 2, 0.5]}}, "column class: float64 .*; expected integers"),
        ({"columns": {"quality": [1, 2, 3], "class": [1, 2, 65536]}}, r"column class: values 1..65536; .* of uint16"),
        ({"columns": {"quality": [1, 2, 3], "class": [-1, 2, 3]}}, "column class: values -1..3"),
        ({"columns": {"quality": ["a", "b", "c"], "class": [1, 2, 3]}}, "column quality: <U1"),
    ],
)
def test_labels_and_columns_that_do_not_fit_the_schema_are_refused(tmp_path, change, message):
    path = tmp_path / "a.vts"
    with ShardWriter(path, FULL, uuid=bytes(16)) as writer:
        writer.append_batch(**_full_batch())
        with pytest.raises(ValueError, match=message):
            writer.append_batch(**_full_batch(**change))
    stored = slow_read(path)[1]
    assert [s.labels for s in stored] == [[0], [2**17 - 1], [5]]
    assert [s.columns for s in stored] == [
        {"class": c, "quality": q} for c, q in zip((0, 1, 65535), (0.5, 1.0, 2.0), strict=True)
    ]


def test_labels_and_columns_of_schemas_without_are_refused(tmp_path):
    none = {"labels": None, "columns": None}
    with ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16)) as writer:
        with pytest.raises(ValueError, match="labels given; the schema says labels=False"):
            writer.append_batch(**_full_batch(**{**none, "labels": [1, 2, 3]}))
        with pytest.raises(ValueError, match="columns: found class, quality; the schema has none"):
            writer.append_batch(**_full_batch(labels=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"uuid": b"short"}, "16 bytes, found 5"), ({"uuid": bytes(16), "id_store": "u8"}, "id store u8 does not hold"),
     ({"uuid": bytes(16), "id_store": "i4"}, r"id store 'i4'; expected one of u8, u16, u16\+1, u16\+2, u32")],
)  # fmt: skip
def test_bad_options_are_refused_before_a_file_exists(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ShardWriter(tmp_path / "a.vts", Schema(Vocabulary.of(text=257)), **options)
    assert os.listdir(tmp_path) == []


def test_an_error_leaves_neither_the_shard_nor_its_temporary(tmp_path):
    writer = ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16))
    assert os.listdir(tmp_path) == [f".tmp-{'00' * 16}"]
    with pytest.raises(RuntimeError), writer:
        raise RuntimeError("the caller fails")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="abandoned"):
        writer.close()


@pytest.mark.parametrize("limit", [8192, 20000, 40000])
def test_a_full_disk_leaves_nothing(tmp_path, limit):
    """The limit is met while tokens stream, or between the sections at close."""
    arguments, options = batch(some_samples(300))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with (
            pytest.raises(OSError, match="File too large"),
            ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16)) as w,
        ):
            w.append_batch(*arguments, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def _killed_after(path, found, writes: int) -> bool:
    """Write a shard in a child process that dies in its `writes`-th write or rename; whether it died."""
    child = os.fork()
    if child == 0:
        left = writes

        def counted(call):
            def wrapped(*arguments):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return call(*arguments)

            return wrapped

        try:
            ContainerWriter._write = counted(ContainerWriter._write)
            os.replace = counted(os.replace)
            os.fdatasync = counted(os.fdatasync)
            write_shard(path, SCHEMA, found, cuts=(5,))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_writer_killed_at_any_point_leaves_the_old_shard_and_a_new_one_replaces_it_whole(tmp_path):
    old, new = some_samples(8, seed=1), some_samples(12, seed=2)
    path = tmp_path / "a.vts"
    write_shard(path, SCHEMA, old, uuid=b"o" * 16)
    before = path.read_bytes()
    for writes in range(100):
        if not _killed_after(path, new, writes):
            break
        assert path.read_bytes() == before
        assert {name.startswith(".tmp-") for name in os.listdir(tmp_path) if name != "a.vts"} <= {True}
        assert verify(path) == []
    assert 15 < writes < 40
    assert slow_read(path)[1] == new
    assert os.listdir(tmp_path) == ["a.vts"]  # the one that finished took over the temporary of those that did not


@pytest.mark.slow
def test_a_writer_killed_at_random_moments_never_leaves_a_shard_that_is_not_whole(tmp_path):
    rng = np.random.default_rng(0)
    found = dressed(some_samples(400, vocab=FULL.vocab), FULL)
    write_shard(tmp_path / "a.vts", FULL, found)
    whole = (tmp_path / "a.vts").read_bytes()
    killed, path = 0, tmp_path / "new" / "a.vts"
    for _ in range(200):
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(told, b"x")
                write_shard(path, FULL, found, cuts=tuple(range(10, 400, 10)))
            finally:
                os._exit(0)
        os.read(ready, 1)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(ready)
        os.close(told)
        if path.exists():
            assert path.read_bytes() == whole
        else:
            assert {name[:5] for name in os.listdir(path.parent)} <= {".tmp-"}
            write_shard(path, FULL, found)
            assert path.read_bytes() == whole
            assert os.listdir(path.parent) == ["a.vts"]
    assert killed > 20
