"""Settings from a TOML file or shipped recipe, its [[stage]] tables, and `section.key=value` overrides."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vtrain.config.dumping import flat, plain
from vtrain.config.keys import (
    NO_LIMITS,
    REQUIRED,
    ConfigError,
    choices_of,
    describe,
    join,
    sections,
    toml_value,
    without_none,
)

_OF_ONE_STAGE = re.compile(r"\s*stage\.([1-9]\d*)\.(.*)", re.DOTALL)  # an override


def load(cls: type, cfg: str | Path | None = None, overrides: Sequence[str] = ()) -> Any:
    """An instance of `cls` from a TOML file or recipe name (None = defaults only) and `section.key=value` overrides.

    Raises ConfigError with one line per problem: where, what was found, what was expected.
    """
    stages = load_stages(cls, cfg, overrides)
    if len(stages) > 1:
        raise ConfigError(f"{cfg}: has {len(stages)} [[stage]] tables; expected one set of keys")
    return stages[0]


def load_stages(cls: type, cfg: str | Path | None = None, overrides: Sequence[str] = ()) -> list[Any]:
    """Like `load`, an instance for every [[stage]] of the file, or the only one where there is no such table.

    A stage has the file's keys with those of its table in their place: tables are merged, lists replaced. An override
    holds for all stages, `stage.1.section.key=value` for the first alone.
    """
    where, tree = ("settings", {}) if cfg is None else _read(str(cfg))
    tables = _stage_tables(cls, tree, where)
    trees = [_merged(tree, table) for table in tables] or [tree]
    for override in sorted(overrides, key=lambda text: text.lstrip().startswith("stage.")):  # one stage's come last
        try:
            targets, setting = _targets(cls, trees, override, len(tables))
            for target in targets:
                _apply_override(cls, target, setting)
        except ConfigError as error:
            raise ConfigError(f"override {override}: {error}") from None
    places = [f"{where}: stage {number}" for number in range(1, len(tables) + 1)] or [where]
    stages = [build(cls, *pair) for pair in zip(trees, places)]
    if len(stages) > 1:
        _check_shared(stages, places, cls.same_in_stages)
    return stages


def _stage_tables(cls: type, tree: dict, where: str) -> list[dict]:
    """Takes [[stage]] out of the tree of a file; empty where there is none."""
    tables = tree.pop("stage", [])
    if tables and not hasattr(cls, "same_in_stages"):
        raise ConfigError(f"{where}: [[stage]]: this command has no stages; expected one set of keys")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{where}: stage is {short(tables)}; expected [[stage]] tables")
    return tables


def _merged(tree: dict, table: dict) -> dict:
    """A copy of `tree` with the keys of `table` in it: tables are merged, all else is replaced."""
    merged = copy.deepcopy(tree)
    for name, value in table.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else copy.deepcopy(value)
    return merged


def _targets(cls: type, trees: list[dict], override: str, stages: int) -> tuple[list[dict], str]:
    """(the trees that an override is for, the override without `stage.N.`)."""
    if not (hasattr(cls, "same_in_stages") and override.lstrip().startswith("stage.")):
        return trees, override
    found = _OF_ONE_STAGE.match(override)
    if not found:
        raise ConfigError("expected stage.N.section.key=value, N from 1")
    if not 1 <= int(found[1]) <= stages:
        raise ConfigError(f"the file has {stages} [[stage]] tables")
    return [trees[int(found[1]) - 1]], found[2]


def _check_shared(stages: list[Any], places: list[str], shared: tuple[str, ...]) -> None:
    """ConfigError where a key that is in `shared`, or whose section is, differs from stage to stage."""
    first, *others = (dict(flat(plain(stage))) for stage in stages)
    problems = [
        f"{place}: {name} is {short(values.get(name, 'none'))}; expected {short(first.get(name, 'none'))} as in stage 1"
        for place, values in zip(places[1:], others)
        for name in dict.fromkeys([*first, *values])
        if f"{name}.".startswith(tuple(f"{path}." for path in shared)) and values.get(name) != first.get(name)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def build(cls: type, tree: dict, where: str = "settings") -> Any:
    """An instance of `cls` from nested plain values; `where` begins the error lines."""
    reader = _Reader(cls)
    settings = reader.section(cls, tree, "")
    if reader.problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in reader.problems))
    return settings


def recipes() -> list[str]:
    """The names of the shipped recipes, such as `quickstart/ar`."""

    def walk(folder, prefix: str) -> Iterator[str]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".toml"):
                yield prefix + entry.name.removesuffix(".toml")

    return sorted(walk(_recipe_folder(), ""))


def _recipe_folder():
    return resources.files("vtrain") / "recipes"


def _read(cfg: str) -> tuple[str, dict]:
    """(name for messages, parsed TOML) of a file or a shipped recipe."""
    if Path(cfg).is_file():
        source = Path(cfg)
    elif cfg in recipes():
        source = _recipe_folder().joinpath(*f"{cfg}.toml".split("/"))
    else:
        near = nearest(cfg.removesuffix(".toml"), recipes())
        raise ConfigError(f"{cfg}: no such file or recipe{near}; shipped recipes: {', '.join(recipes())}")
    try:
        return cfg, tomllib.loads(source.read_bytes().decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{cfg}: not valid TOML: {error}") from None


class _Reader:
    """Turns plain TOML values into typed ones and collects everything that is wrong with them."""

    def __init__(self, root: type) -> None:
        self.root = root
        self.problems: list[str] = []

    def section(self, cls: type, table: Any, path: str) -> Any:
        """An instance of the dataclass `cls`, or None once problems are noted."""
        if not isinstance(table, dict):
            return self._wrong(path, table, "a table of keys")
        noted = len(self.problems)
        kinds = get_type_hints(cls)
        self.problems += [_unknown(self.root, cls, join(path, name)) for name in table if name not in kinds]
        values = {}
        for f in dataclasses.fields(cls):
            kind, here = kinds[f.name], join(path, f.name)
            if f.name in table:
                values[f.name] = self.value(kind, table[f.name], here, f.metadata)
            elif is_dataclass(kind):
                values[f.name] = self.section(kind, {}, here)
            elif f.default is REQUIRED:
                self.problems.append(f"{here} is missing; expected {describe(kind, f.metadata)}: {f.metadata['doc']}")
        if len(self.problems) > noted:
            return None
        try:
            return cls(**values)
        except ConfigError as error:
            self.problems.append(f"{path}: {error}" if path else str(error))
            return None

    def value(self, kind: Any, value: Any, path: str, limits: Any = NO_LIMITS) -> Any:
        """`value` as the type `kind`; a problem is noted where it does not fit."""
        kind = without_none(kind)
        if is_dataclass(kind):
            return self.section(kind, value, path)
        if get_origin(kind) is tuple:
            return self._list(kind, value, path, limits)
        choices = choices_of(kind, limits)
        if choices:
            near = nearest(value, choices) if isinstance(value, str) else ""
            return value if value in choices else self._wrong(path, value, describe(kind, limits) + near)
        if isinstance(value, int) and kind is float and not isinstance(value, bool) and abs(value) < 2**1023:
            value = float(value)
        if type(value) is not kind or not _within(value, limits):
            return self._wrong(path, value, describe(kind, limits))
        return value

    def _list(self, kind: Any, value: Any, path: str, limits: Any) -> Any:
        elements = get_args(kind)
        if isinstance(value, list) and elements[-1] is ... and (value or not limits.get("filled")):
            elements = elements[:1] * len(value)
        if not isinstance(value, list) or len(elements) != len(value):
            return self._wrong(path, value, describe(kind, limits))
        return tuple(self.value(e, v, f"{path}.{i}", limits) for i, (e, v) in enumerate(zip(elements, value)))

    def _wrong(self, path: str, value: Any, expected: str) -> None:
        self.problems.append(f"{path} is {short(value)}; expected {expected}")


def _within(value: Any, limits: Any) -> bool:
    if isinstance(value, str):
        return bool(value) or not limits.get("filled")
    low, high, above = (limits.get(name) for name in ("min", "max", "above"))
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )


def short(value: Any, width: int = 80) -> str:
    text = toml_value(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def nearest(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _unknown(root: type, cls: type, path: str) -> str:
    """The message for a key that `cls` does not have: the nearest of its keys, or of all keys with such a name."""
    section, _, name = path.rpartition(".")
    siblings = [f.name for f in dataclasses.fields(cls)]
    everywhere = {entry.path.rpartition(".")[2]: entry.path for s in sections(root) for entry in s.keys}
    for names in ({n: join(section, n) for n in siblings}, everywhere):
        near = difflib.get_close_matches(name, names, n=1)
        if near:
            return f"unknown key {path}; did you mean {names[near[0]]}?"
    return f"unknown key {path}; expected one of {', '.join(siblings)}"


def _apply_override(root: type, tree: dict, override: str) -> None:
    """Put the value of `section.key=value` into `tree`, after a check of its own."""
    name, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not name:
        raise ConfigError("expected section.key=value")
    kind, limits = _locate(root, name)
    value = _parse_value(kind, text)
    if isinstance(value, str) and get_origin(kind) is tuple:  # most often a shell that has eaten the quotes
        raise ConfigError(f"expected {describe(kind, limits)}, quoted: '{name}=[...]'")
    if value is not None:
        reader = _Reader(root)
        reader.value(kind, value, name, limits)
        if reader.problems:
            raise ConfigError("; ".join(reader.problems))
    _place(tree, name.split("."), value)


def _place(tree: dict, parts: list[str], value: Any) -> None:
    """Set (None: remove) the value at a dotted place, making the tables on the way; a list grows by one at its end."""
    node: Any = tree
    for depth, (part, following) in enumerate(pairwise(parts)):
        if isinstance(node, list) and part.isdecimal():
            if int(part) > len(node):
                raise ConfigError(f"{'.'.join(parts[:depth])} has {len(node)} entries")
            node += [{} for _ in range(int(part) == len(node))]
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, [] if following.isdecimal() else {})
    if not isinstance(node, dict):
        raise ConfigError(f"{'.'.join(parts[:-1])} is {short(node)}; expected a table of keys")
    node.pop(parts[-1], None)
    if value is not None:
        node[parts[-1]] = value


def _locate(root: type, name: str) -> tuple[Any, Any]:
    """(type, limits) of a dotted key; `data.sources.0.weight` goes into the first table of a list."""
    kind, limits, walked = root, NO_LIMITS, ""
    for part in name.split("."):
        if get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]):
            if not part.isdecimal():
                raise ConfigError(f"{walked} is a list; write {walked}.0.{part}")
            kind, limits = get_args(kind)[0], NO_LIMITS
        elif not is_dataclass(kind):
            raise ConfigError(f"{walked} is {describe(kind, limits)}; it has no keys inside")
        else:
            kinds = get_type_hints(kind)
            if part not in kinds:
                raise ConfigError(_unknown(root, kind, join(walked, part)))
            limits = kind.__dataclass_fields__[part].metadata
            kind = kinds[part]
        walked = join(walked, part)
    if is_dataclass(kind):
        raise ConfigError(f"{name} is a section; set one of its keys: {name}.key=value")
    return kind, limits


def _parse_value(kind: Any, text: str) -> Any:
    """The value of an override: TOML syntax, strings also without quotes, `none` for a key that may be absent."""
    if text == "none" and without_none(kind) is not kind:
        return None
    kind = without_none(kind)
    if (kind is str or get_origin(kind) is Literal) and text[:1] not in ('"', "'"):
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text  # a string where another type is expected: the type check tells it best
    return parsed["value"] if len(parsed) == 1 else text
