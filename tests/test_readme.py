"""What README and guides tell people to type: snippets run in order on toy data, command lines are ones that exist.

Fences that begin with ```python are run as one session per page; ```py is for what needs another package.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from toys import write_dataset

from vtrain import config, shards
from vtrain.data.importers import IMPORTERS, Options
from vtrain.data.verify import verify
from vtrain.settings import COMMANDS, PretrainSettings

ROOT = Path(__file__).parent.parent
NEEDED = {"run": {"out": "runs/x"}, "model": {"preset": "digits"}, "train": {"steps": 1}}  # of every configuration
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]


def fences(page: str, language: str) -> list[tuple[int, str]]:
    """(line, text) of the code blocks of one language."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start()) + 1, block[2]) for block in found if block[1] == language]


def command_lines(module: str) -> list[tuple[str, list[str]]]:
    """(where, arguments) of every command line of the pages that runs a module whose name matches."""
    found = []
    for page in PAGES:
        for number, block in fences(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                start = re.search(rf"-m ({module})(?= )", line)
                if start:
                    words = shlex.split(line[start.start() + 3 :], comments=True)
                    found.append((f"{page}:{number}: {line}", words))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")])
def test_snippets_run(page, tmp_path, monkeypatch):
    write_dataset(tmp_path / "runs" / "quickstart" / "shards" / "train", 120)
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"__name__": "snippets"}
    for line, block in fences(page, "python"):
        exec(compile("\n" * line + block, str(ROOT / page), "exec"), session)
    for folder in (tmp_path / "runs").iterdir():
        if folder.is_dir() and any(folder.glob("*.vts")):
            assert verify(folder) == []


def test_the_guide_has_snippets_to_run():
    assert len(fences("docs/data.md", "python")) >= 8
    assert len(fences("README.md", "python")) >= 4
    assert len(fences("docs/kernels.md", "python")) >= 4


def test_shards_command_lines_are_ones_that_exist(capsys):
    lines = command_lines(r"vtrain\.shards")
    assert {words[1] for _, words in lines} >= {"import", "verify", "stats", "merge", "append", "exclude", "shuffle"}
    for where, words in lines:
        try:
            arguments = shards.parser().parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{where}\n{capsys.readouterr().err}")
        if words[1] == "import":
            given = {f.name for f in dataclasses.fields(Options) if getattr(arguments, f.name) is not None}
            assert given <= set(IMPORTERS[arguments.kind].takes), where


def test_lines_with_settings_name_keys_that_exist():
    lines = command_lines("|".join(rf"vtrain\.{name}" for name in COMMANDS))
    assert lines
    for where, words in lines:
        cfg = words[words.index("--cfg") + 1]
        if cfg in config.recipes():
            keys = [word for word in words if "=" in word]
            try:
                config.load_stages(COMMANDS[words[0].removeprefix("vtrain.")], cfg, keys)
            except ValueError as error:
                pytest.fail(f"{where}\n{error}")


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "toml")])
def test_configurations_load(page, tmp_path):
    for _, block in fences(page, "toml"):
        given = tomllib.loads(block)
        if "stage" in given:  # a whole file
            (tmp_path / "stages.toml").write_text(block)
            config.load_stages(PretrainSettings, tmp_path / "stages.toml")
        else:
            config.build(PretrainSettings, NEEDED | given)


def test_links_lead_somewhere():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if anchor else []
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in slugs, f"{page}: {target}"
