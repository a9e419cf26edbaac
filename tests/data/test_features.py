"""Feature rows and blobs of samples over many shards, against plain lists of rows per segment."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from shard_model import VOCAB, slow_read_twin, some_samples, write_shard

from vtrain import _host
from vtrain.data import manifest
from vtrain.data.format import Schema, ShardError
from vtrain.data.reader import Dataset
from vtrain.data.twins import ROW_DTYPES, BlobWriter, FeatureWriter, TwinInfo, twin_path

SCHEMA = Schema(VOCAB)
PARTS = [some_samples(7), [], some_samples(9, seed=1), some_samples(2, seed=2)]
SAMPLES = [sample for part in PARTS for sample in part]
DIM = 5
WANTED = [15, 0, 7, 7, 1, 3, 8, 16, 2]


def _features(folder, number: int, dtype: str, seed: int = 0) -> tuple[TwinInfo, list[np.ndarray]]:
    """A feature twin of a shard, 0..3 rows per segment: what manifests list, and the rows of each segment as stored."""
    rng = np.random.default_rng(10 * seed + number)
    counts = rng.integers(0, 4, sum(len(s.segments) for s in PARTS[number]))
    path = folder / f"{number}.vts"
    twin = twin_path(path, "clip")
    with FeatureWriter(twin, path, "clip", dim=DIM, dtype=dtype, producer="test") as writer:
        writer.append(rng.standard_normal((counts.sum(), DIM)).astype(np.float32), counts)
    return writer.info, [np.array(rows, np.float32).reshape(-1, DIM) for rows in slow_read_twin(twin)[1]]


def _blobs(folder, number: int) -> tuple[TwinInfo, list[bytes]]:
    rng = np.random.default_rng(number)
    blobs = [rng.bytes(n % 5) for n in range(sum(len(s.segments) for s in PARTS[number]))]
    path = folder / f"{number}.vts"
    with BlobWriter(twin_path(path, "jpg"), path, "jpg", producer="test") as writer:
        writer.append(b"".join(blobs), np.array([len(b) for b in blobs], dtype=np.int64))
    return writer.info, blobs


def _per_sample(parts: list[list]) -> list[list]:
    """What the segments of each sample have, from lists per segment of each shard."""
    found = []
    for samples, rows in zip(PARTS, parts):
        first = 0
        for sample in samples:
            found.append(rows[first : first + len(sample.segments)])
            first += len(sample.segments)
    return found


def _dataset(folder, **twins) -> Dataset:
    infos = [write_shard(folder / f"{n}.vts", SCHEMA, part) for n, part in enumerate(PARTS)]
    made = {name: make(folder) for name, make in twins.items()}
    manifest.publish(folder, SCHEMA, infos, twins=made)
    return Dataset(folder)


def _listed(files: list, kind: str = "features", dim: int = DIM, dtype: str = "f4") -> dict:
    return {"kind": kind, "dim": dim, "dtype": dtype, "producer": "test", "files": files}


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_rows_of_samples_in_any_order(tmp_path, dtype):
    rows = []

    def make(folder):
        made = [_features(folder, n, dtype) for n in range(len(PARTS))]
        rows.extend(_per_sample([found for _, found in made]))
        return _listed([info for info, _ in made], dtype=dtype)

    column = _dataset(tmp_path, clip=make).features("clip")
    assert column.dim == DIM
    expected = [segment for i in WANTED for segment in rows[i]]
    counts, cu = column.counts(WANTED)
    assert counts.tolist() == [len(segment) for segment in expected]
    assert np.diff(cu).tolist() == [len(SAMPLES[i].segments) for i in WANTED]
    found, cu = column.read(WANTED)
    assert found.dtype == np.float32
    assert np.diff(cu).tolist() == counts.tolist()
    np.testing.assert_array_equal(found, np.concatenate(expected))
    room = np.full((len(found) + 2, DIM), 7, dtype=np.float32)
    again, _ = column.read(WANTED, out=room)
    assert np.shares_memory(again, room)
    np.testing.assert_array_equal(room, np.concatenate([found, np.full((2, DIM), 7)]))
    assert column.read([])[0].shape == (0, DIM)
    for wrong in (room.astype(np.float64), room[:3], np.zeros((99, DIM + 1), np.float32)):
        with pytest.raises(ValueError, match="out is float"):
            column.read(WANTED, out=wrong)
    with pytest.raises(IndexError):
        column.read([len(SAMPLES)])


def test_blobs_of_samples_in_any_order(tmp_path):
    blobs = []

    def make(folder):
        made = [_blobs(folder, n) for n in range(len(PARTS))]
        blobs.extend(_per_sample([found for _, found in made]))
        return _listed([info for info, _ in made], "blobs", 0, "")

    column = _dataset(tmp_path, jpg=make).blobs("jpg")
    found, cu = column.read(WANTED)
    assert found == [segment for i in WANTED for segment in blobs[i]]
    assert np.diff(cu).tolist() == [len(SAMPLES[i].segments) for i in WANTED]
    assert column.counts(WANTED)[0].tolist() == [len(b) for b in found]


def test_a_twin_that_is_not_there_is_named(tmp_path):
    dataset = _dataset(tmp_path, clip=lambda f: _listed([_features(f, 0, "f4")[0], None, None, None]))
    with pytest.raises(ValueError, match=r"no features 'dino'; expected one of its twins: clip \(features\)"):
        dataset.features("dino")
    with pytest.raises(ValueError, match="no blobs 'clip'"):
        dataset.blobs("clip")
    column = dataset.features("clip")
    assert dataset.features("clip") is column
    assert len(column.counts([0, 3])[0]) == len(SAMPLES[0].segments) + len(SAMPLES[3].segments)
    with pytest.raises(ShardError, match=r"twin clip: shard 2.vts has none"):
        column.read([0, 8])


def test_another_twin_in_the_place_of_ours_is_refused(tmp_path):
    def make(folder):
        return _listed([_features(folder, n, "f4")[0] for n in range(len(PARTS))])

    dataset = _dataset(tmp_path, clip=make)
    twin_path(tmp_path / "0.vts", "clip").unlink()
    with pytest.raises(OSError, match=r"0.clip.vtf"):
        dataset.features("clip").read([1])
    _features(tmp_path, 0, "f4", seed=1)
    with pytest.raises(ShardError, match=r"0.clip.vtf: footer: .* expects .* beside 0.vts"):
        dataset.features("clip").read([1])
    dataset.features("clip").read([8])


def test_a_manifest_that_lies_about_its_twins_is_refused(tmp_path):
    infos = [write_shard(tmp_path / f"{n}.vts", SCHEMA, part) for n, part in enumerate(PARTS)]
    files = [asdict(_features(tmp_path, n, "f4")[0]) for n in range(len(PARTS))]
    manifest.publish(tmp_path, SCHEMA, infos)
    true = Dataset(tmp_path)
    for change, message in (({"dim": 4}, "lists features of 4 f4"), ({"dtype": "f2"}, "lists features of 5 f2")):
        true.manifest = replace(true.manifest, twins={"clip": {**_listed(files), **change}})
        with pytest.raises(ShardError, match=f"META: .*{message}"):
            true.features("clip").read([1])
        true._twins.clear()


def test_half_floats_are_exact():
    """All of them: numpy's conversion is the reference."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    one = np.array([1], dtype=np.int64)
    for shift in range(3):  # the last ones take the portable path: a vector has 8
        stored = halves[: len(halves) - shift]
        out = np.zeros((2, len(stored)), dtype=np.float32)
        _host.gather_rows(stored.view(np.uint8), "f2", None, one - 1, one, out, one)
        np.testing.assert_array_equal(out, np.stack([np.zeros_like(out[0]), stored.astype(np.float32)]))
    portable = np.stack([halves] * 7, axis=1).copy()
    for row in range(0, len(halves), 4099):
        out = np.zeros((1, 7), dtype=np.float32)
        _host.gather_rows(portable.view(np.uint8).ravel(), "f2", None, one * row, one, out, one - 1)
        np.testing.assert_array_equal(out[0], portable[row].astype(np.float32))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "f8"},
        {"kind": "i1"},
        {"kind": "i1", "scales": np.ones(3, np.float32)},
        {"starts": [-1]},
        {"starts": [4], "counts": [1]},
        {"starts": [2**62], "counts": [2**62]},
        {"counts": [-1]},
        {"counts": [5]},
        {"at": [-1]},
        {"at": [3]},
        {"at": [2**63 - 1]},
        {"at": [0, 0]},
        {"out": np.zeros(12, np.float32)},
        {"out": np.zeros((3, 0), np.float32)},
    ],
)
def test_rows_outside_of_what_is_stored_or_of_the_answer_are_refused(change):
    asked = {"kind": "f4", "scales": None, "starts": [0], "counts": [2], "at": [1], "out": np.zeros((3, 2), np.float32)}
    asked |= change
    starts, counts, at = (np.array(asked[name], dtype=np.int64) for name in ("starts", "counts", "at"))
    stored = np.zeros(4 * 2 * 4, dtype=np.uint8)
    with pytest.raises(ValueError, match="gather_rows: "):
        _host.gather_rows(stored, asked["kind"], asked["scales"], starts, counts, asked["out"], at)
