"""Every command and library call that writes a dataset, killed and failing anywhere: nothing wrong is ever readable,
and a second start ends in the bytes of an undisturbed run."""

from __future__ import annotations

import io
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from crashes import Job, leftovers, tree
from PIL import Image
from shard_model import dressed, some_samples, write_shard
from small_datasets import SCHEMA, add_twin, dataset
from test_failpoints import every_point

from vtrain.data import manifest
from vtrain.data.reader import Dataset
from vtrain.data.verify import verify
from vtrain.text import load_text_tokenizer, train_sentencepiece

SHARDS, LIBRARY = "vtrain.shards", "writing_jobs"
RANDOM_KILLS = 200
KILLS_IN_A_ROW = 5


@dataclass
class Writing:
    """A command, the folder that it begins with, and what it leaves there when nothing happens to it.

    passed: the points that it passes.
    """

    command: str
    arguments: Callable[[Path], list[str]]
    before: Path
    after: dict[str, bytes] = field(default_factory=dict)
    passed: Counter = field(default_factory=Counter)

    def folder(self, root: Path) -> Path:
        return shutil.copytree(self.before, root)

    def start(self, root: Path, **environment: str) -> Job:
        return Job(self.command, self.arguments(root), root.with_name(f"{root.name}.log"), **environment)


def _arguments(line: str) -> Callable[[Path], list[str]]:
    return lambda root: [word.replace("@", str(root)) for word in line.split()]


