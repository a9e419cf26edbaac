"""Shards and datasets against lists of plain samples; damage of every kind is refused or found, never read past."""

from __future__ import annotations

import os
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_model import VOCAB, Sample, batch, overwrite, rewrite_footer, samples, some_samples, write_shard

from vtrain.data import manifest, writer
from vtrain.data.format import PAGE, SEGMENT, STORES, Schema, ShardError, read_pages, shard_info
from vtrain.data.reader import Dataset, Shard
from vtrain.data.samples import unpack_runs
from vtrain.data.verify import verify

SCHEMA = Schema(VOCAB)
READERS = ("lengths", "keys", "read", "segments", "loss_runs", "will_need")


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
        for method in (getattr(source, name) for name in READERS):
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


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_a_shard_error_or_an_answer(tmp_path_factory, data):
    """Never a crash or a read out of bounds, with checksums that agree: as of a writer that is wrong."""
    folder = tmp_path_factory.mktemp("d")
    path = folder / "a.vts"
    write_shard(path, SCHEMA, some_samples(12), id_store=data.draw(st.sampled_from(list(STORES))))
    sections = read_pages(path)[0].sections
    if data.draw(st.booleans()):
        section = sections[data.draw(st.sampled_from([id for id in sections if id not in ("SCHEMA", "BCRC")]))]
        at = section.offset + data.draw(st.integers(0, section.bytes - 1))
        overwrite(path, at, data.draw(st.binary(min_size=1, max_size=4)), checksums=True)
    else:
        section = sections[data.draw(st.sampled_from(list(sections)))]
        numbers = st.sampled_from([0, 1, 8, PAGE, 2 * PAGE, 5 * PAGE, 2**31, 2**32, 2**63, 2**64 - PAGE, 2**64 - 1])
        field = data.draw(st.sampled_from(["offset", "bytes", "count"]))
        wrong = replace(section, **{field: data.draw(numbers)})
        footer = {"samples": data.draw(st.sampled_from([0, 11, 12, 13, 2**32 - 1]))}
        rewrite_footer(path, sections={**sections, section.id: wrong}, **(footer if data.draw(st.booleans()) else {}))
    try:
        opened = Shard(path)
    except ShardError:
        return
    for method in READERS:
        for indices in (np.arange(len(opened)), *([i] for i in range(min(13, len(opened))))):
            with suppress(ShardError):
                getattr(opened, method)(indices)


def test_a_damaged_shard_of_a_dataset_is_named_and_the_others_are_read(tmp_path):
    parts = [some_samples(6, seed=n) for n in range(3)]
    dataset = _dataset(tmp_path, *parts)
    _damage(tmp_path / "00001.vts", "OFF", 3, 2**31)
    for method in (dataset.lengths, dataset.read, dataset.segments, dataset.loss_runs, dataset.will_need):
        with pytest.raises(ShardError, match=r"00001.vts: OFF: sample 2 spans"):
            method([0, 8, 17])
    _check_equal(dataset, [s for part in parts for s in part], [0, 6, 7, 10, 11, 17])


def test_a_shard_is_mapped_when_it_is_first_asked(tmp_path):
    parts = [some_samples(6, seed=n) for n in range(4)]
    dataset = _dataset(tmp_path, *parts)
    (tmp_path / "00002.vts").unlink()
    with pytest.raises(ShardError, match=r"00002.vts: file: missing"):
        dataset.lengths([0, 13, 20])
    found = [s for part in parts for s in part]
    _check_equal(dataset, found, [20, 3, 0])
    for number in (0, 1, 3):
        (tmp_path / f"{number:05d}.vts").unlink()  # those that are mapped stay so
    _check_equal(dataset, found, [20, 18, 3])
    with pytest.raises(ShardError, match=r"00001.vts: file: missing"):
        dataset.keys([6])


@pytest.mark.parametrize("at", [5, PAGE - 1])
def test_another_footer_of_the_same_size_is_found_at_opening(tmp_path, at):
    _dataset(tmp_path, some_samples(5), some_samples(6))
    path = tmp_path / "00001.vts"
    overwrite(path, path.stat().st_size - PAGE + at, b"!")
    with pytest.raises(ShardError, match=r"00001.vts: footer"):
        Dataset(tmp_path)


