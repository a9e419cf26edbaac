"""Generations of a dataset: what is listed, that it cannot change unseen, and that nothing broken is passed over."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_model import VOCAB, some_samples, write_shard
from small_datasets import write_twin

from vtrain._host import crc32c
from vtrain.data import manifest
from vtrain.data.format import Schema, ShardError, shard_info
from vtrain.data.reader import Dataset
from vtrain.data.verify import verify

SCHEMA = Schema(VOCAB, {"<|pad|>": 39})


@pytest.fixture
def infos(tmp_path):
    return [write_shard(tmp_path / f"{n:05d}.vts", SCHEMA, some_samples(4 + n, seed=n)) for n in range(3)]


def test_what_is_published_is_loaded(tmp_path, infos):
    path = manifest.publish(tmp_path, SCHEMA, infos, skipped=7)
    found = manifest.load(tmp_path)
    assert found.path == path
    assert found.shards == tuple(infos)
    assert found.starts.tolist() == [0, 4, 9, 15]
    assert (found.generation, found.samples, found.skipped) == (1, 15, 7)
    assert found.tokens == sum(len(s.ids) for n in range(3) for s in some_samples(4 + n, seed=n))
    assert found.schema == SCHEMA
    assert path.name == f"manifest-000001-{found.hash[:16]}.json"
    assert [shard_info(tmp_path / info.file) for info in infos] == infos
    assert (found.excluded.shape, found.excluded_samples, found.twins, found.parts) == ((0, 2), 0, {}, {})


def test_a_manifest_from_before_exclusions_and_twins_still_loads(tmp_path):
    """As an earlier version spelt it, byte for byte; its identity came from the first shard alone."""
    info = write_shard(tmp_path / "00000.vts", SCHEMA, some_samples(4))
    body = {
        "dataset": hashlib.sha256(f"{SCHEMA.hash} {info.uuid}".encode()).hexdigest()[:16],
        "format": "vtrain-dataset",
        "generation": 1,
        "samples": 4,
        "schema": SCHEMA.to_json(),
        "schema_hash": SCHEMA.hash,
        "shards": [asdict(info)],
        "skipped": 3,
        "starts": [0],
        "tokens": info.tokens,
        "version": 1,
    }
    plain = json.dumps(body, sort_keys=True, indent=1) + "\n"
    sealed = json.dumps({**body, "crc32c": f"{crc32c(plain.encode()):08x}"}, sort_keys=True, indent=1) + "\n"
    path = tmp_path / f"manifest-000001-{hashlib.sha256(plain.encode()).hexdigest()[:16]}.json"
    path.write_text(sealed)
    found = manifest.load(tmp_path)
    assert (found.samples, found.skipped, found.excluded_samples, dict(found.twins)) == (4, 3, 0, {})
    assert manifest.publish(tmp_path, SCHEMA, [info], skipped=3) == path
    path.unlink()
    assert manifest.publish(tmp_path, SCHEMA, [info], skipped=3) == path  # and that is how it is spelt today
    assert path.read_text() == sealed


def test_bytes_depend_on_the_content_alone(tmp_path, infos):
    first = manifest.publish(tmp_path, SCHEMA, infos)
    content = first.read_bytes()
    stamp = first.stat().st_mtime_ns
    assert manifest.publish(tmp_path, SCHEMA, infos) == first  # nothing new: nothing written
    assert first.stat().st_mtime_ns == stamp
    first.unlink()
    assert manifest.publish(tmp_path, SCHEMA, infos).read_bytes() == content


def test_an_appended_generation_keeps_the_samples_of_the_one_before(tmp_path, infos):
    old_path = manifest.publish(tmp_path, SCHEMA, infos[:2])
    old = Dataset(tmp_path)
    new_path = manifest.publish(tmp_path, SCHEMA, infos, skipped=1)
    new = Dataset(tmp_path)
    assert new.manifest.generation == 2
    assert (len(old), len(new)) == (9, 15)
    assert new.keys(range(9)).tolist() == old.keys(range(9)).tolist()
    assert new.uuid64 == old.uuid64
    assert new.hash != old.hash
    assert Dataset(old_path).hash == old.hash
    assert manifest.generations(tmp_path) == [old_path, new_path]
    assert verify(tmp_path) == []


def test_datasets_have_an_identity_of_their_own(tmp_path, infos):
    manifest.publish(tmp_path, SCHEMA, infos[:1])
    other = tmp_path / "other"
    other.mkdir()
    manifest.publish(other, SCHEMA, [write_shard(other / "x.vts", SCHEMA, some_samples(4))])
    assert Dataset(other).uuid64 != Dataset(tmp_path).uuid64
    assert 0 <= Dataset(other).uuid64 < 2**64


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


@given(JSON)
def test_the_spelling_is_that_of_json(value):
    assert manifest._spell(value, 0) == json.dumps(value, sort_keys=True, indent=1)


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path, infos):
    path = manifest.publish(tmp_path, SCHEMA, infos[:1])
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]
        for wrong in (flipped, content[:at])[: 1 + (at % 16 == 0)]:
            path.write_bytes(wrong)
            with pytest.raises(ShardError, match=path.name):
                manifest.load(tmp_path)
    assert any(path.name in problem for problem in verify(tmp_path))
    path.write_bytes(content + b" ")
    with pytest.raises(ShardError, match="crc32c: the content has"):
        manifest.load(tmp_path)


def test_a_broken_last_generation_is_an_error_and_not_passed_over(tmp_path, infos):
    manifest.publish(tmp_path, SCHEMA, infos[:2])
    last = manifest.publish(tmp_path, SCHEMA, infos)
    last.write_bytes(last.read_bytes()[:-20])
    with pytest.raises(ShardError, match=last.name):
        Dataset(tmp_path)
    (problem,) = verify(tmp_path)
    assert last.name in problem


def test_an_unfinished_manifest_is_not_seen(tmp_path, infos):
    with pytest.raises(ShardError, match=r"no manifest-\*.json"):
        Dataset(tmp_path)
    (tmp_path / ".tmp-manifest-000001-0123456789abcdef.json").write_text("{")
    with pytest.raises(ShardError, match=r"no manifest-\*.json"):
        manifest.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        manifest.load(tmp_path / "nowhere")


def test_names_must_tell_the_content(tmp_path, infos):
    path = manifest.publish(tmp_path, SCHEMA, infos)
    digest = path.stem[-16:]
    for name in (f"manifest-000002-{digest}.json", f"manifest-000001-{'0' * 16}.json"):
        renamed = path.rename(tmp_path / name)
        with pytest.raises(ShardError, match="name: expected that of generation 1"):
            manifest.load(tmp_path)
        renamed.rename(path)
    shutil.copy(path, tmp_path / f"manifest-000001-{'0' * 16}.json")
    with pytest.raises(ShardError, match="generation 1 is also"):
        manifest.load(tmp_path)
    (tmp_path / f"manifest-000001-{'0' * 16}.json").rename(tmp_path / "manifest-new.json")
    with pytest.raises(ShardError, match=r"manifest-new\.json: name"):
        manifest.load(tmp_path)


def test_publishing_refuses_shards_that_are_not_as_told(tmp_path, infos):
    a, b, c = infos
    other = write_shard(tmp_path / "other.vts", Schema(VOCAB), some_samples(2))
    refused = {
        "expected at least one sample": [],
        "listed twice": [a, b, a],
        "missing": [a, replace(b, file="gone.vts", uuid="00" * 16)],
        "footer: .* the manifest expects": [replace(a, samples=5)],
        "SCHEMA: sha256": [a, other],
    }
    for message, shards in refused.items():
        with pytest.raises(ShardError, match=message):
            manifest.publish(tmp_path, SCHEMA, shards)
    with pytest.raises(ShardError, match=r"uuid .* is listed twice"):
        manifest.publish(tmp_path, SCHEMA, [a, replace(b, uuid=a.uuid)])
    assert list(tmp_path.glob("manifest-*")) == []
    manifest.publish(tmp_path, SCHEMA, [a, b])
    for shards in ([b, a, c], [a], [a, c]):
        with pytest.raises(ShardError, match="must keep its 2 shards and their order"):
            manifest.publish(tmp_path, SCHEMA, shards)
    with pytest.raises(ShardError, match=r"must keep it; it differs in specials: .*<\|pad\|>.* and \{\}"):
        manifest.publish(tmp_path, Schema(VOCAB), [other])


TWIN = {"kind": "features", "dim": 4, "dtype": "f2", "producer": "p"}


def test_exclusions_and_twins_stay_until_they_are_changed(tmp_path, infos):
    one = asdict(write_twin(tmp_path / "00000.vts", "clip", 4))
    manifest.publish(tmp_path, SCHEMA, infos[:2], excluded=[(1, 3), (8, 9)], twins={"clip": {**TWIN, "files": [one]}})
    first = manifest.load(tmp_path)
    assert (first.excluded.tolist(), first.excluded_samples, first.samples) == ([[1, 3], [8, 9]], 3, 9)
    assert first.twins == {"clip": {**TWIN, "files": [one, None]}}
    manifest.publish(tmp_path, SCHEMA, infos)
    found = manifest.load(tmp_path)
    assert (found.generation, found.samples, found.excluded.tolist()) == (2, 15, [[1, 3], [8, 9]])
    assert found.twins["clip"]["files"] == [one, None, None]
    three = write_twin(tmp_path / "00002.vts", "clip", 4)
    blobs = write_twin(tmp_path / "00001.vts", "png", 0)
    twins = {
        "clip": {**TWIN, "files": [one, None, three]},
        "png": {"kind": "blobs", "dim": 0, "dtype": "", "producer": "p", "files": [None, blobs]},
    }
    manifest.publish(tmp_path, SCHEMA, infos, excluded=[], twins=twins)
    found = manifest.load(tmp_path)
    assert (found.generation, found.excluded_samples) == (3, 0)
    assert found.twins["clip"]["files"] == [one, None, asdict(three)]
    assert found.twins["png"]["files"] == [None, asdict(blobs), None]
    assert found.starts.tolist() == [0, 4, 9, 15]
    assert manifest.load(first.path).twins == first.twins
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"excluded": [(3, 1)]}, "excluded: expected"),
        ({"excluded": [(0, 2), (2, 3)]}, "excluded: expected"),
        ({"excluded": [(0, 16)]}, r"rise, apart, in 0\.\.15"),
        ({"excluded": [(-1, 2)]}, "excluded: expected"),
        ({"twins": {"Clip": {}}}, "twins: 'Clip'"),
        ({"twins": {"clip": {"kind": "feature"}}}, "twins: 'clip' with kind; expected"),
        ({"twins": {"clip": {"files": [{"file": "../a"}]}}}, "expected a plain file name or null"),
        ({"twins": {"clip": {"files": [None] * 4}}}, "4 files; expected"),
        ({"twins": {"clip": {"files": [{"file": "a.clip.vtf"}]}}}, "a.clip.vtf: file: missing; .* the twin clip"),
    ],
)
def test_exclusions_and_twins_that_cannot_be_are_refused(tmp_path, infos, options, message):
    for twin in options.get("twins", {}).values():
        twin.update(TWIN if "files" in twin else {})
    with pytest.raises(ShardError, match=message):
        manifest.publish(tmp_path, SCHEMA, infos, **options)
    assert list(tmp_path.glob("manifest-*")) == []


def test_a_twin_must_be_the_one_that_is_told_and_cannot_be_changed(tmp_path, infos):
    one, other = (write_twin(tmp_path / f"{n:05d}.vts", "clip", 4) for n in range(2))
    for files in ([other], [replace(one, rows=3)]):
        with pytest.raises(ShardError, match=r"clip.vtf: footer: .* the manifest expects"):
            manifest.publish(tmp_path, SCHEMA, infos, twins={"clip": {**TWIN, "files": files}})
    for fact in ({"dim": 5}, {"kind": "blobs"}, {"producer": "q"}):
        with pytest.raises(ShardError, match=r"clip.vtf: META: .* the manifest expects TwinMeta"):
            manifest.publish(tmp_path, SCHEMA, infos, twins={"clip": {**TWIN, **fact, "files": [one]}})
    manifest.publish(tmp_path, SCHEMA, infos, twins={"clip": {**TWIN, "files": [one]}})
    for change in ({"dim": 8}, {"files": [None]}, {"files": [other]}):
        with pytest.raises(ShardError, match="twins: clip: the one that is there differs"):
            manifest.publish(tmp_path, SCHEMA, infos, twins={"clip": {**TWIN, "files": [one]} | change})


def test_appending_passes_over_what_is_listed(tmp_path, infos):
    a, b, c = infos
    manifest.append(tmp_path, SCHEMA, [a], skipped=2)
    manifest.publish(tmp_path, SCHEMA, [a], skipped=2, excluded=[(1, 2)])
    path = manifest.append(tmp_path, SCHEMA, [c, a, b], skipped=3)
    found = manifest.load(tmp_path)
    assert (found.shards, found.skipped, found.excluded.tolist()) == ((a, c, b), 5, [[1, 2]])
    assert manifest.append(tmp_path, SCHEMA, [b, c], skipped=3) == path
    with pytest.raises(ShardError, match="the next generation must keep it"):
        manifest.append(tmp_path, Schema(VOCAB), [write_shard(tmp_path / "x.vts", Schema(VOCAB), some_samples(1))])


def publish_one_by_one(folder, names, begin):
    """A process that appends shards one at a time, as soon as all are ready."""
    begin.wait()
    for name in names:
        manifest.append(folder, SCHEMA, [shard_info(folder / name)], skipped=1)


@pytest.mark.parametrize(("processes", "each"), [pytest.param(3, 4), pytest.param(8, 12, marks=pytest.mark.slow)])
def test_publishers_of_one_folder_lose_nothing(tmp_path, processes, each):
    shares = [[f"{p}-{n}.vts" for n in range(each)] for p in range(processes)]
    for share in shares:
        for name in share:
            write_shard(tmp_path / name, SCHEMA, some_samples(1, seed=len(name)))
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(processes)
    workers = [context.Process(target=publish_one_by_one, args=(tmp_path, share, begin)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = manifest.load(tmp_path)
    names = [info.file for info in found.shards]
    assert sorted(names) == sorted(name for share in shares for name in share)
    assert all([name for name in names if name in share] == share for share in shares)
    assert (found.generation, found.skipped) == (processes * each, processes * each)
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: vtrain-dataset 2; expected vtrain-dataset 1"),
        ({"samples": 14}, "samples: 14; expected 15"),
        ({"starts": [0, 5, 9]}, r"starts: \[0, 5, 9\]; expected \[0, 4, 9\]"),
        ({"schema_hash": "00"}, "schema_hash: 00"),
        ({"shards": [{"file": "a"}]}, "an entry has file; expected bytes, file"),
        ({"shards": None}, "TypeError"),
        ({"schema": {}}, "schema: KeyError"),
        ({"dataset": "xyz"}, "ValueError"),
        ({"excluded": [[4, 2]]}, "excluded: expected"),
        ({"excluded": [["a", 2]]}, "ValueError"),
        ({"excluded": [[1, 2, 3]]}, "ValueError"),
        ({"twins": {"clip": 3}}, "TypeError"),
        ({"twins": []}, "AttributeError"),
        ({"parts": 3}, "AttributeError"),
        ({"excluded": [[1, 2**70]]}, "OverflowError"),
    ],
)
def test_sealed_manifests_that_lie_are_refused(tmp_path, infos, change, message):
    path = manifest.publish(tmp_path, SCHEMA, infos)
    body = {**json.loads(path.read_bytes()), **change}
    _seal(path, body)
    with pytest.raises(ShardError, match=message):
        manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["../secret.vts", "/etc/passwd", "..", "", ".tmp-1"])
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path, infos, name):
    path = manifest.publish(tmp_path, SCHEMA, infos[:1])
    body = json.loads(path.read_bytes())
    _seal(path, {**body, "shards": [{**asdict(infos[0]), "file": name}]})
    with pytest.raises(ShardError, match="expected a plain file name"):
        manifest.load(tmp_path)


def _seal(path, body):
    """Replace a manifest by one with any content and right checksums."""
    body.pop("crc32c")
    path.unlink()
    digest = hashlib.sha256(manifest._spelling(body)).hexdigest()
    manifest._write_sealed(path.with_name(f"manifest-{body['generation']:06d}-{digest[:16]}.json"), body)


def test_parts_of_several_writers_come_back(tmp_path, infos):
    manifest.write_part(tmp_path, 1, [infos[1]], skipped=2)
    part = manifest.write_part(tmp_path, 0, [infos[2], infos[0]], skipped=3)
    first, second = manifest.read_parts(tmp_path)
    assert (first.file, first.shards, first.skipped) == ("part-00000.json", (infos[2], infos[0]), 3)
    assert (second.file, second.shards, second.skipped) == ("part-00001.json", (infos[1],), 2)
    assert verify(tmp_path) == []
    part.write_bytes(part.read_bytes().replace(b"2", b"3", 1))
    with pytest.raises(ShardError, match=part.name):
        manifest.read_parts(tmp_path)
    assert any(part.name in problem for problem in verify(tmp_path))


def test_a_failed_write_leaves_no_file(tmp_path, infos, monkeypatch):
    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        manifest.publish(tmp_path, SCHEMA, infos)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", *(info.file for info in infos)]
