"""Imports as a whole: any number of parts, deaths anywhere and concurrent processes end in the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from crashes import leftovers, tree

from vtrain import failpoints, shards
from vtrain.data import importers
from vtrain.data.importers import Options, Report, import_tokens, open_importer
from vtrain.data.importers.base import groups, sampled_hash
from vtrain.data.manifest import generations
from vtrain.data.reader import Dataset
from vtrain.data.sources.record import stable_key
from vtrain.data.verify import verify

EOS, VOCAB = 9, 1000
DOCUMENTS = 60
_context = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two files for nanogpt; every tenth document has an id that is not of the vocabulary."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(2):
        documents = [rng.integers(10, VOCAB, rng.integers(0, 50)) for _ in range(DOCUMENTS // 2)]
        for i in range(0, len(documents), 10):
            documents[i] = np.append(documents[i], VOCAB + i)
        np.concatenate([np.append(d, EOS) for d in documents]).astype("<u2").tofile(folder / f"train_{number}.bin")
    return folder


def run(corpus: Path, out: Path, **arguments) -> Report:
    inputs = [corpus / "train_{0..1}.bin"]
    options = Options(text_vocab=VOCAB, eos=EOS)
    return import_tokens("nanogpt", inputs, out, samples_per_shard=13, options=options, **arguments)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    report = run(corpus, out)
    assert (report.samples, report.skipped, report.records) == (DOCUMENTS - 6, 6, DOCUMENTS)
    assert len(Dataset(out).shards) == 5
    return out


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_do_not_change_a_byte(corpus, undisturbed, tmp_path, parts):
    out, reports = tmp_path / "out", []
    for part in reversed(range(parts)):
        reports.append(run(corpus, out, part=part, parts=parts))
    assert [report.complete for report in reports].index(True) == parts - 1
    assert sum(report.records for report in reports) == DOCUMENTS
    assert reports[-1].samples == DOCUMENTS - 6
    assert reports[-1].reasons == {"token # is id #; expected #..#": 6}
    assert sum(report.samples for report in reports[:-1]) < DOCUMENTS - 6
    assert tree(out) == tree(undisturbed)


def test_a_second_run_does_nothing(corpus, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    report = run(corpus, undisturbed)
    assert (report.complete, report.samples, report.records) == (True, DOCUMENTS - 6, 0)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_progress_counts_the_records_of_this_part(corpus, tmp_path):
    seen = []
    run(corpus, tmp_path / "out", part=1, parts=2, progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [26] * len(seen)
    assert seen[-1] == (26, 26)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_changed_input_or_option_is_refused(corpus, undisturbed, tmp_path):
    inputs = [tmp_path / f"train_{i}.bin" for i in range(2)]
    for path in inputs:
        path.write_bytes((corpus / path.name).read_bytes())

    def again(**changes) -> None:
        options = Options(**({"text_vocab": VOCAB, "eos": EOS} | changes))
        import_tokens("nanogpt", inputs, undisturbed, samples_per_shard=13, options=options)

    again()  # the same bytes elsewhere
    for changes, said in (
        ({"eos": 10}, "eos 9, now 10"),
        ({"eos_at": "start"}, 'eos_at "end", now "start"'),
        ({"text_vocab": 2000}, "vocab "),
    ):
        with pytest.raises(ValueError, match=f"other settings: .*{said}"):
            again(**changes)
    data = bytearray(inputs[1].read_bytes())
    data[len(data) // 2] ^= 1
    inputs[1].write_bytes(data)
    with pytest.raises(ValueError, match=r"other settings: file train_1\.bin "):
        again()


def in_child(corpus: Path, out: Path, fault: str = "", log: str = "", part: int = 0, parts: int = 1) -> int:
    """The exit code of an import in a process of its own: 0, 2 = refused, -9 = killed."""
    process = _context.Process(target=child, args=(corpus, out, fault, log, part, parts), daemon=True)
    process.start()
    process.join(60)
    return process.exitcode


def child(corpus: Path, out: Path, fault: str, log: str, part: int, parts: int) -> None:
    failpoints.activate({"VTRAIN_FAILPOINT": fault, "VTRAIN_FAILPOINT_LOG": log})
    try:
        run(corpus, out, part=part, parts=parts)
    except (ValueError, OSError):
        os._exit(2)
    os._exit(0)


def survives(corpus: Path, undisturbed: Path, out: Path, fault: str) -> None:
    assert in_child(corpus, out, fault) == (-9 if fault.endswith(":kill") else 2), f"{fault} did not fire"
    assert [problem for shard in out.glob("*.vts") for problem in verify(shard)] == []
    assert not generations(out) or verify(out) == []
    run(corpus, out)
    assert tree(out) == tree(undisturbed), fault
    assert leftovers(out) == []


FAULTS = (
    "write:import.json:kill",
    "write:shard.vts#5:kill",
    "rename:unit.json#2:kill",
    "write:skipped.jsonl:kill",
    "rename:skipped.jsonl:full",
    "rename:manifest.json:kill",
    "empty:progress#3:kill",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_killed_and_started_again(corpus, undisturbed, tmp_path, fault):
    survives(corpus, undisturbed, tmp_path / "out", fault)


@pytest.mark.slow
def test_every_fault_everywhere(corpus, undisturbed, tmp_path):
    """Death the first time that a point is passed, the last, and in between; a disk error at each."""
    log = tmp_path / "points"
    assert in_child(corpus, tmp_path / "out", log=str(log)) == 0
    passed = Counter(log.read_text().splitlines())
    assert passed.keys() >= {
        f"{op}:{name}" for op in ("write", "fsync", "rename") for name in ("shard.vts", "unit.json")
    }
    faults = [f"{name}#{n}:kill" for name, count in sorted(passed.items()) for n in {1, count // 2 + 1, count}]
    faults += [f"{name}:{('raise', 'full')[n % 2]}" for n, name in enumerate(sorted(passed)) if "renamed" not in name]
    for number, fault in enumerate(faults):
        survives(corpus, undisturbed, tmp_path / str(number) / "out", fault)
    print(f"{len(faults)} faults at {len(passed)} points")


@pytest.mark.slow
def test_random_kills_until_it_is_done(corpus, undisturbed, tmp_path):
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    run(corpus, tmp_path / "timed")
    usual = time.perf_counter() - started
    kills = 0
    for round in range(6):
        out = tmp_path / str(round)
        for _ in range(20):
            process = _context.Process(target=child, args=(corpus, out, "", "", 0, 1), daemon=True)
            process.start()
            process.join(rng.uniform(0, usual))
            kills += process.exitcode is None
            process.kill()
            process.join()
        run(corpus, out)
        assert tree(out) == tree(undisturbed)
    assert kills > 30


@pytest.mark.slow
def test_eight_processes_at_once_lose_nothing(corpus, undisturbed, tmp_path):
    """Each part in a process of its own, two of them started twice, three killed on the way and started again."""
    for round in range(5):
        out = tmp_path / str(round)
        parts = [*range(8), 0, 5]
        faults = {1: "write:shard.vts#2:kill", 2: "rename:unit.json:kill", 3: "fsync:shard.vts:kill"}
        started = [_context.Process(target=child, args=(corpus, out, faults.get(part, ""), "", part, 8), daemon=True)
                   for part in parts]  # fmt: skip
        for process in started:
            process.start()
        for process in started:
            process.join(60)
        assert {process.exitcode for process in started} <= {0, 2, -9}
        again = [_context.Process(target=child, args=(corpus, out, "", "", part, 8), daemon=True) for part in range(8)]
        for process in again:
            process.start()
        for process in again:
            process.join(60)
        assert [process.exitcode for process in again] == [0] * 8
        assert tree(out) == tree(undisturbed)


def test_the_command(corpus, undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["import", "nanogpt", str(corpus / "train_{0..1}.bin"), "--out", str(out), "--text-vocab", str(VOCAB)]
    sizes = ["--samples-per-shard", "13"]
    assert shards.main([*given, *sizes]) == 2
    assert "error: import nanogpt: give eos" in capsys.readouterr().err
    assert shards.main([*given, *sizes, "--eos", str(EOS), "--part", "0", "--parts", "2"]) == 0
    assert "in part 0 of 2; the part that ends last publishes" in capsys.readouterr().out
    assert shards.main([*given, *sizes, "--eos", str(EOS)]) == 0
    said = capsys.readouterr().out
    assert "nanogpt: 60 documents, " in said
    assert f"{out}: 54 samples, " in said
    assert "6 skipped" in said
    assert "skipped 6: token # is id #; expected #..#" in said
    assert tree(out) == tree(undisturbed)
    assert shards.main([*given, *sizes, "--eos", str(EOS)]) == 0
    assert "complete already" in capsys.readouterr().out
    assert shards.main([*given, *sizes, "--eos", str(EOS), "--merged"]) == 2
    assert "does not take merged" in capsys.readouterr().err


def test_the_store_of_the_ids_is_chosen(corpus, undisturbed, tmp_path):
    run(corpus, tmp_path / "u32", id_store="u32")
    wide, narrow = Dataset(tmp_path / "u32"), Dataset(undisturbed)
    everything = np.arange(len(narrow))
    assert np.array_equal(wide.read(everything)[0], narrow.read(everything)[0])
    assert (tmp_path / "u32" / "shard-00000.vts").stat().st_size >= (undisturbed / "shard-00000.vts").stat().st_size
    with pytest.raises(ValueError, match="u8"):
        run(corpus, tmp_path / "u8", id_store="u8")


def test_refusals(corpus, tmp_path):
    with pytest.raises(ValueError, match="import nanotron: unknown; expected beingvl, megatron, nanogpt, simplear"):
        open_importer("nanotron", [corpus], Options())
    with pytest.raises(ValueError, match="import nanogpt: no input"):
        open_importer("nanogpt", [], Options(text_vocab=5, eos=1))
    with pytest.raises(ValueError, match="samples per shard: 0; expected at least 1"):
        import_tokens("nanogpt", [corpus], tmp_path / "out", samples_per_shard=0)
    with pytest.raises(ValueError, match="part 2 of 2"):
        run(corpus, tmp_path / "out", part=2, parts=2)


def test_every_importer_has_its_face():
    for name, importer in importers.IMPORTERS.items():
        assert set(importer.takes) <= set(Options.__dataclass_fields__), name
        assert importer.noun.endswith("s")


def test_groups_tile_the_rows_and_keep_the_limit():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(0, 9, rng.integers(0, 20))
        cu = np.concatenate([[0], np.cumsum(lengths)]) + 5
        found = list(groups(cu, 7))
        assert [row for first, last in found for row in range(first, last)] == list(range(len(lengths)))
        assert all(last - first == 1 or lengths[first:last].sum() <= 7 for first, last in found)


def test_keys_are_not_zero_and_tell_parts_apart():
    assert stable_key("ab", "c") != stable_key("a", "bc")
    assert stable_key("ab") == stable_key(b"ab") != 0


def test_the_hash_sees_the_size_and_the_ends(tmp_path):
    path = tmp_path / "x"
    found = set()
    for data in (b"", b"\0", b"\0" * 10, b"\0" * 9 + b"\1", struct.pack("<q", 1) * 20_000):
        path.write_bytes(data)
        found.add(sampled_hash(path))
    assert len(found) == 5
