"""The house rules that can be read off the sources: import directions, nothing executable read, tidy files."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtrain import config
from vtrain.settings import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"vtrain": ROOT / "vtrain", "vkernels": ROOT / "kernels" / "vkernels"}

# What a unit may import of ours, besides itself. Every vtrain/*.py that is not named here is a command: it may import
# all that train may, and no other module imports it.
PLAIN = {"vtrain._host", "vtrain.batch", "vtrain.files", "vtrain.rng", "vtrain.vocab"}
MODELS = PLAIN | {"vkernels", "vtrain.dist", "vtrain.models", "vtrain.visual"}
WORKS = MODELS | {"vtrain.config", "vtrain.data", "vtrain.describe", "vtrain.generate", "vtrain.inspection",
                  "vtrain.objectives", "vtrain.settings", "vtrain.text", "vtrain.train"}  # fmt: skip
MAY_IMPORT = {
    "vkernels": {"vkernels._host"},
    "vtrain": set(),
    "vtrain.vocab": set(),
    "vtrain.rng": set(),
    "vtrain.failpoints": set(),
    "vtrain.files": {"vtrain.failpoints"},
    "vtrain.batch": {"vtrain.vocab", "vtrain._host"},
    "vtrain.config": set(),
    "vtrain.settings": {"vtrain.config"},
    "vtrain.dist": set(),
    "vtrain.text": PLAIN,
    "vtrain.data": PLAIN | {"vtrain.text"},
    "vtrain.models": MODELS,
    "vtrain.visual": MODELS,
    "vtrain.objectives": MODELS,
    "vtrain.generate": MODELS | {"vtrain.objectives", "vtrain.text"},
    "vtrain.train": WORKS,
    "vtrain.describe": PLAIN | {"vtrain.data", "vtrain.text"},
    "vtrain.inspection": MODELS | {"vtrain.data", "vtrain.text"},
}
ONLY_THIRD_PARTY = {"vkernels": {"torch", "triton"}, "vtrain.dist": {"torch"}, "vtrain.config": set()}
PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "flash_attn": "flash-attn"}


def sources() -> dict[str, Path]:
    """Module name -> file, of both packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()
COMMAND_FILES = [
    path for module, path in SOURCES.items() if path.parent == PACKAGES["vtrain"] and module not in MAY_IMPORT
]


def unit(module: str) -> str:
    """vkernels is one unit; in vtrain every package and every single file is one."""
    parts = module.split(".")
    return parts[0] if parts[0] != "vtrain" else ".".join(parts[:2])


def imports(module: str, path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere in it; `from vtrain import config` counts as vtrain.config."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                yield inside if inside in SOURCES or inside.endswith("._host") else base


def test_imports_run_one_way():
    commands = {f"vtrain.{path.stem}" for path in COMMAND_FILES}
    wrong = []
    for module, path in SOURCES.items():
        here = unit(module)
        allowed = WORKS if here in commands else MAY_IMPORT[here]
        targets = {unit(t) if t != "vkernels._host" else t for t in imports(module, path)}
        ours = {t for t in targets if t.split(".")[0] in PACKAGES}
        wrong += [f"{module} imports {target}" for target in sorted(ours - allowed - {here, "vtrain"})]
    assert not wrong, "\n".join(wrong)


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in project["dependencies"] + extras}
    wrong = []
    for module, path in SOURCES.items():
        tops = {target.split(".")[0] for target in imports(module, path)}
        foreign = tops - set(sys.stdlib_module_names) - set(PACKAGES)
        wrong += [f"{module} imports {top}" for top in foreign if PACKAGE_OF.get(top, top) not in declared]
        only = ONLY_THIRD_PARTY.get(unit(module), foreign)
        wrong += [f"{module} imports {top}; expected only {sorted(only)}" for top in foreign - only]
    assert not wrong, "\n".join(wrong)


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's package `kernels`"