# command and arguments; @ is the folder of `material`
WRITINGS = {
    "library": (LIBRARY, "build @/out 0 1 3"),
    "parts": (LIBRARY, "build @/out 0 1 8"),
    "import": (SHARDS, "import llava @/talk.jsonl --out @/out --text-tokenizer @/text --template vicuna "
                       "--samples-per-shard 2"),
    "twins": (LIBRARY, "twins @/b"),
    "build": (SHARDS, "build @/a"),
    "append": (SHARDS, "append @/b --from @/c"),
    "append-shards": (SHARDS, "append @/b @/c/shard-00000.vts @/c/shard-00001.vts --copy"),
    "merge": (SHARDS, "merge @/b @/c --out @/out"),
    "exclude": (SHARDS, "exclude @/b --samples 1,3-4"),
    "shuffle": (SHARDS, "shuffle @/b --out @/out --samples-per-shard 3 --drop-twins"),
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """Conversations with pictures; a: shards that are listed, promised and neither; b and c: two whole datasets."""
    folder = tmp_path_factory.mktemp("material") / "material"
    a, b, c = (dataset(folder / name, range(2 * n, 2 * n + 2)) for n, name in enumerate("abc"))
    manifest.write_part(a, 0, [write_shard(a / "promised.vts", SCHEMA, some_samples(3, seed=9))], skipped=2)
    write_shard(a / "orphan.vts", SCHEMA, some_samples(3, seed=10))
    add_twin(b, "clip", [0, 1])
    add_twin(c, "clip", [1])
    train_sentencepiece(["what is this? a cat. two dogs USER ASSISTANT"], 50, folder / "tokenizer.model")
    load_text_tokenizer(folder / "tokenizer.model", specials=("</s>",)).save(folder / "text")
    shutil.copytree(folder / "text", c / "text_tokenizer")
    rows = []
    for n in range(7):
        picture = io.BytesIO()
        Image.new("RGB", (4, 3 + n), (n, 7, 9)).save(picture, "PNG")
        (folder / f"{n}.png").write_bytes(picture.getvalue() if n != 3 else b"no picture")
        turns = [{"from": "human", "value": "<image> what is this?"}, {"from": "gpt", "value": "a cat."}]
        rows.append({"id": str(n), "image": [f"{n}.png"], "conversations": turns})
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def writing(material, tmp_path_factory) -> Callable[[str], Writing]:
    """Gives the undisturbed Writing of a name."""
    known: dict[str, Writing] = {}

    def undisturbed(name: str) -> Writing:
        if name not in known:
            command, line = WRITINGS[name]
            made = Writing(command, _arguments(line), material)
            folder = tmp_path_factory.mktemp(name)
            log, root = folder / "points.log", made.folder(folder / "root")
            (ended,) = made.start(root, VTRAIN_FAILPOINT_LOG=str(log)).wait()
            assert ended.code == 0, ended.output
            made.passed.update(log.read_text().splitlines())
            made.after = tree(root)
            assert made.after != tree(material)
            assert [problem for folder in datasets(root) for problem in verify(folder)] == []
            known[name] = made
        return known[name]

    return undisturbed


def datasets(root: Path) -> list[Path]:
    return sorted({path.parent for path in root.rglob("manifest-*.json")})


def check_nothing_wrong(writing: Writing, root: Path) -> None:
    """Every shard, twin and manifest that has a name is one of those there before or in the end, byte by byte."""
    before = tree(writing.before)
    for name, content in tree(root).items():
        path = Path(name)
        if any(part.startswith(".tmp-") for part in path.parts):
            continue
        if path.suffix in (".vts", ".vtf") or path.name.startswith("manifest-"):
            assert content in (before.get(name), writing.after.get(name)), f"{name} is neither old nor new"
        elif path.suffix == ".json":
            json.loads(content)
    for folder in datasets(root):
        if not folder.name.startswith(".tmp-"):
            Dataset(folder).shards  # noqa: B018  all of them open


def complete(writing: Writing, root: Path, what: str) -> None:
    """Start once more, undisturbed, and compare."""
    (ended,) = writing.start(root).wait()
    assert ended.code == 0, f"after {what}: {ended.output}"
    found = tree(root)
    assert {name for name in found if found[name] != writing.after.get(name)} == set(), f"after {what}"
    assert found.keys() == writing.after.keys(), f"after {what}"
    assert leftovers(root) == [], f"after {what}"
    shutil.rmtree(root)


def survives(writing: Writing, root: Path, fault: str) -> None:
    writing.folder(root)
    (ended,) = writing.start(root, VTRAIN_FAILPOINT=fault).wait()
    if fault.endswith(":kill"):
        assert ended.code == -9, f"{fault} did not fire\n{ended.output}"
    else:
        assert ended.code != 0, f"{fault} went unnoticed\n{ended.output}"
        if writing.command == SHARDS:
            assert (ended.code, len(ended.errors), "Traceback" in ended.output) == (2, 1, False), ended.output
    check_nothing_wrong(writing, root)
    complete(writing, root, fault)


SAMPLE = {
    "library": ("write:shard.clip.vtf#9:kill", "rename:unit.json#2:full"),
    "import": ("rename:shard.image.vtf#2:kill", "write:manifest.json:kill"),
    "twins": ("renamed:shard.late.vtf:kill",),
    "append": ("rename:text_tokenizer:kill",),
    "shuffle": ("rename:out:kill",),
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in SAMPLE for fault in SAMPLE[name]])
def test_a_writer_survives(writing, tmp_path, name, fault):
    survives(writing(name), tmp_path / "root", fault)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WRITINGS if name != "parts"])
def test_every_writer_survives_every_fault(writing, tmp_path, name):
    made = writing(name)
    faults = every_point(made)
    assert {"write:manifest.json", "fsync:manifest.json", "renamed:manifest.json"} <= made.passed.keys()
    for number, fault in enumerate(faults):
        survives(made, tmp_path / str(number) / "root", fault)
    print(f"{name}: {len(faults)} faults at {len(made.passed)} points")


def kill_after(points: int, job: Job, log: Path, draw: random.Random) -> bool:
    """SIGKILL at any moment in the milliseconds after so many points were passed; False where the job ended before."""
    while job.running() and (not log.exists() or log.read_bytes().count(b"\n") < points):
        time.sleep(0.0005)
    time.sleep(draw.uniform(0.0, 0.003))
    hit = job.running()
    job.kill()
    return hit


