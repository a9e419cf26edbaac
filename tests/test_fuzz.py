"""The fuzz targets of csrc/fuzz: they replay their seeds and changed ones of them, and they see an over-read."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUZZ = ROOT / "csrc/fuzz"
TARGETS = sorted(path.stem for path in FUZZ.glob("*.cpp") if path.stem != "driver")
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RANGE_CHECK = "stop > table.size || "  # of shard_view.h


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    """A C++ compiler that comes with the sanitizers."""
    cxx, folder = os.environ.get("CXX", "g++"), tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    if not shutil.which(cxx) or run(cxx, *FLAGS, folder / "probe.cpp", "-o", folder / "probe").returncode:
        pytest.skip(f"{cxx} comes without the sanitizers")
    return cxx


@pytest.fixture(scope="module")
def host(compiler, tmp_path_factory) -> list[Path]:
    """The objects of all C++ that knows nothing of Python."""
    folder = tmp_path_factory.mktemp("host")
    sources = [path for path in (ROOT / "csrc/host/vtrain").glob("*.cpp") if "pybind11" not in path.read_text()]
    built = run(compiler, *FLAGS, f"-I{ROOT / 'csrc/host'}", "-c", FUZZ / "driver.cpp", *sources, cwd=folder)
    assert built.returncode == 0, built.stderr
    return list(folder.glob("*.o"))


def build(compiler: str, target: str, folder: Path, parts: list[Path], csrc: Path = FUZZ.parent) -> Path:
    program = folder / target
    built = run(compiler, *FLAGS, f"-I{csrc / 'host'}", FUZZ / f"{target}.cpp", *parts, "-o", program)
    assert built.returncode == 0, built.stderr
    return program


def script(*arguments: object, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return run(root / "scripts/fuzz.sh", *arguments, env={**os.environ, **environment})


def clang_with_fuzzer() -> bool:
    probe = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
    options = ["-fsanitize=fuzzer,address", "-x", "c++", "-", "-o", os.devnull]
    return bool(shutil.which("clang++")) and run("clang++", *options, input=probe).returncode == 0


def test_seeds_are_what_the_writer_makes():
    spec = importlib.util.spec_from_file_location("fuzz_seeds", ROOT / "scripts/fuzz_seeds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    committed = {path.name: path.read_bytes() for path in module.FOLDER.iterdir()}
    assert committed.keys() >= module.seeds().keys()
    assert {name: committed[name] for name in module.seeds()} == module.seeds(), "run scripts/fuzz_seeds.py"


def test_changed_shards_are_read_without_harm(compiler, tmp_path):
    program = build(compiler, "shard", tmp_path, [FUZZ / "driver.cpp", ROOT / "csrc/host/vtrain/decode.cpp"])
    ended = run(program, "--runs", 30000, FUZZ / "corpus/shard", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "30000 changed ones" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "no target nothing"), (["--seconds", "0"], "--seconds is '0'"), (["--seconds"], "--seconds is ''")],
)
def test_script_names_what_it_cannot_take(arguments, message):
    ended = script(*arguments)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {message}")


def test_script_says_what_to_install():
    ended = script("crc32c", CXX="false")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: false cannot build with libFuzzer")
    assert "apt install" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "shard"])
def test_other_targets_hold_for_random_bytes(compiler, host, target, tmp_path):
    program = build(compiler, target, tmp_path, host)
    corpus = FUZZ / "corpus" / target
    ended = run(program, "--runs", 500, *[corpus] * corpus.exists(), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.mark.slow
def test_a_missing_bounds_check_is_seen(compiler, host, tmp_path):
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = csrc / "host/vtrain/shard_view.h"
    assert RANGE_CHECK in header.read_text()
    header.write_text(header.read_text().replace(RANGE_CHECK, ""))
    program = build(compiler, "shard", tmp_path, host, csrc)
    ended = run(program, "--runs", 10000, FUZZ / "corpus/shard", cwd=tmp_path)
    assert ended.returncode != 0
    assert "AddressSanitizer" in ended.stderr
    assert run(program, tmp_path / "crash-input", cwd=tmp_path).returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(not clang_with_fuzzer(), reason="clang with libFuzzer is not installed")
def test_script_finds_a_wrong_checksum_and_names_the_input(tmp_path):
    for name in ("csrc", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    sound = script("--seconds", 2, "crc32c", root=tmp_path, CXX="clang++")
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert re.search(r"crc32c: [1-9]\d* runs in 2 s, [1-9]\d* edges covered, [1-9]\d* inputs kept", sound.stdout)
    source = tmp_path / "csrc/host/vtrain/crc32c.cpp"
    shift = "b = (b >> 1) ^ (kPoly & (0u - (b & 1u)))"
    assert shift in source.read_text()
    source.write_text(source.read_text().replace(shift, "b = b >> 1"))
    broken = script("--seconds", 5, "crc32c", root=tmp_path, CXX="clang++")
    assert broken.returncode == 1
    (crash,) = (tmp_path / ".fuzz").glob("crc32c-crash-*")
    assert f".fuzz/{crash.name}" in broken.stderr
