"""Datasets out of finished shards and of other datasets: nothing moves, nothing is lost, and a kill harms nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from shard_model import VOCAB, overwrite, some_samples, write_shard
from small_datasets import SCHEMA, add_twin, dataset, keys, write_shards

from vtrain import failpoints
from vtrain.data import edit, exclude, manifest
from vtrain.data.format import Schema, ShardError
from vtrain.data.reader import Dataset
from vtrain.data.verify import verify
from vtrain.data.writer import ShardWriter


def bytes_of(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def two(tmp_path):
    return dataset(tmp_path / "a", range(1, 4), skipped=2), dataset(tmp_path / "b", range(4, 6), skipped=5)


def test_merge_lists_all_in_order_and_copies_nothing(two, tmp_path):
    a, b = two
    exclude.leave_out(a, exclude.parse("1,4-5,14"))  # the last of a and the first of b: ranges that touch
    exclude.leave_out(b, exclude.parse("0,8"))
    before = bytes_of(a, b)
    path = edit.merge([a, b], tmp_path / "c")
    found = Dataset(tmp_path / "c")
    assert keys(tmp_path / "c") == keys(a) + keys(b)
    assert found.manifest.excluded.tolist() == [[1, 2], [4, 6], [14, 16], [23, 24]]
    assert (found.manifest.skipped, found.manifest.generation) == (7, 1)
    assert [s.path.name for s in found.shards][3:] == ["shard-00000-00000000.vts", "shard-00001-00000000.vts"]
    assert all((tmp_path / "c" / n.name).samefile(n) for n in a.glob("*.vts"))
    assert bytes_of(a, b) == before
    assert verify(tmp_path / "c") == []
    assert found.uuid64 not in (Dataset(a).uuid64, Dataset(b).uuid64)
    assert edit.merge([a, b], tmp_path / "c") == path  # once more: nothing to do
    with pytest.raises(ShardError, match="a dataset of other shards is there"):
        edit.merge([b, a], tmp_path / "c")


def test_names_stay_unique_however_often_they_clash(tmp_path):
    folders = [dataset(tmp_path / str(s), range(s, s + 1)) for s in (1, 2, 3)]
    edit.merge(folders, tmp_path / "c")
    names = [info.file for info in manifest.load(tmp_path / "c").shards]
    assert names == ["shard-00000.vts", "shard-00000-00000000.vts", f"shard-00000-{3:032x}.vts"]
    assert keys(tmp_path / "c") == [key for folder in folders for key in keys(folder)]


def test_appending_a_dataset_keeps_the_numbers_that_are_there(two):
    a, b = two
    old, old_keys = Dataset(a), keys(a)
    exclude.leave_out(b, exclude.parse("2"))
    path = edit.append_datasets(a, [b])
    new = Dataset(a)
    assert keys(a) == old_keys + keys(b)
    assert (new.manifest.generation, new.manifest.skipped, new.uuid64) == (2, 7, old.uuid64)
    assert new.manifest.excluded.tolist() == [[len(old) + 2, len(old) + 3]]
    assert edit.append_datasets(a, [b]) == path  # all are listed
    write_shard(b / "one-more.vts", SCHEMA, some_samples(1))
    edit.build(b)
    for again in (lambda: edit.append_datasets(a, [b]), lambda: edit.merge([b, b], b.parent / "c")):
        with pytest.raises(ShardError, match="the same shard as"):
            again()
    assert manifest.load(a).generation == 2


def test_appending_shards_from_here_and_from_elsewhere(two, tmp_path):
    a, b = two
    (inside,) = [write_shard(a / "more.vts", SCHEMA, some_samples(2, seed=9))]
    outside = write_shard(tmp_path / "shard-00000.vts", SCHEMA, some_samples(3, seed=8))
    edit.append_shards(a, [a / "more.vts", tmp_path / "shard-00000.vts"])
    found = manifest.load(a)
    assert found.shards[3] == inside
    assert found.shards[4].uuid == outside.uuid
    assert found.shards[4].file == f"shard-00000-{outside.uuid[:8]}.vts"
    edit.append_shards(tmp_path / "new", [b / "shard-00001.vts"])
    assert keys(tmp_path / "new") == keys(b)[4:]
    with pytest.raises(ValueError, match="no shard is named"):
        edit.append_shards(a, [])
    assert verify(a) == []


def test_schemas_must_be_equal_and_the_difference_is_named(two, tmp_path):
    other = Schema(VOCAB, {"<|pad|>": 39})
    manifest.publish(tmp_path / "d", other, write_shards(tmp_path / "d", range(9, 10), other))
    for refused in (
        lambda: edit.merge([two[0], tmp_path / "d"], tmp_path / "c"),
        lambda: edit.append_datasets(two[0], [tmp_path / "d"]),
        lambda: edit.append_datasets(tmp_path / "c", [two[0], tmp_path / "d"]),
    ):
        with pytest.raises(ShardError, match=r"specials: .*'<\|pad\|>': 39"):
            refused()
    with pytest.raises(ShardError, match="SCHEMA: sha256"):
        edit.append_shards(two[0], [tmp_path / "d" / "shard-00000.vts"])
    with pytest.raises(ShardError, match="the same shard as"):
        edit.merge([two[0], two[0]], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert manifest.load(two[0]).generation == 1


def test_without_hard_links_the_error_names_copy_and_copy_works(two, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match=r"shard-00000.vts: no hard link in .*c: Invalid cross-device link \(--copy"):
        edit.merge(two, tmp_path / "c")
    edit.merge(two, tmp_path / "c", copy=True)
    assert keys(tmp_path / "c") == keys(two[0]) + keys(two[1])
    assert not (tmp_path / "c" / "shard-00000.vts").samefile(two[0] / "shard-00000.vts")


def test_tokenizers_come_from_the_first_that_has_them(two, tmp_path):
    for folder, name in ((two[1], "text_tokenizer"), (two[0], "image_tokenizer"), (two[1], "image_tokenizer")):
        (folder / name).mkdir()
        (folder / name / "weights").write_text(f"{folder.name} {name}")
    edit.merge(two, tmp_path / "c")
    assert (tmp_path / "c" / "text_tokenizer" / "weights").read_text() == "b text_tokenizer"
    assert (tmp_path / "c" / "image_tokenizer" / "weights").read_text() == "a image_tokenizer"


def test_twins_come_along_under_the_names_of_their_shards(two, tmp_path):
    a, b = two
    add_twin(a, "clip", [0, 2])
    add_twin(b, "clip", [1])
    add_twin(b, "png", [0], dim=0)
    edit.merge([a, b], tmp_path / "c")
    found = manifest.load(tmp_path / "c")
    names = {name: [f and f["file"] for f in twin["files"]] for name, twin in found.twins.items()}
    assert names == {
        "clip": ["shard-00000.clip.vtf", None, "shard-00002.clip.vtf", None, "shard-00001-00000000.clip.vtf"],
        "png": [None, None, None, "shard-00000-00000000.png.vtf", None],
    }
    linked = tmp_path / "c" / "shard-00001-00000000.clip.vtf"
    assert linked.samefile(b / "shard-00001.clip.vtf")
    assert found.twins["png"]["kind"] == "blobs"
    assert verify(tmp_path / "c") == []
    edit.append_datasets(a, [b])
    assert [bool(f) for f in manifest.load(a).twins["clip"]["files"]] == [True, False, True, False, True]
    edit.merge([b], tmp_path / "d", twins=False)
    assert not manifest.load(tmp_path / "d").twins


def test_twins_of_one_name_must_mean_the_same(two, tmp_path):
    add_twin(two[0], "clip", [0])
    add_twin(two[1], "clip", [0], dim=8)
    with pytest.raises(ShardError, match="twin clip"):
        edit.merge(two, tmp_path / "c")
    with pytest.raises(ShardError, match="twin clip"):
        edit.append_datasets(two[0], [two[1]])
    edit.append_datasets(two[0], [two[1]], twins=False)
    assert [bool(f) for f in manifest.load(two[0]).twins["clip"]["files"]] == [True, False, False, False, False]


def test_build_adopts_parts_and_orphans_in_order_of_their_names(tmp_path):
    folder = tmp_path / "a"
    infos = write_shards(folder, range(1, 5))
    manifest.write_part(folder, 1, [infos[0]], skipped=2)
    manifest.write_part(folder, 0, [infos[3]], skipped=1)
    built = edit.build(folder)
    assert built.adopted == [info.file for info in infos]
    assert manifest.load(folder).shards == tuple(infos)
    assert manifest.load(folder).skipped == 3
    assert edit.build(folder).path == built.path  # nothing new: nothing written, nothing counted twice
    later = write_shard(folder / "a-first-name.vts", SCHEMA, some_samples(3, seed=7))
    manifest.write_part(folder, 1, [infos[0], later], skipped=6)
    built = edit.build(folder, every_byte=True)
    assert built.adopted == ["a-first-name.vts"]
    found = manifest.load(folder)
    assert (found.shards, found.skipped, found.generation) == ((*infos, later), 7, 2)
    assert verify(folder) == []


def test_build_leaves_out_what_it_cannot_use_and_tells(tmp_path):
    folder = tmp_path / "a"
    infos = write_shards(folder, range(1, 5))
    write_shard(folder / "x-other.vts", Schema(VOCAB, {"<|pad|>": 39}), some_samples(2))
    (folder / "cut.vts").write_bytes((folder / infos[0].file).read_bytes()[:8192])
    overwrite(folder / infos[2].file, 4096, b"\xff")  # a token: the pages do not tell
    built = edit.build(folder, every_byte=True)
    assert built.adopted == [infos[n].file for n in (0, 1, 3)]
    named = "\n".join(built.problems)
    assert all(text in named for text in ("cut.vts: ", "x-other.vts: SCHEMA", f"{infos[2].file}: block 0"))
    assert edit.build(folder).adopted == [infos[2].file]  # by its pages it is whole
    (folder / infos[1].file).unlink()
    manifest.write_part(tmp_path, 0, [infos[1]])
    with pytest.raises(ShardError, match=r"No such file .*shard-00001.vts"):
        edit.build(tmp_path)


def test_build_refuses_what_is_no_folder_of_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        edit.build(tmp_path / "nowhere")
    with pytest.raises(ShardError, match="no shard and no manifest"):
        edit.build(tmp_path)
    write_shards(tmp_path, range(1, 2))
    (tmp_path / "progress").mkdir()
    with pytest.raises(ShardError, match="not finished; start that again"):
        edit.build(tmp_path)


def test_build_removes_leftovers_of_the_dead_alone(tmp_path):
    write_shards(tmp_path, range(1, 2))
    (tmp_path / f".tmp-{'0' * 32}").write_bytes(b"dead")
    (tmp_path / ".tmp-manifest-000001-0123456789abcdef.json").write_bytes(b"{")
    (tmp_path / ".tmp-copied.vts").write_bytes(b"dead, too")
    (tmp_path / ".tmp-notes").write_bytes(b"of somebody else")
    with ShardWriter(tmp_path / "living.vts", SCHEMA, uuid=b"living".ljust(16)) as writer:
        living = f".tmp-{b'living'.ljust(16).hex()}"
        built = edit.build(tmp_path)
        assert (tmp_path / living).exists()
        assert writer.samples == 0
    assert built.removed == [f".tmp-{'0' * 32}", ".tmp-copied.vts", ".tmp-manifest-000001-0123456789abcdef.json"]
    assert built.kept == sorted([".tmp-notes", living])
    assert (tmp_path / "living.vts").exists()
    assert edit.build(tmp_path).adopted == ["living.vts"]


def test_leftovers_are_deleted_under_the_lock_that_a_new_writer_asks_for(tmp_path, monkeypatch):
    """Else it could begin between the look and the deletion, and lose its file."""
    write_shards(tmp_path, range(1, 2))
    uuid = b"same shard".ljust(16)
    (tmp_path / f".tmp-{uuid.hex()}").write_bytes(b"dead")
    gone = tmp_path / f".tmp-{'f' * 32}"
    gone.symlink_to("nothing")  # listed, and not there when it is opened: its writer has just finished

    def delete(path: Path) -> None:
        with pytest.raises(ShardError, match="another process is writing this file"):
            ShardWriter(tmp_path / "new.vts", SCHEMA, uuid=uuid)
        path.unlink()

    monkeypatch.setattr(edit, "delete", delete)
    built = edit.build(tmp_path)
    assert (built.removed, built.kept) == ([f".tmp-{uuid.hex()}"], [gone.name])


OPERATIONS = {
    "merge": lambda root: edit.merge([root / "a", root / "b"], root / "c"),
    "copy": lambda root: edit.merge([root / "a", root / "b"], root / "c", copy=True),
    "append": lambda root: edit.append_datasets(root / "a", [root / "b"]),
    "build": lambda root: edit.build(root / "a"),
    "exclude": lambda root: exclude.leave_out(root / "a", exclude.parse("1")),
}


def start(root: Path, operation: str, point: str = "", log: Path | str = "") -> multiprocessing.Process:
    """A process that does it, and is killed at the failpoint if one is named."""

    def child():
        failpoints.activate({"VTRAIN_FAILPOINT": point and f"{point}:kill", "VTRAIN_FAILPOINT_LOG": str(log)})
        OPERATIONS[operation](root)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def run_to_death(*arguments, **options) -> int:
    process = start(*arguments, **options)
    process.join(60)
    return process.exitcode


def prepare(tmp_path: Path) -> None:
    a = dataset(tmp_path / "a", range(1, 3))
    b = dataset(tmp_path / "b", range(3, 5))
    add_twin(b, "clip", [0])
    (b / "text_tokenizer").mkdir()
    (b / "text_tokenizer" / "model").write_bytes(b"m")
    write_shard(a / "orphan.vts", SCHEMA, some_samples(2, seed=77))


SLOW = ("merge", "copy", "append")


@pytest.mark.parametrize(
    "operation", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in OPERATIONS]
)
def test_killed_between_any_two_steps_the_old_generation_stays_and_a_rerun_completes(tmp_path, operation):
    log = tmp_path / "log"
    prepare(tmp_path / "whole")
    assert run_to_death(tmp_path / "whole", operation, log=log) == 0
    out = "c" if operation in ("merge", "copy") else "a"
    expected = bytes_of(tmp_path / "whole" / out)
    passed = log.read_text().splitlines()
    points = [f"{name}#{passed[: n + 1].count(name)}" for n, name in enumerate(passed)]
    assert len(points) >= 4
    for n, point in enumerate(points):
        root = tmp_path / str(n)
        prepare(root)
        before = keys(root / "a")
        assert run_to_death(root, operation, point) == -signal.SIGKILL, point
        if out == "a":
            assert keys(root / "a")[: len(before)] == before, point
        elif manifest.generations(root / "c") if (root / "c").exists() else ():
            assert keys(root / "c") == keys(root / "a") + keys(root / "b"), point
        assert run_to_death(root, operation) == 0, point
        found = {path.relative_to(root / out): data for path, data in bytes_of(root / out).items()}
        found = {path: data for path, data in found.items() if not path.name.startswith(".tmp-")}
        assert found == {path.relative_to(tmp_path / "whole" / out): data for path, data in expected.items()}, point
        assert verify(root / out) == [] or operation in ("merge", "copy", "append"), point


def test_a_lock_is_waited_for(two):
    """A publisher waits while another holds the folder, and then builds on what that one has published."""
    a = two[0]
    with manifest.locked(a):
        waiting = start(a.parent, "append")
        found = manifest.load(a)
        waiting.join(0.5)
        assert waiting.exitcode is None
        extra = write_shard(a / "extra.vts", SCHEMA, some_samples(1, seed=5))
        manifest.next_generation(a, found, SCHEMA, [*found.shards, extra], skipped=found.skipped)
    waiting.join(60)
    assert waiting.exitcode == 0
    assert [info.file for info in manifest.load(a).shards][2:4] == ["shard-00002.vts", "extra.vts"]
    assert len(manifest.load(a).shards) == 6
