"""Packaging: what the sdist and the wheel carry, that an installed one runs from anywhere, and what the pins hold."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
EXTENSIONS = {f"vtrain/_host{SUFFIX}", f"vkernels/_host{SUFFIX}"}
MODULES = ("vtrain", "vtrain._host", "vtrain.pretrain", "vkernels", "vkernels._host")


def run(*command: str | Path, cwd: Path | str) -> str:
    """What a command prints, with nothing in its environment that changes where Python imports from."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}
    environment |= {
        "VTRAIN_CUDA": "0",
        "OMP_NUM_THREADS": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def where_from(python: Path | str, cwd: Path | str) -> dict[str, Path]:
    """The file that each of our modules is imported from."""
    code = f"import importlib, json; print(json.dumps({{n: importlib.import_module(n).__file__ for n in {MODULES}}}))"
    return {name: Path(path) for name, path in json.loads(run(python, "-c", code, cwd=cwd)).items()}


def not_source(folder: str, names: list[str]) -> set[str]:
    """What .gitignore names: patterns that begin with a slash hold in the root only."""
    patterns = [".git", *(ROOT / ".gitignore").read_text().split()]
    here = [p.strip("/") for p in patterns if not p.startswith("/") or Path(folder) == ROOT]
    return {name for pattern in here for name in fnmatch.filter(names, pattern)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> SimpleNamespace:
    """A copy of the sources (.tree), the sdist made of it and the wheel made of the sdist, all without a network."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=not_source)
    sources = files_under(tree)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(tree / "vtrain.egg-info")
    return SimpleNamespace(tree=tree, sources=sources, sdist=sdist, wheel=wheel)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The Python of a new environment with the wheel; all else it borrows from the environment of this test."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", built.wheel, cwd=folder)
    # Paths named in a .pth come last, and the .pth files of those folders (an editable vtrain) are not read.
    borrowed = "\n".join(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))
    (site_packages(folder) / "borrowed.pth").write_text(borrowed + "\n")
    return python


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


@pytest.mark.slow
def test_the_sdist_is_the_whole_source(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert built.sources - names == set()
    assert {name for name in names - built.sources - made if "egg-info" not in name} == set()
    expected = {
        "LICENSE",
        "THIRD_PARTY.md",
        "scripts/env.sh",
        "csrc/cuda/sampling.cu",
        "csrc/host/vtrain/module.cpp",
        "csrc/host/vkernels/vec.h",
    }
    assert expected <= names


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_nothing_else(built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        notices = {name for name in archive.namelist() if ".dist-info/licenses/" in name}
        assert all(archive.read(name) for name in notices)
    ours = {name.removeprefix("kernels/") for name in built.sources if name.startswith(("vtrain/", "kernels/"))}
    assert names == ours | EXTENSIONS
    assert "vtrain/recipes/quickstart/ar.toml" in names
    assert "vkernels/__init__.py" in names
    assert {Path(name).name for name in notices} == {"LICENSE", "THIRD_PARTY.md"}


@pytest.mark.slow
def test_the_wheel_is_what_runs_outside_a_checkout(installed):
    home = site_packages(installed.parent.parent)
    assert all(path.is_relative_to(home) for path in where_from(installed, "/").values())
    folder = ROOT / "vtrain" / "recipes"
    shipped = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.toml"))
    found = run(installed, "-c", "from vtrain import config; print(*config.recipes())", cwd="/")
    assert found.split() == shipped


@pytest.mark.slow
def test_a_checkout_that_was_not_built_takes_the_extension_of_the_wheel(built, installed):
    home = site_packages(installed.parent.parent)
    found = where_from(installed, built.tree)
    assert found["vtrain.pretrain"] == built.tree / "vtrain" / "pretrain.py"
    assert {found[name] for name in ("vtrain._host", "vkernels._host")} == {home / name for name in EXTENSIONS}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "shards"])
@pytest.mark.parametrize("place", ["root", "checkout"])
def test_commands_of_the_wheel_run_anywhere(built, installed, command, place):
    cwd = built.tree if place == "checkout" else "/"
    assert f"vtrain.{command}" in run(installed, "-m", f"vtrain.{command}", "--help", cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["root", "checkout"])
def test_another_package_called_kernels_stays_what_it_is(built, installed, place):
    theirs = site_packages(installed.parent.parent) / "kernels" / "__init__.py"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("owner = 'somebody else'\n")
    code = "import kernels, vkernels; print(kernels.__file__, kernels.owner)"
    cwd = built.tree if place == "checkout" else "/"
    assert run(installed, "-c", code, cwd=cwd).strip() == f"{theirs} somebody else"


def is_editable_here() -> bool:
    """Whether the Python of this test has this checkout installed as editable."""
    try:
        origin = json.loads(metadata.distribution("vtrain").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return False
    return origin.get("dir_info", {}).get("editable", False) and origin["url"] == ROOT.as_uri()


@pytest.mark.skipif(not is_editable_here(), reason="this checkout is not installed as editable")
@pytest.mark.parametrize("cwd", ["/", ROOT], ids=["root", "checkout"])
def test_an_editable_install_is_the_checkout(cwd):
    found = where_from(sys.executable, cwd)
    assert all(path.is_relative_to(ROOT) for path in found.values())
    assert found["vkernels._host"] == ROOT / "kernels" / "vkernels" / f"_host{SUFFIX}"


def test_data_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; from vtrain.data import *; print(Loader.__module__)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "vtrain.data.loader"


def test_the_extras_are_there():
    expected = {"plots", "data", "hub", "flash-attn", "trackers", "quickstart", "dev"}
    assert expected <= set(PROJECT["optional-dependencies"])


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), lines
    names = [canonicalize_name(line.partition("==")[0]) for line in lines]
    assert names == sorted(set(names))
    return dict(zip(names, (line.partition("==")[2] for line in lines), strict=True))


def needed() -> set[str]:
    """The distributions that the development environment needs, from what the installed ones ask for."""
    extras = PROJECT["optional-dependencies"]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    used = ("dev", "data", "huggingface", "plots", "quickstart")
    waiting = [*build, *PROJECT["dependencies"], *(line for name in used for line in extras[name])]
    found = {"vtrain"}
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in found or not applies(requirement):
            continue
        found.add(name)
        # What torch's builds bring for a device is theirs to choose.
        if not from_torch(name):
            waiting += metadata.distribution(name).requires or []
    return {name for name in found if not from_torch(name)} - {"vtrain"}


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def from_torch(name: str) -> bool:
    return name.startswith(("triton", "nvidia-", "cuda-"))


def test_every_package_of_the_environment_is_pinned_and_no_other():
    assert set(pins()) == needed()


def requirements() -> list[Requirement]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in PROJECT["dependencies"] + extras if not line.startswith("vtrain[")]


def test_the_pins_are_within_the_bounds_of_the_project():
    pinned = pins()
    pairs = [(r, pinned[canonicalize_name(r.name)]) for r in requirements() if canonicalize_name(r.name) in pinned]
    assert len(pairs) > 10
    assert [f"{r}, pinned {version}" for r, version in pairs if not r.specifier.contains(version)] == []


def test_every_direct_dependency_is_named_in_the_notice():
    notice = (ROOT / "THIRD_PARTY.md").read_text().lower()
    assert {r.name for r in requirements() if f"| {r.name.lower()} |" not in notice} == set()
