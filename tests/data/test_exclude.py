"""Exclusions: the arithmetic of ranges against sets, and that every way to name samples finds exactly those."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_model import VOCAB, overwrite, some_samples, write_shard

from vtrain.data import exclude, manifest
from vtrain.data.format import Schema, ShardError, read_pages
from vtrain.data.reader import Dataset
from vtrain.data.verify import verify

SCHEMA = Schema(VOCAB)
RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


def members(ranges) -> set[int]:
    return {sample for first, last in ranges for sample in range(first, last)}


def is_normal(ranges) -> bool:
    edges = np.asarray(ranges).ravel()
    return bool((np.diff(edges) > 0).all())


@given(RANGES, RANGES)
def test_ranges_are_sets(a, b):
    left, right = np.array(a, dtype=np.int64).reshape(-1, 2), np.array(b, dtype=np.int64).reshape(-1, 2)
    for found, expected in (
        (exclude.normal(left), members(a)),
        (exclude.union(left, right), members(a) | members(b)),
        (exclude.without(left, right), members(a) - members(b)),
    ):
        assert members(found.tolist()) == expected
        assert is_normal(found)
    numbers = np.arange(-2, 34)
    assert exclude.contains(exclude.normal(left), numbers).tolist() == [n in members(a) for n in numbers]


@pytest.mark.parametrize(
    ("text", "expected"), [("3", [[3, 4]]), ("3,17-20", [[3, 4], [17, 21]]), (" 9 - 9 , 1,2", [[1, 3], [9, 10]])]
)
def test_samples_by_number(text, expected):
    assert exclude.parse(text).tolist() == expected


@pytest.mark.parametrize("text", ["", "a", "3,", "5-4", "-1", "1..3", "0x3", "1" * 19])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match="expected numbers and spans such as"):
        exclude.parse(text)


@pytest.fixture
def folder(tmp_path):
    """Five shards of 4..8 samples, the first sample of the last one has a key of the first shard."""
    infos = []
    for n in range(5):
        samples = some_samples(4 + n, seed=n)
        if n == 4:
            samples[0].key = some_samples(4, seed=0)[2].key
        infos.append(write_shard(tmp_path / f"{n}.vts", SCHEMA, samples))
    manifest.publish(tmp_path, SCHEMA, infos, skipped=1)
    return tmp_path


def test_samples_by_key(folder, monkeypatch):
    monkeypatch.setattr(exclude, "CHUNK", 5)
    dataset = Dataset(folder)
    keys = dataset.keys(np.arange(len(dataset)))
    file = folder / "keys.txt"
    file.write_text(f"{keys[2]:#x}\n\n  {keys[9]}\n{keys[29]}\n")
    assert exclude.with_keys(dataset, exclude.read_keys(file)).tolist() == [[2, 3], [9, 10], [22, 23], [29, 30]]
    assert exclude.with_keys(dataset, np.zeros(0, dtype=np.uint64)).tolist() == []
    with pytest.raises(ValueError, match=r"2 keys are of no sample, the first is 0x1$"):
        exclude.with_keys(dataset, np.array([2, keys[0], 1], dtype=np.uint64))
    for line in ("x", str(2**64), "-1", "1.5", "\xff"):
        file.write_text(f"1\n{line}\n", "latin-1")
        with pytest.raises(ValueError, match=r"keys.txt:2: .* expected a 64-bit key"):
            exclude.read_keys(file)


def test_exclusions_are_generations_and_numbers_stay(folder):
    before = Dataset(folder)
    files = {path: path.read_bytes() for path in folder.glob("*.vts")}
    exclude.leave_out(folder, exclude.parse("0,3-5"))
    exclude.leave_out(folder, exclude.parse("5-7,29"))
    found = manifest.load(folder)
    assert (found.generation, found.samples, found.skipped) == (3, 30, 1)
    assert found.excluded.tolist() == [[0, 1], [3, 8], [29, 30]]
    exclude.put_back(folder, exclude.parse("0-4,20-22"))
    after = Dataset(folder)
    assert after.manifest.excluded.tolist() == [[5, 8], [29, 30]]
    assert after.keys(np.arange(30)).tolist() == before.keys(np.arange(30)).tolist()
    assert {path: path.read_bytes() for path in files} == files
    assert exclude.put_back(folder, exclude.parse("0")) == after.manifest.path  # nothing new: no generation
    assert verify(folder) == []


def test_exclusions_outside_and_of_everything_are_refused(folder):
    for text in ("30", "28-40"):
        with pytest.raises(ValueError, match=r"the dataset has 30$"):
            exclude.leave_out(folder, exclude.parse(text))
    exclude.leave_out(folder, exclude.parse("0-9"))
    with pytest.raises(ValueError, match="all 30 samples would be excluded"):
        exclude.leave_out(folder, exclude.parse("10-29"))
    assert manifest.load(folder).generation == 2


def long_shard(path, block: int, count: int, monkeypatch):
    """A shard of blocks of 4096 bytes, so that every section has several."""
    monkeypatch.setattr("vtrain.data.format.BLOCK_LOG2", block)
    rng = random.Random(1)
    samples = some_samples(count)
    for sample in samples:
        if not sample.segments:
            sample.ids = [rng.randrange(40) for _ in range(rng.choice([0, 1, 30]))]
            sample.runs = None if rng.random() < 0.5 else [(len(sample.ids), 1)]
    return write_shard(path, SCHEMA, samples)


def owners(path, section: str, byte: int) -> set[int]:
    """The samples that need one byte of a section, sample by sample from the tables."""
    sections = read_pages(path)[0].sections
    data = path.read_bytes()

    def table(name):
        s = sections[name]
        return np.frombuffer(data[s.offset : s.offset + s.bytes], s.dtype).tolist()

    row = byte // sections[section].dtype.itemsize
    if section == "KEY":
        return {row}
    if section in ("OFF", "SEGO", "RUNO"):
        return {row - 1, row} & set(range(sections["KEY"].count))
    offsets = table({"TOK": "OFF", "SEG": "SEGO", "RUN": "RUNO"}[section])
    return {i for i in range(len(offsets) - 1) if offsets[i] <= row < offsets[i + 1]}


def test_a_block_names_all_samples_that_need_it_and_few_others(tmp_path, monkeypatch):
    info = long_shard(tmp_path / "a.vts", 12, 3000, monkeypatch)
    tail = write_shard(tmp_path / "b.vts", SCHEMA, some_samples(4))
    manifest.publish(tmp_path, SCHEMA, [tail, info])
    found = manifest.load(tmp_path)
    footer, block = read_pages(tmp_path / "a.vts")
    assert block == 4096
    for number in range(footer.sections["BCRC"].count):
        expected = {
            4 + sample
            for id, s in footer.sections.items()
            if id not in ("SCHEMA", "BCRC")
            for byte in range(max(number * block, s.offset), min((number + 1) * block, s.offset + s.bytes))
            for sample in (
                owners(tmp_path / "a.vts", id, byte - s.offset) if byte % 997 == 0 or byte % block == 0 else ()
            )
        }
        named = members(exclude.of_blocks(found, "a.vts", [number]).tolist())
        assert expected <= named
        assert len(named) <= 4096 // 4 + 2
    for shard, number, message in (("c.vts", 0, "no shard c.vts"), ("a.vts", 10**6, "no block 1000000; it has")):
        with pytest.raises(ShardError, match=message):
            exclude.of_blocks(found, shard, [number])


@pytest.mark.parametrize("section", ["TOK", "OFF", "SEG", "SEGO", "RUN", "RUNO", "KEY"])
def test_damage_becomes_exclusions_and_the_rest_reads_as_before(tmp_path, monkeypatch, section):
    info = long_shard(tmp_path / "a.vts", 12, 3000, monkeypatch)
    tail = write_shard(tmp_path / "b.vts", SCHEMA, some_samples(4))
    manifest.publish(tmp_path, SCHEMA, [info, tail])
    whole = Dataset(tmp_path)
    truth = {i: (whole.read([i])[0].tolist(), whole.keys([i])[0], whole.segments([i])[0].tolist(),
                 whole.loss_runs([i])[0].tolist()) for i in range(len(whole))}  # fmt: skip
    s = read_pages(tmp_path / "a.vts")[0].sections[section]
    overwrite(tmp_path / "a.vts", s.offset + s.bytes // 2, b"\xff" * 8)
    overwrite(tmp_path / "a.vts", whole.shards[0].footer.sections["TOK"].offset + 10, b"\xff")
    ranges, problems = exclude.damaged(manifest.load(tmp_path))
    assert problems == []
    exclude.leave_out(tmp_path, ranges)
    spoilt = Dataset(tmp_path)
    left = exclude.without(np.array([[0, len(spoilt)]]), spoilt.manifest.excluded)
    assert 0 < len(members(left.tolist())) < 3004
    for i in sorted(members(left.tolist())):
        read = (spoilt.read([i])[0].tolist(), spoilt.keys([i])[0], spoilt.segments([i])[0].tolist(),
                spoilt.loss_runs([i])[0].tolist())  # fmt: skip
        assert read == truth[i], i


def test_a_shard_that_cannot_be_opened_is_told(folder):
    overwrite(folder / "1.vts", 100, b"\xff")  # the header page
    (folder / "3.vts").unlink()
    ranges, problems = exclude.damaged(manifest.load(folder))
    assert ranges.tolist() == []
    assert len(problems) == 2
    assert "1.vts: header: crc32c" in problems[0]
    assert "3.vts: file: missing" in problems[1]
