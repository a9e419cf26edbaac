"""The offline shuffle: every fact of every sample once, in an order that is the seed's, in bounded pieces."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from shard_model import VOCAB, batch, some_samples
from small_datasets import add_twin, dataset, keys

from vtrain import failpoints
from vtrain.data import exclude, manifest, shuffle
from vtrain.data.format import Schema, ShardError
from vtrain.data.reader import Dataset
from vtrain.data.verify import verify
from vtrain.data.writer import ShardWriter


def facts(folder: Path) -> list[tuple]:
    """All that is stored of each sample, in order."""
    found = Dataset(folder)
    rows = []
    for i in range(len(found)):
        row = [
            found.keys([i])[0],
            *(method([i])[0].tolist() for method in (found.read, found.segments, found.loss_runs)),
        ]
        if found.schema.labels:
            row.append(found.labels([i])[0].tolist())
        rows.append((*row, *(found.column(name, [i]).tolist() for name in found.schema.columns)))
    return rows


@pytest.fixture
def source(tmp_path):
    return dataset(tmp_path / "a", range(1, 7), skipped=3)  # 4 + 5 + ... + 9 = 39 samples


@pytest.mark.parametrize("per_shard", [1, 7, 39, 1000])
def test_every_sample_once_in_the_order_of_the_seed(source, tmp_path, monkeypatch, per_shard):
    monkeypatch.setattr(shuffle, "CHUNK_SAMPLES", 5)
    monkeypatch.setattr(shuffle, "CHUNK_TOKENS", 30)
    monkeypatch.setattr(shuffle, "BATCH", 3)
    seen = []
    path = shuffle.shuffle(
        source, tmp_path / "b", seed=1, samples_per_shard=per_shard, progress=lambda *step: seen.append(step)
    )
    assert sorted(map(repr, facts(tmp_path / "b"))) == sorted(map(repr, facts(source)))
    assert keys(tmp_path / "b") != keys(source)
    found = manifest.load(tmp_path / "b")
    assert [info.samples for info in found.shards] == [min(per_shard, 39 - n) for n in range(0, 39, per_shard)]
    assert (found.skipped, seen[-1]) == (3, (78, 78))
    assert verify(tmp_path / "b") == []
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert shuffle.shuffle(source, tmp_path / "b", seed=1, samples_per_shard=per_shard) == path
    with pytest.raises(ShardError, match="another dataset is there"):
        shuffle.shuffle(source, tmp_path / "b", seed=2, samples_per_shard=per_shard)


def test_the_order_is_a_function_of_the_seed_alone(source, tmp_path, monkeypatch):
    orders = []
    for n, (seed, per_shard, chunk) in enumerate([(1, 10, 5), (1, 39, 1000), (1, 10, 1000), (2, 10, 5)]):
        monkeypatch.setattr(shuffle, "CHUNK_SAMPLES", chunk)
        shuffle.shuffle(source, tmp_path / str(n), seed=seed, samples_per_shard=per_shard)
        orders.append(keys(tmp_path / str(n)))
    assert orders[0] == orders[1] == orders[2]
    assert orders[3] != orders[0]
    files = [{p.name: p.read_bytes() for p in (tmp_path / str(n)).iterdir()} for n in (0, 2)]
    assert files[0] == files[1]


def test_labels_and_columns_come_along_and_excluded_samples_do_not(tmp_path):
    schema = Schema(VOCAB, columns={"score": "<f4", "year": "<u2"}, labels=True)
    samples = some_samples(20, seed=3)
    arguments, options = batch(samples)
    (tmp_path / "a").mkdir()
    with ShardWriter(tmp_path / "a" / "x.vts", schema, uuid=bytes(15) + b"x") as writer:
        columns = {"score": np.arange(20, dtype=np.float32) / 3, "year": np.arange(20, dtype=np.uint16)}
        writer.append_batch(*arguments, **options, labels=(arguments[0] + 1) % VOCAB.size, columns=columns)
    manifest.publish(tmp_path / "a", schema, [writer.info])
    exclude.leave_out(tmp_path / "a", exclude.parse("0,5-7,19"))
    shuffle.shuffle(tmp_path / "a", tmp_path / "b", samples_per_shard=6)
    left = [row for n, row in enumerate(facts(tmp_path / "a")) if n not in (0, 5, 6, 7, 19)]
    assert sorted(map(repr, facts(tmp_path / "b"))) == sorted(map(repr, left))
    assert manifest.load(tmp_path / "b").excluded_samples == 0


def test_tokenizers_are_copied_and_twins_are_refused_or_dropped(source, tmp_path):
    (source / "text_tokenizer").mkdir()
    (source / "text_tokenizer" / "model").write_bytes(b"m")
    add_twin(source, "clip", [1])
    with pytest.raises(ShardError, match=r"twins clip: a shuffle leaves them behind \(--drop-twins\)"):
        shuffle.shuffle(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    shuffle.shuffle(source, tmp_path / "b", drop_twins=True)
    assert (tmp_path / "b" / "text_tokenizer" / "model").read_bytes() == b"m"
    assert not manifest.load(tmp_path / "b").twins


def run_to_death(source: Path, out: Path, point: str = "", log: Path | str = "") -> int:
    def child():
        failpoints.activate({"VTRAIN_FAILPOINT": point and f"{point}:kill", "VTRAIN_FAILPOINT_LOG": str(log)})
        shuffle.shuffle(source, out, samples_per_shard=20)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode


def test_a_killed_run_leaves_no_dataset_and_the_next_one_completes(tmp_path):
    source = dataset(tmp_path / "a", range(1, 6))
    assert run_to_death(source, tmp_path / "whole", log=tmp_path / "log") == 0
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    passed = (tmp_path / "log").read_text().splitlines()
    points = [f"{name}#{passed[: n + 1].count(name)}" for n, name in enumerate(passed)]
    assert {point.split("#")[0] for point in points} >= {"write:scratch", "delete:scratch", "rename:manifest.json"}
    for n, point in enumerate(points[:: max(1, len(points) // 12)]):
        out = tmp_path / str(n) / "whole"
        assert run_to_death(source, out, point) == -signal.SIGKILL, point
        assert run_to_death(source, out) == 0, point
        assert {p.name: p.read_bytes() for p in out.iterdir()} == whole, point


def test_a_failure_cleans_up_and_two_runs_exclude_each_other(source, tmp_path, monkeypatch):
    work = tmp_path / ".tmp-b"
    work.mkdir()
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for size in (-1, 2**70):
        with pytest.raises(ValueError, match=f"samples per shard: {size}"):
            shuffle.shuffle(source, tmp_path / "b", samples_per_shard=size)
    with pytest.raises(ShardError, match="another process is shuffling into it"):
        shuffle.shuffle(source, tmp_path / "b")
    os.close(descriptor)
    (work / "left.over").write_bytes(b"x")
    monkeypatch.setattr(shuffle, "_write_shard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shuffle.shuffle(source, tmp_path / "b")
    assert not work.exists()
    exclude.leave_out(source, np.array([[0, 38]]))
    monkeypatch.undo()
    shuffle.shuffle(source, tmp_path / "b")
    assert keys(tmp_path / "b") == keys(source)[38:]
