"""Shards and datasets against lists of plain samples; damage of every kind is refused or found, never read past."""

from __future__ import annotations

import os
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_model import VOCAB, Sample, batch, overwrite, rewrite_footer, samples, some_samples, write_shard

from vtrain.data import manifest, writer
from vtrain.data.format import PAGE, SEGMENT, Modality, Schema, ShardError, read_pages, shard_info
from vtrain.data.reader import Dataset, Shard, verify
from vtrain.data.samples import unpack_runs

SCHEMA = Schema(VOCAB)


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "a.vts", SCHEMA, some_samples(12))
    return tmp_path / "a.vts"


def _dataset(folder, *parts):
    infos = [write_shard(folder / f"{n:05d}.vts", SCHEMA, part) for n, part in enumerate(parts)]
    manifest.publish(folder, SCHEMA, infos)
    return Dataset(folder)


def _rows(flat, cu):
    assert cu.dtype == np.int64
    assert cu[0] == 0
    assert cu[-1] == len(flat)
    return [flat[a:b].tolist() for a, b in pairwise(cu)]


def _check_equal(source, found: list[Sample], wanted: list[int]):
    """`source` answers for `wanted` what the plain samples say."""
    expected = [found[i] for i in wanted]
    indices = np.array(wanted, dtype=np.int64)
    ids, cu = source.read(indices)
    assert ids.dtype == np.int32
    assert _rows(ids, cu) == [s.ids for s in expected]
    lengths = source.lengths(indices)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(s.ids) for s in expected]
    keys = source.keys(indices)
    assert keys.dtype == np.uint64
    assert keys.tolist() == [s.key for s in expected]
    segments, segment_cu = source.segments(indices)
    assert _rows(segments[list(SEGMENT.names)], segment_cu) == [s.segments for s in expected]
    stops = [[*(g[0] for g in s.segments[1:]), len(s.ids)] for s in expected]
    spans = [[stop - g[0] for g, stop in zip(s.segments, row)] for s, row in zip(expected, stops)]
    assert _rows(segments["length"], segment_cu) == spans
    runs, run_cu = source.loss_runs(indices)
    assert runs.dtype == np.uint32
    run_lengths, classes = unpack_runs(runs)
    assert list(zip(_rows(run_lengths, run_cu), _rows(classes, run_cu))) == [
        ([n for n, _ in s.runs or ()], [c for _, c in s.runs or ()]) for s in expected
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_dataset_is_the_concatenation_of_its_shards(tmp_path_factory, data):
    parts = data.draw(st.lists(samples(VOCAB, max_size=5), min_size=1, max_size=4).filter(any))
    found = [s for part in parts for s in part]
    dataset = _dataset(tmp_path_factory.mktemp("d"), *parts)
    assert len(dataset) == len(found)
    assert dataset.tokens == sum(len(s.ids) for s in found)
    wanted = data.draw(st.lists(st.integers(0, len(found) - 1), max_size=12))
    _check_equal(dataset, found, wanted)
    _check_equal(dataset.shards[0], parts[0], [i for i in wanted if i < len(parts[0])])
    assert dataset.schema == dataset.shards[0].schema == SCHEMA


def test_all_orders_over_many_shards(tmp_path):
    parts = [some_samples(n, seed=n) for n in (7, 0, 1, 30)]
    dataset = _dataset(tmp_path, *parts)
    found = [s for part in parts for s in part]
    everything = list(range(len(found)))
    for order in (everything, everything[::-1], everything[7:8] * 5, [], [37, 0, 37]):
        _check_equal(dataset, found, order)
    assert dataset.name == tmp_path.name


@pytest.mark.parametrize("indices", [[-1], [12], [0, 99], [2**63], [0.0], [[0]], np.array([2**64 - 1], np.uint64)])
def test_samples_that_are_not_there_are_an_index_error(shard, indices):
    manifest.publish(shard.parent, SCHEMA, [shard_info(shard)])
    for source in (Shard(shard), Dataset(shard.parent)):
        for method in (source.read, source.lengths, source.segments, source.keys, source.loss_runs):
            with pytest.raises(IndexError):
                method(indices)


def test_answers_are_copies_and_the_mapping_cannot_be_written(shard):
    opened = Shard(shard)
    for array in (*opened.read([1, 2]), opened.keys([1]), *opened.segments([1])):
        array[...] = np.zeros((), dtype=array.dtype)
    assert verify(shard) == []
    with pytest.raises(ValueError, match="read-only"):
        opened.data[0] = 0


def test_opening_keeps_no_file_descriptor(shard):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    opened = [Shard(shard) for _ in range(20)]
    assert count() == before
    assert opened[-1].read([3])[0].tolist() == some_samples(12)[3].ids


def _damage(shard, section: str, item: int, value: int):
    found = read_pages(shard)[0].sections[section]
    overwrite(shard, found.offset + item * found.dtype.itemsize, value.to_bytes(4, "little"))
    return Shard(shard)


@pytest.mark.parametrize("value", [0, 10**6, 2**32 - 1])
@pytest.mark.parametrize(
    ("table", "method"), [("OFF", "read"), ("OFF", "lengths"), ("SEGO", "segments"), ("RUNO", "loss_runs")]
)
def test_damaged_offsets_are_refused_before_they_are_used(shard, table, method, value):
    damaged = _damage(shard, table, 5, value)
    for indices in ([4], np.arange(12)):  # item 5 is where sample 4 ends
        with pytest.raises(ShardError, match=rf"{table}: sample 4 spans"):
            getattr(damaged, method)(indices)
    assert verify(shard) != []


def test_damaged_segments_and_ids_are_refused_before_they_are_used(shard):
    found = read_pages(shard)[0].sections["TOK"]
    with pytest.raises(ShardError, match="SEG: sample 1: expected starts that rise"):
        _damage(shard, "SEG", 1, 2**31).segments([0, 1])
    overwrite(shard, found.offset + 20, b"\xff")
    with pytest.raises(ShardError, match="TOK: id 255; the footer says at most 63"):
        Shard(shard).read(np.arange(12))


def test_damaged_loss_runs_are_refused_before_they_are_used(shard):
    runs, cu = Shard(shard).loss_runs(np.arange(12))
    sample = int(np.flatnonzero(np.diff(cu))[1])
    length = int(Shard(shard).lengths([sample])[0])
    damaged = _damage(shard, "RUN", int(cu[sample]), int(runs[cu[sample]]) + 1)  # one token more
    for indices in ([sample], np.arange(12)):
        with pytest.raises(
            ShardError, match=rf"RUN: sample {sample}: loss runs of {length + 1} tokens; expected {length}"
        ):
            damaged.loss_runs(indices)
    damaged.loss_runs([i for i in range(12) if i != sample])


def test_a_shard_cut_at_any_section_or_page_is_refused(shard):
    content = shard.read_bytes()
    sections = read_pages(shard)[0].sections.values()
    edges = {0, 1, len(content), *range(0, len(content), PAGE)}
    edges |= {edge for s in sections for edge in (s.offset, s.offset + s.bytes)}
    for size in sorted({edge + d for edge in edges for d in (-1, 0, 1)} & set(range(len(content)))):
        shard.write_bytes(content[:size])
        with pytest.raises(ShardError, match=str(shard)):
            Shard(shard)
        assert len(verify(shard)) == 1
    for wrong in (content + b"\0", content + bytes(PAGE), content + content, content[PAGE:], bytes(len(content))):
        shard.write_bytes(wrong)
        with pytest.raises(ShardError, match=str(shard)):
            Shard(shard)


def _undetected(path, places) -> list[int]:
    """The places where a flipped byte is not found by `verify`."""
    missed = []
    for at in places:
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ (1 << at % 8)]))
        if not verify(path):
            missed.append(at)
        overwrite(path, at, bytes([byte]))
    return missed


