"""Generations of a dataset: what is listed, that it cannot change unseen, and that nothing broken is passed over."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace

import pytest
from shard_model import VOCAB, some_samples, write_shard

from vtrain.data import manifest
from vtrain.data.format import Schema, ShardError, shard_info
from vtrain.data.reader import Dataset, verify

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


def test_every_flipped_byte_and_every_cut_is_refused(tmp_path, infos):
    path = manifest.publish(tmp_path, SCHEMA, infos[:1])
    content = path.read_bytes()
    for at in range(len(content)):
        for wrong in (content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :], content[:at]):
            path.write_bytes(wrong)
            with pytest.raises(ShardError, match=path.name):
                manifest.load(tmp_path)
    assert any(path.name in problem for problem in verify(tmp_path))
    path.write_bytes(content + b" ")
    with pytest.raises(ShardError, match="not spelt as vtrain writes"):
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
        with pytest.raises(ShardError, match="must keep its 2 shards and schema"):
            manifest.publish(tmp_path, SCHEMA, shards)
    with pytest.raises(ShardError, match="must keep"):
        manifest.publish(tmp_path, Schema(VOCAB), [other])


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
    digest = manifest.hashlib.sha256(manifest._spelling(body)).hexdigest()
    manifest._write_sealed(path.with_name(f"manifest-{body['generation']:06d}-{digest[:16]}.json"), body)


def test_parts_of_several_writers_are_joined_in_order_of_the_shards(tmp_path, infos):
    manifest.write_part(tmp_path, 1, [infos[1]], skipped=2)
    part = manifest.write_part(tmp_path, 0, [infos[2], infos[0]], skipped=3)
    assert manifest.read_parts(tmp_path) == (infos, 5)
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
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".vts"] * 3
