"""SimpleAR's lists: JSON or JSONL files, patterns of them, and YAML mixes that take a part of each.

A mix is `datasets: [{json_path: file or pattern, sampling_strategy: all | first:N | end:N | random:N}]`, N or P%.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vtrain.data.json_records import JsonRecords
from vtrain.data.sources.file_patterns import find_files
from vtrain.data.sources.record import shown
from vtrain.rng import fold, uniform

SUFFIXES = (".json", ".jsonl")
KEYS = {"json_path", "sampling_strategy"}  # of an entry
_STRATEGY = re.compile(r"all|(first|end|random): *(\d+) *(%?)")


class ListFile:
    """The records of a file, or the part of them that a mix chooses, in the file's order; an index only is in memory.

    fingerprint: JSON that changes where the records do. Blank lines of JSONL count, and are not read.
    """

    def __init__(self, path: Path, strategy: str = "all") -> None:
        self.path = path
        self.records = JsonRecords(path)
        self.chosen = _choose(strategy, len(self.records), path)
        self.fingerprint = [path.stat().st_size, f"{self.records.crc:08x}", strategy]

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, first: int, last: int) -> Iterator[tuple[str, object]]:
        """(name for messages, value or Broken) of the chosen records first..last-1."""
        chosen = self.chosen[first:last]
        if not len(chosen):
            return
        wanted = chosen if isinstance(chosen, range) else set(chosen.tolist())
        for number, name, value in self.records.read(int(chosen[0]), int(chosen[-1]) + 1):
            if number in wanted:
                yield name, value


def open_lists(path: str | os.PathLike) -> list[tuple[str, ListFile]]:
    """(name, list) of all that a file, folder, pattern or mix names; names stay when the tree moves."""
    if is_mix(path):
        return open_mix(Path(path))
    return [(name, ListFile(file)) for name, file in find_files(path, SUFFIXES)]


def is_mix(path: str | os.PathLike) -> bool:
    return str(path).endswith((".yaml", ".yml"))


def open_mix(path: Path) -> list[tuple[str, ListFile]]:
    """The lists of a mix; a relative json_path begins in the mix's folder."""
    return [
        (f"[{number}] {name}", ListFile(file, entry["sampling_strategy"]))
        for number, entry in enumerate(_entries(path))
        for name, file in find_files(path.absolute().parent / entry["json_path"], SUFFIXES)
    ]


def _entries(path: Path) -> list[dict]:
    """The entries of a mix, checked: a misspelt key must not take a whole list for a part of it."""
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{path}: reading YAML needs pyyaml: pip install 'vtrain[data]'") from None
    try:
        found = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    entries = found.get("datasets") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: {shown(found)}; expected `datasets:` with a list")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str) or not entry.keys() <= KEYS:
            raise ValueError(f"{path}: datasets[{number}] is {shown(entry)}; expected json_path and sampling_strategy")
        strategy = str(entry.setdefault("sampling_strategy", "all"))
        if not _STRATEGY.fullmatch(strategy):
            raise ValueError(
                f"{path}: datasets[{number}]: sampling_strategy is {strategy!r}; "
                "expected all, first:N, end:N or random:N, N or P%"
            )
    return entries


def _choose(strategy: str, count: int, path: Path) -> range | np.ndarray:
    """The record numbers that a strategy takes, rising; `random` depends on the file's name alone."""
    if strategy == "all":
        return range(count)
    kind, number, percent = _STRATEGY.fullmatch(strategy).groups()
    wanted = min(math.ceil(int(number) * count / 100) if percent else int(number), count)
    if kind == "first":
        return range(wanted)
    if kind == "end":
        return range(count - wanted, count)
    draws = uniform(fold(0, "simplear", path.name), np.arange(count))
    return np.sort(np.argsort(draws, kind="stable")[:wanted])
