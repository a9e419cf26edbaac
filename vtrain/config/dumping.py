"""Resolved settings back into TOML."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

from vtrain.config.keys import join, toml_value


def dump(settings: Any) -> str:
    """The resolved settings as TOML; `load` of it gives an equal instance. Keys that are None are left out."""
    return _toml(plain(settings))


def dump_stages(stages: Sequence[Any]) -> str:
    """The resolved settings of all stages as TOML; `load_stages` of it gives equal ones.

    What all stages have in common comes first, then what each has of its own.
    """
    if len(stages) == 1:
        return dump(stages[0])
    trees = [plain(stage) for stage in stages]
    common = _common(trees)
    return _toml({**common, "stage": [_without(tree, common) for tree in trees]})


def plain(settings: Any) -> dict[str, Any]:
    """Settings as TOML has them: nested dicts, lists; no key that is None."""
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            tree[f.name] = plain(value)
        elif value is not None:
            is_tables = isinstance(value, tuple) and value and is_dataclass(value[0])
            tree[f.name] = [plain(table) for table in value] if is_tables else value
    return tree


def flat(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all keys; a list of tables is one value."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, join(path, name))
        else:
            yield join(path, name), value


def _common(trees: Sequence[dict]) -> dict[str, Any]:
    """The keys that all trees have with the same value."""
    first, *others = trees
    common: dict[str, Any] = {}
    for name, value in first.items():
        theirs = [tree.get(name) for tree in others]
        if isinstance(value, dict):
            common[name] = _common([value, *theirs])
        elif all(other == value for other in theirs):
            common[name] = value
    return common


def _without(tree: dict, common: dict) -> dict[str, Any]:
    """The tree without what is in `common`; no empty sections."""
    rest = {
        name: _without(value, common.get(name, {})) if isinstance(value, dict) else value
        for name, value in tree.items()
        if isinstance(value, dict) or name not in common
    }
    return {name: value for name, value in rest.items() if value != {}}


def _toml(tree: dict) -> str:
    return "\n".join(_toml_lines(tree, "")).lstrip("\n") + "\n"


def _toml_lines(table: dict, path: str) -> Iterator[str]:
    inner = {n: v for n, v in table.items() if isinstance(v, dict) or (isinstance(v, list) and v)}  # a list of tables
    yield from (f"{name} = {toml_value(value)}" for name, value in table.items() if name not in inner)
    for name, value in inner.items():
        here = join(path, name)
        for one in value if isinstance(value, list) else (value,):
            yield f"\n[[{here}]]" if isinstance(value, list) else f"\n[{here}]"
            yield from _toml_lines(one, here)