def test_threads_may_read_the_same_dataset(tmp_path):
    parts = [some_samples(9, seed=n) for n in range(24)]
    found = [s for part in parts for s in part]
    _dataset(tmp_path, *parts)
    for _ in range(5):
        dataset, start = Dataset(tmp_path), threading.Barrier(4)

        def read(seed, dataset=dataset, start=start):
            rng = random.Random(seed)
            start.wait()  # all of them find every shard unopened
            for _ in range(4):
                _check_equal(dataset, found, [rng.randrange(len(found)) for _ in range(60)])
                dataset.will_need(np.arange(len(found)))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))


def test_excluded_samples_are_told_and_keep_their_numbers(tmp_path):
    parts = [some_samples(7), some_samples(5, seed=1)]
    infos = [write_shard(tmp_path / f"{n}.vts", SCHEMA, part) for n, part in enumerate(parts)]
    manifest.publish(tmp_path, SCHEMA, infos)
    assert not Dataset(tmp_path).excluded(np.arange(12)).any()
    manifest.publish(tmp_path, SCHEMA, infos, excluded=[(0, 1), (5, 9), (11, 12)])
    dataset = Dataset(tmp_path)
    told = dataset.excluded(np.arange(12))
    assert told.dtype == bool
    assert np.flatnonzero(told).tolist() == [0, 5, 6, 7, 8, 11]
    assert dataset.excluded([8, 9, 8]).tolist() == [True, False, True]
    assert len(dataset) == 12
    _check_equal(dataset, [s for part in parts for s in part], [8, 9])


def test_segments_have_numbers_that_twins_know_them_by(tmp_path):
    parts = [some_samples(7), [], some_samples(9, seed=1)]
    dataset = _dataset(tmp_path, *parts)
    expected = []
    for shard, part in enumerate(parts):
        number = 0
        for sample in part:
            expected.append([(shard << 32) + number + k for k in range(len(sample.segments))])
            number += len(sample.segments)
    wanted = [15, 0, 7, 7, 1, 3, 8]
    numbers, cu = dataset.segment_numbers(wanted)
    assert numbers.dtype == np.int64
    assert _rows(numbers, cu) == [expected[i] for i in wanted]


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


@pytest.mark.parametrize("text", [b"{}", b"[1", b"\xff\xfe"])
def test_a_schema_that_cannot_be_read_is_one_clear_line(shard, text):
    section = read_pages(shard)[0].sections["SCHEMA"]
    overwrite(shard, section.offset, text.ljust(section.bytes), checksums=True)
    with pytest.raises(ShardError, match=f"{shard}: SCHEMA: "):
        _ = Shard(shard).schema
    assert len(verify(shard)) == 1


def test_a_shard_of_another_dataset_in_the_place_of_ours_is_refused(tmp_path):
    _dataset(tmp_path, some_samples(5))
    arguments, options = batch(some_samples(5))
    with writer.ShardWriter(tmp_path / "00000.vts", Schema(VOCAB, {"<|x|>": 1}), uuid=b"0" * 16) as other:
        other.append_batch(*arguments, **options)
    with pytest.raises(ShardError, match=r"00000.vts: footer: .* the manifest expects"):
        Dataset(tmp_path)


def test_a_worker_process_opens_the_generation_that_was_sent(tmp_path):
    parts = [some_samples(5), some_samples(3, seed=9)]
    dataset, everything = _dataset(tmp_path, parts[0]), np.arange(5)
    sent = pickle.dumps([dataset, dataset.shard(0)])
    _dataset(tmp_path, *parts)
    there, shard = pickle.loads(sent)
    assert (there.hash, len(there), len(Dataset(tmp_path))) == (dataset.hash, 5, 8)
    assert there.read(everything)[0].tolist() == dataset.read(everything)[0].tolist()
    assert shard.keys(everything).tolist() == dataset.keys(everything).tolist()
