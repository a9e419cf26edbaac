"""Prompt files: a prompt per line, JSONL of objects, GenEval's metadata, DPG-Bench's folder or table.

A prompt is a dict with the text under "prompt", and a style opener under "prefix" where it has one; what else its file
says of it is kept.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from vtrain.rng import fold


def read_prompts(path: str | Path, bench: str = "") -> list[dict]:
    """Prompts of a file, for bench "dpg" also of a folder. ValueError names the file and the line that is wrong.

    "": JSONL of objects with a `prompt` (by its name, `*.jsonl`), else a prompt per line. "geneval": its
    evaluation_metadata.jsonl, objects with `tag` and `include`, too. "dpg": a folder of `NAME.txt`, or dpg_bench.csv;
    these prompts have a `name`.
    """
    path = Path(path)
    if bench == "dpg":
        return _read_dpg(path)
    if bench == "geneval":
        return _read_lines(path, _geneval_object)
    return _read_lines(path, _object if path.suffix == ".jsonl" else lambda line: {"prompt": line.strip()})


def with_prefixes(entries: Sequence[dict], prefixes: Sequence[str], seed: int) -> list[dict]:
    """The prompts, each with the style opener that is drawn for it from (seed, its number) under "prefix".

    ValueError if a prompt has a "prefix" of its own already.
    """
    if not prefixes:
        return list(entries)
    for number, entry in enumerate(entries):
        if "prefix" in entry:
            raise ValueError(f"prompts.prefixes: prompt {number} has a `prefix` already; expected none in its object")
    openers = draw_openers(prefixes, len(entries), seed)
    return [{**entry, "prefix": opener} for entry, opener in zip(entries, openers)]


def draw_openers(prefixes: Sequence[str], count: int, seed: int) -> list[str]:
    """A style opener for each of so many prompts, from (seed, its number); "" where there are no prefixes."""
    return [prefixes[fold(seed, "prefix", n) % len(prefixes)] if prefixes else "" for n in range(count)]


def _read_lines(path: Path, parse: Callable[[str], dict]) -> list[dict]:
    text = _read_text(path).rstrip()
    if not text:
        raise ValueError(f"prompts {path}: the file is empty; expected at least one prompt")
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut JSON strings at U+2028
        try:
            entry = parse(line)
        except ValueError as error:
            raise ValueError(f"prompts {path}: line {number}: {error}") from None
        if not entry["prompt"].strip():
            raise ValueError(f"prompts {path}: line {number}: empty prompt")
        entries.append(entry)
    return entries


def _read_text(path: Path) -> str:
    if not path.is_file():
        found = "a folder; expected a file (--bench dpg takes one of prompts)" if path.is_dir() else "no such file"
        raise ValueError(f"prompts {path}: {found}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path}: not UTF-8: {error}") from None


def _object(line: str) -> dict:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could not be written into metadata.jsonl
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError(f"found {line[:80]}; expected an object with a string `prompt`")
    if not isinstance(value.get("prefix", ""), str):
        raise ValueError(f"found the prefix {value['prefix']!r}; expected a style opener, or none")
    return value


def _geneval_object(line: str) -> dict:
    value = _object(line)
    if not isinstance(value.get("tag"), str) or not isinstance(value.get("include"), list):
        raise ValueError(f"found {line[:80]}; expected GenEval's `tag` (a string) and `include` (a list)")
    return value


def _read_dpg(path: Path) -> list[dict]:
    if path.is_dir():
        found = {file.stem: _read_text(file).strip() for file in sorted(path.glob("*.txt"))}
        expected = "NAME.txt with a prompt each"
    elif path.suffix == ".csv" or not path.exists():
        found = _read_dpg_table(path)
        expected = "rows of item_id, text, ..."
    else:
        raise ValueError(f"prompts {path}: expected DPG-Bench's folder of prompts or its dpg_bench.csv")
    if not found:
        raise ValueError(f"prompts {path}: nothing in it; expected {expected}")
    for name, text in found.items():
        if not name or set(name) & set("./\\\0"):  # DPG-Bench's scorer takes a file's name up to its first dot
            raise ValueError(f"prompts {path}: the name {name!r}; expected one without dots and slashes")
        if not text:
            raise ValueError(f"prompts {path}: {name}: empty prompt")
    return [{"prompt": text, "name": name} for name, text in found.items()]


def _read_dpg_table(path: Path) -> dict[str, str]:
    """{item_id: text} of a table that has a row per question, so that prompts come many times over."""
    rows = csv.DictReader(io.StringIO(_read_text(path)), strict=True)
    texts: dict[str, str] = {}
    try:
        if missing := {"item_id", "text"} - set(rows.fieldnames or ()):
            raise ValueError(f"no column {' and '.join(sorted(missing))}; found {rows.fieldnames}")
        for row in rows:
            name, text = ((row[column] or "").strip() for column in ("item_id", "text"))
            if texts.setdefault(name, text) != text:
                raise ValueError(f"line {rows.line_num}: another text for item_id {name}, which came before")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"prompts {path}: {error}") from None
    return texts