@pytest.mark.slow
@pytest.mark.parametrize("name", ["library", "import"])
def test_killed_at_random_moments_until_it_is_done(writing, tmp_path, name):
    made, draw = writing(name), random.Random(name)
    kills = halves = number = 0
    while kills < RANDOM_KILLS // 2:
        number += 1
        root, log = made.folder(tmp_path / str(number) / "root"), tmp_path / f"{number}.points"
        for _ in range(KILLS_IN_A_ROW):
            log.unlink(missing_ok=True)
            job = made.start(root, VTRAIN_FAILPOINT_LOG=str(log))
            hit = kill_after(draw.randrange(made.passed.total() // 2), job, log, draw)
            check_nothing_wrong(made, root)
            kills += hit
            if not hit:
                break
        halves += any((root / "out").rglob("*.vts")) and not datasets(root / "out")
        complete(made, root, f"{kills} kills")
    assert halves > 0
    print(f"{name}: {kills} kills, {number} datasets, {halves} of them half made at the last kill")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parts", "import"])
def test_eight_processes_lose_nothing_though_some_are_killed(writing, tmp_path, name):
    """Each makes its part of the units of one dataset, all at once; three of them are killed and started again."""
    made, draw = writing(name), random.Random(name)

    def start(root: Path, part: int) -> Job:
        words = made.arguments(root)
        words = [*words[:-3], str(part), "8", "8"] if name == "parts" else [*words, "--part", str(part), "--parts", "8"]
        log = root.with_name(f"{part}.points")
        return Job(made.command, words, root.with_name(f"{part}.log"), VTRAIN_FAILPOINT_LOG=str(log))

    for number in range(4):
        root = made.folder(tmp_path / str(number) / "root")
        jobs = [start(root, part) for part in range(8)]
        for part in draw.sample(range(4), 3 if number else 0):
            kill_after(draw.randrange(20), jobs[part], root.with_name(f"{part}.points"), draw)
        codes = Counter(job.wait()[0].code for job in jobs)
        assert codes.keys() <= {0, -9}
        check_nothing_wrong(made, root)
        if codes[-9]:
            again = [start(root, part) for part in range(8)]
            assert [job.wait()[0].code for job in again] == [0] * 8
        assert tree(root) == made.after
        assert leftovers(root) == []


@pytest.mark.slow
def test_eight_processes_append_to_one_dataset_though_some_are_killed(tmp_path):
    draw = random.Random(0)
    for number in range(3):
        folder, given = dataset(tmp_path / str(number) / "all", range(2)), tmp_path / str(number) / "given"
        given.mkdir()
        parts = [some_samples(3, seed=20 + n) for n in range(8)]
        shards = [given / f"part-{n}.vts" for n in range(8)]
        for shard, part in zip(shards, parts):
            write_shard(shard, SCHEMA, dressed(part, SCHEMA))
        before = Dataset(folder)

        def start(shard: Path) -> Job:
            points = {"VTRAIN_FAILPOINT_LOG": str(shard.with_suffix(".points"))}
            return Job(SHARDS, ["append", str(folder), str(shard)], shard.with_suffix(".log"), **points)  # noqa: B023

        jobs = [start(shard) for shard in shards]
        for n in draw.sample(range(8), 3):
            kill_after(draw.randrange(8), jobs[n], shards[n].with_suffix(".points"), draw)
        assert {job.wait()[0].code for job in jobs} <= {0, -9}
        manifest.load(folder)
        assert [job.wait()[0].code for job in map(start, shards)] == [0] * 8
        found = Dataset(folder)
        assert len(found.manifest.shards) == len(before.manifest.shards) + 8
        kept = np.arange(len(before))
        assert found.keys(kept).tolist() == before.keys(kept).tolist()
        added = found.keys(np.arange(len(before), len(found))).tolist()
        assert sorted(added) == sorted(sample.key for part in parts for sample in part)
        assert verify(folder) == []