def test_a_flipped_byte_is_found_wherever_something_is_written(shard):
    content = shard.read_bytes()
    written = [at for at, byte in enumerate(content) if byte]
    padding = random.Random(0).sample(range(len(content)), 600)
    assert verify(shard) == []
    assert _undetected(shard, [*written, *padding]) == []
    assert shard.read_bytes() == content


@pytest.mark.slow
def test_a_flipped_byte_is_found_at_every_position(shard):
    assert _undetected(shard, range(shard.stat().st_size)) == []


def test_verify_names_block_section_and_bytes(tmp_path):
    path = tmp_path / "a.vts"
    write_shard(path, SCHEMA, [Sample(n + 1, [n % 64] * 30000) for n in range(80)])  # 2.4 MB: blocks 0, 1 and 2
    calls = []
    assert verify(path, lambda done, total: calls.append((done, total))) == []
    assert calls[-1] == (path.stat().st_size, path.stat().st_size)
    overwrite(path, (1 << 20) + 5, b"\x7f")
    first, second = verify(path)
    assert "block 1 (bytes 1048576..2097152, TOK): crc32c" in first
    assert "section TOK: crc32c" in second


def test_padding_must_be_zero_even_where_checksums_agree(shard):
    for section in read_pages(shard)[0].sections.values():
        content = shard.read_bytes()
        overwrite(shard, section.offset + section.bytes, b"x", checksums=True)
        (problem,) = verify(shard)
        assert f"padding after {section.id}" in problem
        shard.write_bytes(content)


