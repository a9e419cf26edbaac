"""Build: units by any number of processes, kept, claimed, published once; what is foreign or unfinished is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from crashes import tree

from vtrain.data import manifest
from vtrain.data.build import LOCK_FILE, PROGRESS_FOLDER, Build
from vtrain.data.format import SEGMENT
from vtrain.data.reader import Dataset
from vtrain.data.schema import Schema
from vtrain.data.verify import verify
from vtrain.data.writer import ShardWriter
from vtrain.vocab import Vocabulary

SCHEMA = Schema(vocab=Vocabulary.of(text=100))
UNITS = 5


class Tokenizer:
    """As much of one as a build asks for."""

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes(b"any")


def a_build(out: Path, **changes) -> Build:
    settings = {"command": "vtrain.toy", "identity": {"size": 3, "names": ("a", "b")}, "units": UNITS}
    return Build(out, **(settings | {"assets": {"text_tokenizer": Tokenizer()}} | changes))


def fill(build: Build, unit: int, bad: int = 1) -> None:
    """Unit u has u + 1 samples of u tokens; every odd one skips `bad` records."""
    with build.make(unit, SCHEMA) as made:
        shard, skipped = made.shard, made.skipped
        count = unit + 1
        cu = np.arange(count + 1) * unit
        keys = np.arange(1, count + 1, dtype=np.uint64)
        shard.append_batch(np.full(count * unit, unit), cu, np.zeros(0, SEGMENT), np.zeros(count + 1, int), keys=keys)
        skipped += [{"key": n, "reason": f"unit {unit}"} for n in range(bad * (unit % 2))]


def make(out: Path, part: int = 0, parts: int = 1) -> bool:
    build = a_build(out)
    if build.open():
        return True
    for unit in build.share(part, parts):
        if build.finished(unit) is None:
            fill(build, unit)
    return build.finish(SCHEMA)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert make(out)
    return out


def test_what_is_left_when_it_is_done(undisturbed):
    assert verify(undisturbed) == []
    found = Dataset(undisturbed).manifest
    assert [shard.samples for shard in found.shards] == [1, 2, 3, 4, 5]
    assert found.skipped == 2
    names = {path.name for path in undisturbed.iterdir()}
    shards = {f"shard-{u:05d}.vts" for u in range(UNITS)}
    assert names == {manifest.LOCK_FILE, "toy.json", "text_tokenizer", "skipped.jsonl", found.path.name, *shards}
    assert json.loads((undisturbed / "toy.json").read_text()) == {"size": 3, "names": ["a", "b"]}
    reasons = [json.loads(line)["reason"] for line in (undisturbed / "skipped.jsonl").read_text().splitlines()]
    assert reasons == ["unit 1", "unit 3"]


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_part_that_ends_last_publishes_the_same_bytes(undisturbed, tmp_path, parts):
    order = np.random.default_rng(parts).permutation(parts).tolist()
    published = [make(tmp_path / "out", part, parts) for part in order]
    needed = [part for part in order if part < UNITS]
    assert published.index(True) == order.index(needed[-1])
    assert all(published[published.index(True) :])
    assert tree(tmp_path / "out") == tree(undisturbed)


def test_a_finished_one_is_left_alone(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert a_build(undisturbed).open()
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_what_a_kill_left_is_tidied(undisturbed, tmp_path):
    out = tmp_path / "out"
    make(out)
    (out / PROGRESS_FOLDER).mkdir()
    (out / PROGRESS_FOLDER / "unit-00000.json").write_bytes(b"{}")
    (out / LOCK_FILE).touch()
    (out / ".tmp-manifest-000001-0.json").write_bytes(b"half")
    assert a_build(out).open()
    assert tree(out) == tree(undisturbed)


def test_units_are_kept_unless_a_byte_of_them_is_wrong(undisturbed, tmp_path):
    out = tmp_path / "out"
    build = a_build(out)
    assert not build.open()
    for unit in range(UNITS):
        fill(build, unit)
    assert build.finished(2)["shard"]["samples"] == 3
    assert build.finished(3)["skipped"] == [{"key": 0, "reason": "unit 3"}]
    shard, gone = out / "shard-00001.vts", out / "shard-00002.vts"
    data = bytearray(shard.read_bytes())
    data[4100] ^= 1
    shard.write_bytes(data)
    gone.unlink()
    (out / PROGRESS_FOLDER / "unit-00003.json").write_bytes(b"{")
    (out / PROGRESS_FOLDER / "unit-00004.json").write_bytes((out / PROGRESS_FOLDER / "unit-00000.json").read_bytes())
    assert [build.finished(unit) is None for unit in range(4)] == [False, True, True, True]
    assert a_build(out).finished(0) is not None
    fill(build, 4)
    assert make(out)
    assert tree(out) == tree(undisturbed)


def test_an_error_inside_a_unit_leaves_nothing_of_it(tmp_path):
    build = a_build(tmp_path)
    build.open()
    with pytest.raises(OSError, match="unplugged"), build.make(0, SCHEMA):
        raise OSError("unplugged")
    assert build.finished(0) is None
    assert not list(tmp_path.glob("*.vts")) + list(tmp_path.glob(".tmp-*"))
    fill(build, 0)
    assert build.finished(0) is not None


def hold_unit(out: Path, ready, done) -> None:
    build = a_build(out)
    with build.make(1, SCHEMA):
        ready.set()
        done.wait(30)
        os._exit(1)  # as one that is killed: the kernel gives the claim back


def test_a_unit_is_made_by_one_process_at_a_time(tmp_path):
    build = a_build(tmp_path)
    build.open()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold_unit, args=(tmp_path, ready, done), daemon=True)
    process.start()
    assert ready.wait(30)
    with pytest.raises(ValueError, match="unit 1 is being made by another process; expected one start of each part"):
        fill(build, 1)
    fill(build, 0)
    done.set()
    process.join(30)
    fill(build, 1)
    assert build.finished(1) is not None


def test_a_unit_that_is_made_again_while_others_publish_is_no_error(undisturbed, tmp_path):
    """A part that was killed when all its units were noted starts again, and meets the end of the others."""
    out, late = tmp_path / "out", a_build(tmp_path / "out")
    assert not late.open()
    assert make(out)
    assert late.finished(1) is None
    fill(late, 1)
    assert late.finish(SCHEMA)
    assert tree(out) == tree(undisturbed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"identity": {"size": 4, "names": ["a", "b"]}}, r"toy\.json: .* other settings: size 3, now 4"),
        ({"identity": {"size": 3, "more": 1}}, r"more null, now 1; names \[\"a\", \"b\"\], now null"),
        ({"command": "vtrain.shards import"}, r"not made by vtrain\.shards import \(no import\.json\); take another"),
        (
            {"units": 6},
            r"published before vtrain\.toy was finished: 1 of 6 shards are not listed, the first shard",
        ),
    ],
)
def test_a_folder_of_another_build_is_refused_and_not_touched(undisturbed, changes, said):
    before = tree(undisturbed)
    with pytest.raises(ValueError, match=said):
        a_build(undisturbed, **changes).open()
    assert tree(undisturbed) == before


def test_other_folders_and_files_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file: not made by vtrain\.toy"):
        a_build(tmp_path / "file").open()
    with ShardWriter(tmp_path / "a.vts", SCHEMA, uuid=bytes(16)):
        pass
    with pytest.raises(ValueError, match=r"not made by vtrain\.toy"):
        a_build(tmp_path).open()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "a.vts"}
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "toy.json").write_bytes(b"[]")
    with pytest.raises(ValueError, match=r"toy\.json: not what vtrain\.toy writes"):
        a_build(tmp_path / "broken").open()


@pytest.mark.parametrize(("part", "parts"), [(-1, 2), (2, 2), (0, 0)])
def test_parts_are_checked(tmp_path, part, parts):
    with pytest.raises(ValueError, match=f"part {part} of {parts}; expected"):
        a_build(tmp_path).share(part, parts)


def test_too_much_was_skipped(undisturbed, tmp_path):
    out = tmp_path / "out"
    build = a_build(out)
    build.open()
    for unit in range(UNITS):
        fill(build, unit)
        assert unit == UNITS - 1 or not build.finish(SCHEMA)
    with pytest.raises(ValueError, match=r"skipped\.jsonl: 2 of 17 images were skipped; expected at most 1 \(input"):
        build.finish(SCHEMA, max_skipped=1)
    assert not manifest.generations(out)
    assert build.finish(SCHEMA, max_skipped=2)
    assert tree(out) == tree(undisturbed)


def test_nothing_was_usable(tmp_path):
    build = a_build(tmp_path / "out", units=1)
    build.open()
    with build.make(0, SCHEMA) as made:
        skipped = made.skipped
        skipped.append({"reason": "broken"})
    with pytest.raises(ValueError, match=r"1 of 1 pages were skipped; expected at least one that is usable"):
        build.finish(SCHEMA, records="pages")
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text()) == {"reason": "broken"}


def test_a_later_generation_is_complete_too(tmp_path):
    out = tmp_path / "out"
    make(out)
    found = manifest.load(out)
    manifest.publish(out, SCHEMA, found.shards, skipped=found.skipped, excluded=[(0, 1)])
    assert a_build(out).open()
    assert manifest.load(out).generation == 2
