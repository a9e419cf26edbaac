"""`verify` finds every flipped byte of a dataset, every lie of a footer, and what a wrong writer wrote."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from shard_model import VOCAB, Sample, dressed, overwrite, rewrite_footer, some_samples, write_shard

from vtrain.data import manifest, writer
from vtrain.data import verify as verifying
from vtrain.data.format import LENGTH_EDGES, PAGE, Kind, Modality, Schema, ShardError, read_pages
from vtrain.data.reader import Dataset
from vtrain.data.twins import BlobWriter, FeatureWriter, twin_path
from vtrain.data.verify import verify

SCHEMA = Schema(VOCAB)
FULL = Schema(VOCAB, columns={"quality": "<f4"}, labels=True)


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "a.vts", SCHEMA, some_samples(12))
    return tmp_path / "a.vts"


@pytest.fixture
def full(tmp_path):
    """A shard with every section that there is, its 17-bit store wider than the vocabulary needs."""
    write_shard(tmp_path / "full.vts", FULL, dressed(some_samples(12), FULL), id_store="u16+1")
    return tmp_path / "full.vts"


def _add_twins(shard: Path) -> dict[str, dict]:
    """The twins "clip" of 2 int8 rows and "image" of 3 bytes per segment, as manifests list them."""
    count = read_pages(shard)[0].sections["SEG"].count
    features = {"dim": 4, "dtype": "i1", "producer": "tower"}
    with FeatureWriter(twin_path(shard, "clip"), shard, "clip", **features) as clip:
        clip.append(np.random.default_rng(0).normal(size=(2 * count, 4)).astype(np.float32), np.full(count, 2))
    with BlobWriter(twin_path(shard, "image"), shard, "image", producer="camera") as image:
        image.append(bytes(range(3 * count)), np.full(count, 3))
    return {
        "clip": {"kind": "features", **features, "files": [clip.info]},
        "image": {"kind": "blobs", "dim": 0, "dtype": "", "producer": "camera", "files": [image.info]},
    }


@pytest.fixture
def dataset(tmp_path):
    """Two shards, the first with twins."""
    folder = tmp_path / "data"
    folder.mkdir()
    parts = [dressed(some_samples(n, seed=n), FULL) for n in (6, 9)]
    infos = [write_shard(folder / f"{n:05d}.vts", FULL, part, id_store="u16+1") for n, part in enumerate(parts)]
    manifest.publish(folder, FULL, infos, twins=_add_twins(folder / infos[0].file))
    assert verify(folder) == []
    return folder


def _undetected(path: Path, places) -> list[int]:
    """The places where a flipped byte is not found by `verify`: of the file, or of the folder of a manifest."""
    checked = path if path.suffix != ".json" else path.parent
    content, missed = path.read_bytes(), []
    file = os.open(path, os.O_RDWR)
    try:
        for at in places:
            os.pwrite(file, bytes([content[at] ^ (1 << at % 8)]), at)
            if not verify(checked):
                missed.append(at)
            os.pwrite(file, content[at : at + 1], at)
    finally:
        os.close(file)
    return missed


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".vts", ".vtf"))
    assert [path.suffix for path in found] == [".vtf", ".vtf", ".vts", ".vts", ".json"]
    return found


def test_a_flipped_byte_is_found_in_every_file(dataset):
    """Every 97th byte, those at both ends of a page, and a part of those that are not zero."""
    for path in _files(dataset):
        content = path.read_bytes()
        written = [at for at, byte in enumerate(content) if byte]
        pages = {at + d for at in range(0, len(content), PAGE) for d in (0, 1, PAGE - 1)}
        places = sorted({*range(0, len(content), 97), *pages, *written[:: max(1, len(written) // 300)]})
        assert _undetected(path, [at for at in places if at < len(content)]) == []
        assert path.read_bytes() == content
    assert verify(dataset) == []


def _undetected_in_copy(folder: Path, part: int, parts: int) -> list[str]:
    copy = folder.with_name(f"copy{part}")
    shutil.copytree(folder, copy)
    missed = []
    for path in _files(copy):
        missed += [f"{path.name}:{at}" for at in _undetected(path, range(part, path.stat().st_size, parts))]
    return missed


@pytest.mark.slow
def test_a_flipped_byte_is_found_at_every_position_of_every_file(dataset):
    with get_context("spawn").Pool(2) as pool:
        assert pool.starmap(_undetected_in_copy, [(dataset, 0, 2), (dataset, 1, 2)]) == [[], []]


def test_block_section_and_bytes_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(verifying, "STEP", 1 << 20)  # several steps
    monkeypatch.setattr(verifying, "WINDOW", 7)
    path = tmp_path / "a.vts"
    write_shard(path, SCHEMA, [Sample(n + 1, [n % 64] * 30000) for n in range(80)])  # 2.4 MB: blocks 0, 1 and 2
    calls = []
    assert verify(path, lambda done, total: calls.append((done, total))) == []
    assert calls[-1] == (path.stat().st_size, path.stat().st_size)
    assert len(calls) == 4
    overwrite(path, (1 << 20) + 5, b"\x7f")
    first, second = verify(path)
    assert "block 1 (bytes 1048576..2097152, TOK): crc32c" in first
    assert "section TOK: crc32c" in second


@pytest.mark.parametrize("name", ["full", "clip", "image"])
def test_padding_must_be_zero_even_where_checksums_agree(full, name):
    _add_twins(full)
    path = full if name == "full" else twin_path(full, name)
    for section in read_pages(path, *Kind)[0].sections.values():
        content = path.read_bytes()
        overwrite(path, section.offset + section.bytes, b"x", checksums=True)
        (problem,) = verify(path)
        assert f"padding after {section.id}" in problem
        path.write_bytes(content)


def test_bits_after_the_last_of_a_plane_must_be_zero(tmp_path):
    path = tmp_path / "a.vts"
    write_shard(path, SCHEMA, [Sample(1, [1, 2, 3])], id_store="u16+2")
    section = read_pages(path)[0].sections["TOK2"]
    overwrite(path, section.offset, b"\x40", checksums=True)
    (problem,) = verify(path)
    assert "TOK2: bits after those of 3 tokens; expected zeros" in problem


WRONG = {
    "illegal id": (Sample(5, [50], [(0, Modality.TEXT, 0, 0, 0, 0, 0, 0, 0)]), "sample 0x5: TOK: token 0 is id 50"),
    "key of padding": (Sample(0, [1]), "key 0"),
    "segments that fall": (
        Sample(5, [1, 2], [(0, 0, 0, 0, 0, 0, 0, 0, 0), (2, 0, 0, 0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0, 0, 0)]),
        "segment 1 has -1 tokens",
    ),
    "short loss runs": (Sample(5, [1, 2], [], [(1, 1)]), "RUN: loss runs of 1 tokens; expected 2"),
    "id of another plane": (Sample(5, [*range(40), 2**16 + 1]), "TOK: token 40 is id 65537; .* 0..63"),
    "label after the vocabulary": (Sample(5, [1], labels=[2**16]), "sample 0x5: LBL: token 0 has label 65536"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_wrong_writer_wrote_with_right_checksums_is_found(tmp_path, monkeypatch, case):
    bad, message = WRONG[case]
    monkeypatch.setattr(writer, "check_samples", lambda *_: None)
    bad = replace(bad, labels=bad.labels or bad.ids, columns={"quality": 0.0})
    found = [*dressed(some_samples(6), FULL), bad, *dressed(some_samples(60, seed=1), FULL)]
    write_shard(tmp_path / "a.vts", FULL, found, id_store="u16+1")
    with pytest.raises(ShardError, match=message):
        raise ShardError(*verify(tmp_path / "a.vts"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_id": 62}, "min and max id"),
        ({"min_id": 1}, "min and max id"),
        ({"min_length": 1}, "min and max length"),
        ({"histogram": np.zeros(64, np.uint64)}, "histogram"),
        ({"schema_hash": "00" * 32}, "SCHEMA: sha256"),
    ],
)
def test_a_footer_that_lies_about_the_samples_is_found(shard, change, message):
    rewrite_footer(shard, **change)
    (problem,) = verify(shard)
    assert message in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 9}, "min and max length"),
        ({"histogram": np.bincount([3], minlength=len(LENGTH_EDGES)).astype(np.uint64)}, "histogram"),
        ({"schema_hash": "00" * 32}, "META: expected the text of sha256"),
        ({"uuid": b"u" * 16}, "uuid"),
    ],
)
@pytest.mark.parametrize("name", ["clip", "image"])
def test_a_footer_that_lies_about_a_twin_is_found(shard, name, change, message):
    _add_twins(shard)
    rewrite_footer(twin_path(shard, name), **change)
    (problem,) = verify(twin_path(shard, name))
    assert message in problem


@pytest.mark.parametrize(("table", "item", "value"), [("OFF", 0, 1), ("SEGO", 0, 1), ("RUNO", 4, 0), ("OFF", 3, 90)])
def test_offsets_that_do_not_rise_are_found(shard, table, item, value):
    section = read_pages(shard)[0].sections[table]
    overwrite(shard, section.offset + 4 * item, value.to_bytes(4, "little"), checksums=True)
    (problem,) = verify(shard)
    assert f"{table}: expected numbers that rise from 0" in problem


def test_rows_that_do_not_rise_and_scales_that_are_none_are_found(shard):
    _add_twins(shard)
    path = twin_path(shard, "clip")
    content, sections = path.read_bytes(), read_pages(path, Kind.FEATURES)[0].sections
    for id, value, message in (
        ("ROWO", (99).to_bytes(8, "little"), "ROWO: expected numbers that rise from 0"),
        ("SCALE", np.float32(np.nan).tobytes(), "SCALE: expected finite numbers"),
        ("SCALE", np.float32(-1).tobytes(), "SCALE: expected finite numbers"),
    ):
        overwrite(path, sections[id].offset + 8, value, checksums=True)
        (problem,) = verify(path)
        assert message in problem
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("stored", "stated", "message"),
    [
        (FULL, replace(FULL, columns={}), "section COL.quality: dtype float32; the schema expects None"),
        (
            FULL,
            replace(FULL, columns={"quality": "<u4"}),
            "section COL.quality: dtype float32; the schema expects uint32",
        ),
        (SCHEMA, replace(SCHEMA, columns={"class": "u1"}), "section COL.class: dtype None; the schema expects uint8"),
        (FULL, replace(FULL, labels=False), "section LBL: True; the schema expects False"),
        (SCHEMA, replace(SCHEMA, labels=True), "section LBL: False; the schema expects True"),
    ],
)
def test_columns_and_labels_that_are_not_those_of_the_schema_are_found(tmp_path, monkeypatch, stored, stated, message):
    monkeypatch.setattr(Schema, "to_json", lambda self, original=Schema.to_json: original(stated))
    write_shard(tmp_path / "a.vts", replace(stored), dressed(some_samples(6), stored))  # a new one: its hash is kept
    monkeypatch.undo()
    (problem,) = verify(tmp_path / "a.vts")
    assert message in problem


def test_a_whole_folder_is_verified(dataset):
    write_shard(dataset / "unlisted.vts", FULL, dressed(some_samples(2), FULL))
    (dataset / ".tmp-killed").write_bytes(b"left by a killed writer")
    assert verify(dataset) == []
    calls = []
    verify(dataset, lambda done, total: calls.append((done, total)))
    size = sum(path.stat().st_size for path in [*dataset.glob("*.vts"), *dataset.glob("*.vtf")])
    assert calls[-1] == (size, size)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    overwrite(dataset / "unlisted.vts", 5000, b"x")
    assert all("unlisted.vts" in problem for problem in verify(dataset))
    (dataset / "unlisted.vts").unlink()
    (dataset / "00001.vts").unlink()
    (problem,) = verify(dataset)
    assert "00001.vts: file: missing; the manifest lists it with 9 samples" in problem
    with pytest.raises(ShardError, match=r"00001.vts: file: missing"):
        Dataset(dataset)
    assert len(verify(dataset / "nowhere")) == 1


def test_twins_that_are_missing_or_others_are_found(dataset):
    first, second = dataset / "00000.clip.vtf", dataset / "00000.image.vtf"
    first.unlink()
    with BlobWriter(second, dataset / "00000.vts", "image", producer="another") as image:
        image.append(b"", np.zeros(image.segments, np.int64))
    missing, other = sorted(verify(dataset))
    assert "00000.clip.vtf: file: missing; the manifest lists it as the twin clip of 00000.vts" in missing
    assert "00000.image.vtf: footer: TwinInfo" in other
    assert str(asdict(image.info)["footer_crc"]) in other


def test_a_twin_in_the_place_of_another_shards_is_found(dataset):
    shutil.copy(dataset / "00000.clip.vtf", dataset / "00001.clip.vtf")
    (problem,) = verify(dataset)
    assert "00001.clip.vtf: footer: uuid and segments" in problem
    (dataset / "00001.clip.vtf").rename(dataset / "00000.other.vtf")
    (problem,) = verify(dataset)
    assert "00000.other.vtf: name: expected to end in .clip.vtf" in problem