WRONG = {
    "illegal id": (Sample(5, [50], [(0, Modality.TEXT, 0, 0, 0, 0, 0, 0, 0)]), "sample 0x5: TOK: token 0 is id 50"),
    "key of padding": (Sample(0, [1]), "key 0"),
    "segments that fall": (
        Sample(5, [1, 2], [(0, 0, 0, 0, 0, 0, 0, 0, 0), (2, 0, 0, 0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0, 0, 0)]),
        "segment 1 has -1 tokens",
    ),
    "short loss runs": (Sample(5, [1, 2], [], [(1, 1)]), "RUN: loss runs of 1 tokens; expected 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_verify_finds_what_a_wrong_writer_wrote_with_right_checksums(tmp_path, monkeypatch, case):
    bad, message = WRONG[case]
    monkeypatch.setattr(writer, "check_samples", lambda *_: None)
    write_shard(tmp_path / "a.vts", SCHEMA, [*some_samples(6), bad])
    (problem,) = verify(tmp_path / "a.vts")
    assert message in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_id": 62}, "min and max id"),
        ({"min_length": 1}, "min and max length"),
        ({"histogram": np.zeros(64, np.uint64)}, "histogram"),
        ({"schema_hash": "00" * 32}, "SCHEMA: sha256"),
    ],
)
def test_verify_finds_a_footer_that_lies_about_the_samples(shard, change, message):
    rewrite_footer(shard, **change)
    (problem,) = verify(shard)
    assert message in problem


@pytest.mark.parametrize(("table", "item", "value"), [("OFF", 0, 1), ("SEGO", 0, 1), ("RUNO", 4, 0), ("OFF", 3, 90)])
def test_verify_finds_offsets_that_do_not_rise(shard, table, item, value):
    section = read_pages(shard)[0].sections[table]
    overwrite(shard, section.offset + 4 * item, value.to_bytes(4, "little"), checksums=True)
    (problem,) = verify(shard)
    assert f"{table}: expected numbers that rise from 0" in problem


@pytest.mark.parametrize("text", [b"{}", b"[1", b"\xff\xfe"])
def test_a_schema_that_cannot_be_read_is_one_clear_line(shard, text):
    section = read_pages(shard)[0].sections["SCHEMA"]
    overwrite(shard, section.offset, text.ljust(section.bytes), checksums=True)
    with pytest.raises(ShardError, match=f"{shard}: SCHEMA: "):
        _ = Shard(shard).schema
    assert len(verify(shard)) == 1


def test_a_whole_folder_is_verified(tmp_path):
    _dataset(tmp_path, some_samples(5), some_samples(6, seed=1))
    write_shard(tmp_path / "unlisted.vts", SCHEMA, some_samples(2))
    (tmp_path / ".tmp-killed").write_bytes(b"left by a killed writer")
    assert verify(tmp_path) == []
    calls = []
    verify(tmp_path, lambda done, total: calls.append((done, total)))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.vts"))
    assert calls[-1] == (size, size)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    overwrite(tmp_path / "unlisted.vts", 5000, b"x")
    assert all("unlisted.vts" in problem for problem in verify(tmp_path))
    (tmp_path / "unlisted.vts").unlink()
    (tmp_path / "00001.vts").unlink()
    (problem,) = verify(tmp_path)
    assert "00001.vts: file: missing; the manifest lists it with 6 samples" in problem
    with pytest.raises(ShardError, match=r"00001.vts: file: missing"):
        Dataset(tmp_path)
    assert len(verify(tmp_path / "nowhere")) == 1


def test_a_shard_of_another_dataset_in_the_place_of_ours_is_refused(tmp_path):
    _dataset(tmp_path, some_samples(5))
    arguments, options = batch(some_samples(5))
    with writer.ShardWriter(tmp_path / "00000.vts", Schema(VOCAB, {"<|x|>": 1}), uuid=b"0" * 16) as other:
        other.append_batch(*arguments, **options)
    with pytest.raises(ShardError, match=r"00000.vts: footer: .* the manifest expects"):
        Dataset(tmp_path)
