"""Death and disk errors at every write, fsync, rename and delete: a second start ends as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from crashes import leftovers, run_once, tree
from toys import extract_arguments, pretrain_arguments, write_dataset, write_images

from vtrain import failpoints
from vtrain.data.manifest import generations
from vtrain.data.verify import verify
from vtrain.failpoints import kind, point
from vtrain.train import checkpoint

TIMES = ("step_s", "eta_s", "tokens_per_s", "data_wait", "memory_gb")  # differ from run to run


@dataclass
class Undisturbed:
    """A command that ran to its end: its inputs, what it left, and the points that it passed."""

    command: str
    inputs: Path
    out: Path
    passed: Counter

    def arguments(self, out: Path) -> list[str]:
        return {"pretrain": pretrain_arguments, "extract": extract_arguments}[self.command](self.inputs, out)


def undisturbed(command: str, inputs: Path) -> Undisturbed:
    run = Undisturbed(command, inputs, inputs / "out", Counter())
    log = inputs / "points"
    ended = run_once(command, run.arguments(run.out), inputs / "log", VTRAIN_FAILPOINT_LOG=str(log))
    assert ended.code == 0, ended.output
    if command == "pretrain":
        assert json.loads((run.out / "final" / "training.json").read_text()) == {"step": 3, "trained_steps": 6}
    run.passed.update(log.read_text().splitlines())
    return run


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Undisturbed:
    data = tmp_path_factory.mktemp("training")
    write_dataset(data / "train", 100)
    write_dataset(data / "valid", 30, seed=1)
    (data / "train" / "text_tokenizer").mkdir()  # carried into the exported folder
    (data / "train" / "text_tokenizer" / "tokenizer.model").write_bytes(b"any")
    return undisturbed("pretrain", data)


@pytest.fixture(scope="module")
def extraction(tmp_path_factory) -> Undisturbed:
    inputs = write_images(tmp_path_factory.mktemp("extraction"), 7)
    (inputs / "images" / "3.png").write_bytes(b"not a picture")  # so that skipped.jsonl is written
    return undisturbed("extract", inputs)


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def result(run: Undisturbed, out: Path) -> dict:
    """What has to be equal, bit by bit."""
    if run.command == "extract":
        return tree(out)
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    return {"final": tree(out / "final"), "metrics": metrics(out), "files": files}


def check_nothing_partial(run: Undisturbed, out: Path) -> None:
    """Whatever has a name is whole."""
    if run.command == "extract":
        assert [problem for shard in out.glob("*.vts") for problem in verify(shard)] == []
        assert not generations(out) or verify(out) == []
        return
    for step in checkpoint.list_steps(out / "checkpoints"):
        checkpoint.read_state(checkpoint.step_folder(out / "checkpoints", step))
    if (out / "final").exists():
        assert tree(out / "final") == tree(run.out / "final")


def walk(run: Undisturbed, folder: Path, *faults: str) -> None:
    """Start with a fault, see that it fired, start again (with the next one), compare."""
    out = folder / "out"
    for fault in faults:
        start_with(run, fault, folder)
    ended = run_once(run.command, run.arguments(out), folder / "again")
    assert ended.code == 0, f"after {faults}: {ended.output}"
    assert result(run, out) == result(run, run.out), f"after {faults}"
    assert leftovers(out) == [], f"after {faults}"
    shutil.rmtree(folder)


def start_with(run: Undisturbed, fault: str, folder: Path) -> None:
    out, name = folder / "out", fault.rpartition(":")[0].partition("#")[0]
    ended = run_once(run.command, run.arguments(out), folder / "faulty", VTRAIN_FAILPOINT=fault)
    if fault.endswith(":kill"):
        assert ended.code == -9, f"{fault} did not fire\n{ended.output}"
    elif fault.endswith(":stop"):
        assert ended.code == 0, ended.output
        assert "SIGTERM" in ended.output
    else:
        assert ended.code == 2, f"{fault}: exit code {ended.code}\n{ended.output}"
        assert len(ended.errors) == 1, ended.output
        assert f"(failpoint {name})" in ended.errors[0]
        path = ended.errors[0].rpartition(": ")[2].strip("'")
        assert kind(path) == name.partition(":")[2], f"the error does not name the file: {ended.errors[0]}"
        assert "Traceback" not in ended.output
    if out.exists():
        check_nothing_partial(run, out)


TRAINING_SAMPLE = (
    "write:metrics.jsonl#4:kill",
    "write:rank.safetensors#3:kill",
    "rename:step#2:kill",
    "renamed:step#4:kill",
    "delete:step:kill",
    "empty:step#3:kill",
    "rename:final:kill",
    "write:rank.safetensors#2:full",
    "write:metrics.jsonl#5:full",
    "fsync:state.json#2:raise",
    "write:metrics.jsonl#3:stop",
)
EXTRACTION_SAMPLE = ("write:shard.vts#4:kill", "rename:unit.json:kill", "rename:manifest.json:kill",
                     "write:manifest.json:kill", "empty:progress#2:kill", "write:shard.vts#5:full")  # fmt: skip


@pytest.mark.parametrize("fault", TRAINING_SAMPLE)
def test_training_survives(training, tmp_path, fault):
    walk(training, tmp_path, fault)


def test_a_resumed_training_survives(training, tmp_path):
    """The second fault meets what only a resumed run does: cutting the metrics, clearing what the first one left."""
    second = ["write:metrics.jsonl:kill", "write:metrics.jsonl:full", "empty:step#2:kill", "delete:final:raise"]
    first = ["renamed:step#2:kill", "write:state.json#3:kill", "empty:step#3:kill", "rename:final:kill"]
    for number, faults in enumerate(zip(first, second)):
        (tmp_path / str(number)).mkdir()
        walk(training, tmp_path / str(number), *faults)


@pytest.mark.parametrize("fault", EXTRACTION_SAMPLE)
def test_extraction_survives(extraction, tmp_path, fault):
    walk(extraction, tmp_path, fault)


def test_the_run_passes_what_it_is_made_of(training, extraction):
    """Were an operation to leave vtrain.files, the walks below would pass it by."""
    files = ["rank.json", "state.json", "config.toml", "manifest.json", "loss.png", "config.json", "training.json"]
    expected = {f"{op}:{file}" for file in files for op in ("write", "rename", "renamed")}
    expected |= {f"fsync:{file}" for file in files if file != "loss.png"}
    expected |= {f"{op}:{name}" for name in ("step", "final") for op in ("fsync", "rename", "renamed")}
    expected |= {f"{op}:rank.safetensors" for op in ("write", "fsync")}
    expected |= {"write:metrics.jsonl", "delete:step", "empty:step", "write:tokenizer.model", "fsync:checkpoints"}
    assert expected <= training.passed.keys()
    files = ["shard.vts", "unit.json", "manifest.json", "extract.json", "skipped.jsonl", "model.safetensors"]
    expected = {f"{op}:{file}" for file in files for op in ("write", "fsync", "rename", "renamed")}
    assert expected | {"delete:progress", "empty:progress"} <= extraction.passed.keys()


def every_point(run: Undisturbed) -> list[str]:
    """Death at every point, in the middle of the run where it is passed often, and a disk error at every point."""
    faults = [f"{name}#{count // 2 + 1}:kill" for name, count in sorted(run.passed.items())]
    failing = [name for name in sorted(run.passed) if not name.startswith("renamed:")]  # that was done without error
    return faults + [f"{name}:{('raise', 'full')[n % 2]}" for n, name in enumerate(failing)]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["training", "extraction"])
def test_everything_survives_every_fault(request, tmp_path, command):
    run = request.getfixturevalue(command)
    faults = every_point(run)
    assert {fault.partition("#")[0] for fault in faults} >= run.passed.keys()
    for number, fault in enumerate(faults):
        folder = tmp_path / str(number)
        folder.mkdir()
        walk(run, folder, fault)
    print(f"{command}: {len(faults)} faults at {len(run.passed)} points")


@pytest.mark.slow
def test_random_kills():
    script = Path(__file__).resolve().parent.parent / "scripts" / "kill_test.py"
    done = subprocess.run([sys.executable, script, "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("20 kills")


def test_points_are_named_by_operation_and_kind_of_file(tmp_path, monkeypatch):
    names = {
        "rank-00012.safetensors": "rank.safetensors",
        ".tmp-step-00000200": "step",
        ".old-final": "final",
        "manifest-000001-00ab34cd56ef7890.json": "manifest.json",
        ".tmp-.tmp-final": "final",
        "shard-00007.vts": "shard.vts",
        "00007.vts": "vts",
        "metrics.jsonl": "metrics.jsonl",
    }
    assert {name: kind(tmp_path / name) for name in names} == names


def test_an_inactive_point_does_nothing_and_an_active_one_fires_once(tmp_path, monkeypatch):
    point("write", tmp_path / "a.json")
    monkeypatch.setattr(failpoints, "_hit", None)  # restored afterwards
    log = tmp_path / "log"
    failpoints.activate({"VTRAIN_FAILPOINT": "write:a.json#2:full", "VTRAIN_FAILPOINT_LOG": str(log)})
    with open(tmp_path / "file", "wb") as file:
        point("write", tmp_path / "a.json", file, b"1234")
        with pytest.raises(OSError, match=r"failpoint write:a\.json") as error:
            point("write", tmp_path / "a.json", file, b"1234")
        point("write", tmp_path / "a.json", file, b"1234")
    assert error.value.errno == errno.ENOSPC
    assert (tmp_path / "file").read_bytes() == b"12"
    assert log.read_text().split() == ["write:a.json"] * 3
    assert os.listdir(tmp_path) == ["file", "log"] or os.listdir(tmp_path) == ["log", "file"]


@pytest.mark.parametrize("fault", ["write", "write:a.json", "write:a.json:explode", "write:a.json#x:kill", "a:kill"])
def test_a_misspelt_fault_is_refused(monkeypatch, fault):
    monkeypatch.setattr(failpoints, "_hit", None)
    with pytest.raises(ValueError, match="expected operation:kind"):
        failpoints.activate({"VTRAIN_FAILPOINT": fault})