def test_data_and_text_import_without_kernels_models_and_triton():
    modules = [m for m in SOURCES if unit(m) in ("vtrain.data", "vtrain.text", "vtrain.batch", "vtrain.rng")]
    blocked = ["triton", "vkernels", "vtrain.models", "vtrain.visual"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {', '.join(modules)}\n"
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
    done = subprocess.run([sys.executable, "-c", path + code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FORBIDDEN = [
    "eval",
    "exec",
    "__import__",
    "os.system",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.distributed.checkpoint.load",
    "yaml.load",
]


def dotted(node: ast.expr) -> str:
    """`torch.load` of the expression torch.load; empty for anything but names joined by dots."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def dangers(module: str, path: Path) -> Iterator[str]:
    """What in a file could run code out of a data file."""
    for target in imports(module, path):
        if target.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"):
            yield f"imports {target}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN:
            yield f"line {node.lineno} calls {dotted(node.func)}"
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code", "shell"):
            yield f"line {node.lineno} sets {node.arg}"


def test_nothing_executable_is_read():
    wrong = [f"{module}: {danger}" for module, path in SOURCES.items() for danger in dangers(module, path)]
    assert not wrong, "\n".join(wrong)


def test_the_danger_check_sees_what_it_should(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import pickle\nimport torch\ntorch.load(f)\neval(x)\nmodel.eval()\nnp.load(f, allow_pickle=True)\n")
    assert len(list(dangers("bad", bad))) == 4


@pytest.mark.parametrize("path", COMMAND_FILES, ids=lambda path: path.stem)
def test_a_command_tells_what_it_is_and_runs_only_as_main(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the docstring is what --help shows"
    last = tree.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_with_settings_has_its_file(name):
    path = PACKAGES["vtrain"] / f"{name}.py"
    assert path in COMMAND_FILES
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    (call,) = [c for c in calls if dotted(c.func).split(".")[-1] == "run_command"]
    assert dotted(call.args[0]).split(".")[-1] == COMMANDS[name].__name__


@pytest.mark.parametrize("name", config.recipes())
def test_a_recipe_names_its_command_and_loads(name):
    first = (PACKAGES["vtrain"] / "recipes" / f"{name}.toml").read_text().splitlines()[0]
    found = re.fullmatch(r"# torchrun -m vtrain\.(\w+) --cfg (\S+)", first)
    assert found, f"{first!r}; expected how it is run"
    assert found[2] == name
    config.load_stages(COMMANDS[found[1]], name)


def test_the_recipes_are_where_they_are_looked_for():
    folder = PACKAGES["vtrain"] / "recipes"
    assert config.recipes() == sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.toml"))
    assert {"quickstart/ar", "quickstart/extract", "quickstart/sample", "quickstart/vq"} <= set(config.recipes())


FOLDERS = (".ci", "bench", "csrc", "docs", "kernels", "scripts", "tests", "vtrain")
TEXT = {".py", ".cpp", ".cu", ".h", ".cuh", ".toml", ".md", ".sh", ".txt", ".in", ".slurm", ".yml", ".cfg", ""}


def text_files() -> list[Path]:
    """All files of the project that people wrote."""
    files = [p for p in ROOT.iterdir() if p.is_file()]
    files += [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()]
    return [p for p in files if p.suffix in TEXT and "__pycache__" not in p.parts and p.name != ".git"]


MACHINE_PATH = re.compile(r"(?<![\w.~:/$}-])/(work|home|root|opt|Users|scratch|mnt)/\w")


def test_no_path_of_one_machine():
    wrong = []
    for path in text_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_the_machine_path_pattern():
    slash = "/"
    assert MACHINE_PATH.search(f'"{slash}home/me/x"')
    assert MACHINE_PATH.search(f"cd {slash}work/main")
    assert not MACHINE_PATH.search(f"https:/{slash}x.org{slash}home/page")
    assert not MACHINE_PATH.search(f"runs{slash}work/x")


def comments(path: Path) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


UNFINISHED = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]))


def test_python_files_are_finished_and_tidy():
    wrong = []
    for path in (p for p in text_files() if p.suffix == ".py"):
        name, text = path.relative_to(ROOT), path.read_text()
        if UNFINISHED.search(text):
            wrong.append(f"{name}: {UNFINISHED.search(text)[0]}")
        if text.strip() and name.parts[0] != "tests" and not ast.get_docstring(ast.parse(text)):
            wrong.append(f"{name}: no docstring that tells what the file is for")
        for number, comment in comments(path):
            if not comment.isascii():
                wrong.append(f"{name}:{number}: a comment that is not ASCII")
            if re.match(r"#\s*[-=#*~]{4,}", comment):
                wrong.append(f"{name}:{number}: a divider")
    assert not wrong, "\n".join(wrong)
