"""Configuration: a TOML file or shipped recipe plus dotted overrides become frozen dataclasses, or one clear error.

A settings class is a frozen, keyword-only dataclass. Its fields are keys (`key(default, "one line")`), sections
(another such dataclass) or lists of tables (`tuple[Section, ...]`). Files for a class that names `same_in_stages`, the
keys and sections that all stages share, may have [[stage]] tables. `run_command` is the entry of every command.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import dis
import json
import math
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, is_dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

REQUIRED = MISSING  # as the default of a key: the user has to give it
_NO_LIMITS = MappingProxyType({})
_OF_ONE_STAGE = re.compile(r"\s*stage\.([1-9]\d*)\.(.*)", re.DOTALL)  # an override
REPORT_DELAY = 3.0  # seconds; torchrun looks at its workers every 0.1 s


class ConfigError(ValueError):
    """A wrong key or value; one line per problem. A section's `__post_init__` raises it with its own key names."""


def key(default: Any, doc: str, *, choices: tuple = (), min: float | None = None, max: float | None = None,
        above: float | None = None) -> Any:  # fmt: skip
    """A settings key: its default (or REQUIRED), one line of documentation, and what its values may be.

    choices: the allowed strings. min, max: inclusive limits; above: an exclusive lower limit. In a list they hold for
    every element. A required string or list must not be empty.
    """
    limits = {"choices": choices, "min": min, "max": max, "above": above, "filled": default is REQUIRED}
    return field(default=default, metadata={"doc": doc, **limits})


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
            targets, plain = _targets(cls, trees, override, len(tables))
            for target in targets:
                _apply_override(cls, target, plain)
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
        raise ConfigError(f"{where}: stage is {_short(tables)}; expected [[stage]] tables")
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
    first, *others = (dict(_flat(_plain(stage))) for stage in stages)
    problems = [
        f"{place}: {name} is {_short(values.get(name, 'none'))}; "
        f"expected {_short(first.get(name, 'none'))} as in stage 1"
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
        near = _nearest(cfg.removesuffix(".toml"), recipes())
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
        self.problems += [_unknown(self.root, cls, _join(path, name)) for name in table if name not in kinds]
        values = {}
        for f in dataclasses.fields(cls):
            kind, here = kinds[f.name], _join(path, f.name)
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

    def value(self, kind: Any, value: Any, path: str, limits: Any = _NO_LIMITS) -> Any:
        """`value` as the type `kind`; a problem is noted where it does not fit."""
        kind = _without_none(kind)
        if is_dataclass(kind):
            return self.section(kind, value, path)
        if get_origin(kind) is tuple:
            return self._list(kind, value, path, limits)
        choices = _choices(kind, limits)
        if choices:
            near = _nearest(value, choices) if isinstance(value, str) else ""
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
        self.problems.append(f"{path} is {_short(value)}; expected {expected}")


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


def _choices(kind: Any, limits: Any) -> tuple[str, ...]:
    return get_args(kind) if get_origin(kind) is Literal else limits.get("choices", ())


def _without_none(kind: Any) -> Any:
    """T of `T | None`, else the type itself. None is how an absent key reads; TOML cannot write it."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
    return kind


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _short(value: Any, width: int = 80) -> str:
    text = toml_value(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def _nearest(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _unknown(root: type, cls: type, path: str) -> str:
    """The message for a key that `cls` does not have: the nearest of its keys, or of all keys with such a name."""
    section, _, name = path.rpartition(".")
    siblings = [f.name for f in dataclasses.fields(cls)]
    everywhere = {entry.path.rpartition(".")[2]: entry.path for s in sections(root) for entry in s.keys}
    for names in ({n: _join(section, n) for n in siblings}, everywhere):
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
        raise ConfigError(f"{'.'.join(parts[:-1])} is {_short(node)}; expected a table of keys")
    node.pop(parts[-1], None)
    if value is not None:
        node[parts[-1]] = value


def _locate(root: type, name: str) -> tuple[Any, Any]:
    """(type, limits) of a dotted key; `data.sources.0.weight` goes into the first table of a list."""
    kind, limits, walked = root, _NO_LIMITS, ""
    for part in name.split("."):
        if get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]):
            if not part.isdecimal():
                raise ConfigError(f"{walked} is a list; write {walked}.0.{part}")
            kind, limits = get_args(kind)[0], _NO_LIMITS
        elif not is_dataclass(kind):
            raise ConfigError(f"{walked} is {describe(kind, limits)}; it has no keys inside")
        else:
            kinds = get_type_hints(kind)
            if part not in kinds:
                raise ConfigError(_unknown(root, kind, _join(walked, part)))
            limits = kind.__dataclass_fields__[part].metadata
            kind = kinds[part]
        walked = _join(walked, part)
    if is_dataclass(kind):
        raise ConfigError(f"{name} is a section; set one of its keys: {name}.key=value")
    return kind, limits


def _parse_value(kind: Any, text: str) -> Any:
    """The value of an override: TOML syntax, strings also without quotes, `none` for a key that may be absent."""
    if text == "none" and _without_none(kind) is not kind:
        return None
    kind = _without_none(kind)
    if (kind is str or get_origin(kind) is Literal) and text[:1] not in ('"', "'"):
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text  # a string where another type is expected: the type check tells it best
    return parsed["value"] if len(parsed) == 1 else text


def dump(settings: Any) -> str:
    """The resolved settings as TOML; `load` of it gives an equal instance. Keys that are None are left out."""
    return _toml(_plain(settings))


def dump_stages(stages: Sequence[Any]) -> str:
    """The resolved settings of all stages as TOML; `load_stages` of it gives equal ones.

    What all stages have in common comes first, then what each has of its own.
    """
    if len(stages) == 1:
        return dump(stages[0])
    trees = [_plain(stage) for stage in stages]
    common = _common(trees)
    return _toml({**common, "stage": [_without(tree, common) for tree in trees]})


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as TOML has them: nested dicts, lists; no key that is None."""
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            tree[f.name] = _plain(value)
        elif value is not None:
            is_tables = isinstance(value, tuple) and value and is_dataclass(value[0])
            tree[f.name] = [_plain(table) for table in value] if is_tables else value
    return tree


def _flat(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all keys; a list of tables is one value."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, _join(path, name))
        else:
            yield _join(path, name), value


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
        here = _join(path, name)
        for one in value if isinstance(value, list) else (value,):
            yield f"\n[[{here}]]" if isinstance(value, list) else f"\n[{here}]"
            yield from _toml_lines(one, here)


def toml_value(value: Any) -> str:
    """One value in TOML syntax."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Entry:
    """One key as help and documentation show it: dotted path, type, default in TOML and one line."""

    path: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True)
class SectionDoc:
    """One section as help and documentation show it: TOML header, one line, keys."""

    header: str
    doc: str
    keys: tuple[Entry, ...]


def sections(cls: type, path: str = "", header: str = "") -> Iterator[SectionDoc]:
    """What can be set in a settings class, section by section; N stands for a place in a list of tables."""
    kinds = get_type_hints(cls)
    keys, inner = [], []
    for f in dataclasses.fields(cls):
        kind, here = kinds[f.name], _join(path, f.name)
        if is_dataclass(kind):
            inner.append((kind, here, f"[{here}]"))
            continue
        if get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]):
            inner.append((get_args(kind)[0], f"{here}.N", f"[[{here}]]"))
        default = "required" if f.default is REQUIRED else "none" if f.default is None else toml_value(f.default)
        words = describe(kind, {**f.metadata, "filled": False})
        keys.append(Entry(here, words, default, f.metadata["doc"]))
    if keys:
        yield SectionDoc(header, cls.__doc__.strip().splitlines()[0], tuple(keys))
    for section in inner:
        yield from sections(*section)


def describe(kind: Any, limits: Any = _NO_LIMITS) -> str:
    """A type in words: `int >= 0`, `list of str`, `"cosine" | "constant"`."""
    kind = _without_none(kind)
    if get_origin(kind) is tuple:
        elements = get_args(kind)
        count = f"list of {len(elements)}" if elements[-1] is not ... else "list of"
        count = f"non-empty {count}" if limits.get("filled") else count
        return f"{count} {'tables' if is_dataclass(elements[0]) else describe(elements[0], limits)}"
    choices = _choices(kind, limits)
    if choices:
        return " | ".join(map(toml_value, choices))
    signs = {"min": ">=", "above": ">", "max": "<="}
    bounds = [f"{sign} {limits[name]}" for name, sign in signs.items() if limits.get(name) is not None]
    name = {bool: "true | false", str: "non-empty str" if limits.get("filled") else "str"}.get(kind, kind.__name__)
    return " ".join([name, " and ".join(bounds)]).strip()


_OPTIONS = """options:
  --cfg NAME|FILE   a TOML file, or a shipped recipe: {recipes}
  --dry-run         resolve the settings and the data, print the plan, do nothing
{more}  --help            this text
  key=value         set one key, after the file: optim.lr=1e-4, data.sources.0.weight=2, train.trainable=["head.*"]
"""

_STAGES = """
stages:
  A file may have [[stage]] tables, which are run one after the other. A stage has the keys of the file with those of
  its table in their place: tables are merged ([stage.optim]), lists replaced ([[stage.data.sources]]).
  stage.2.key=value sets a key of the second alone, key=value sets it for all.
"""


def run_command(
    cls: type,
    main: Callable[..., Any],
    argv: Sequence[str] | None = None,
    *,
    options: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The shell side of a command: settings from `argv` (default: the process's), then `main(settings, dry_run=...)`.

    `main` of a command that has stages takes the settings of each, `main(first, second, ..., dry_run=...)`.
    options: {name: one line for --help} of further `--name VALUE`; those that are given go to `main` as strings.
    A mistake of the user's prints one `error: ...` line per problem and exits with 2: OSError, ConfigError and every
    ValueError that this project's code raises on purpose. Anything else keeps its traceback, and with
    VTRAIN_TRACEBACK=1 these do, too. Ctrl-C exits with 130.
    """
    try:
        arguments = sys.argv[1:] if argv is None else argv
        if {"--help", "-h"} & set(arguments):
            print(help_text(cls, main, options), end="")
            return
        given, dry_run, overrides = _parse_arguments(arguments, ("cfg", *options))
        cfg = given.pop("cfg", None)
        main(*load_stages(cls, cfg, overrides), dry_run=dry_run, **given)
    except (ValueError, OSError) as error:
        if os.environ.get("VTRAIN_TRACEBACK") == "1" or not _is_user_error(error):
            raise
        _report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse_arguments(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], bool, list[str]]:
    """({name: value} of the options that are given, dry_run, overrides). `--cfg X` and `--cfg=X` are the same."""
    given: dict[str, str] = {}
    dry_run, overrides = False, []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--dry-run":
            dry_run = True
        elif argument.startswith("--") and name in names:
            if name in given or not (equals or rest):
                raise ConfigError(f"--{name}: expected one {'file or recipe name' if name == 'cfg' else 'value'}")
            given[name] = value if equals else rest.pop(0)
        elif argument.startswith("-"):
            known = ", ".join(f"--{option}" for option in (*names, "dry-run", "help"))
            hint = f"; a key is set without dashes: {argument.lstrip('-')}" if equals else ""
            raise ConfigError(f"unknown option {argument}; expected {known} or key=value{hint}")
        else:
            overrides.append(argument)
    return given, dry_run, overrides


def _is_user_error(error: Exception) -> bool:
    """Whether an error tells about the user's input: raised by a `raise` of our own, not by a slip in our code."""
    if isinstance(error, OSError | ConfigError):
        return True
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    ours = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("vtrain", "vkernels", "__main__")
    return ours and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _report(error: Exception) -> None:
    """Print `error: ...`, under torchrun with the rank.

    A wrong setting is the same on all ranks: rank 0 tells it, and torchrun ends the others while they wait.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, ConfigError):
        time.sleep(REPORT_DELAY)
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"error: {line}" if rank == "0" else f"error: rank {rank}: {line}", file=sys.stderr, flush=True)


def help_text(cls: type, main: Callable[..., Any], options: Mapping[str, str] = MappingProxyType({})) -> str:
    """What --help prints: usage, the command's own words, options, and every key with type, default and one line."""
    module = sys.modules[main.__module__]
    program = f"torchrun -m {module.__spec__.name}" if module.__spec__ else f"python {Path(module.__file__).name}"
    parts = [
        f"usage: {program} [--cfg NAME|FILE] [--dry-run] [key=value ...]",
        (module.__doc__ or "").strip(),
        (_OPTIONS + (_STAGES if hasattr(cls, "same_in_stages") else "")).format(
            recipes=", ".join(recipes()),
            more="".join(f"  {f'--{name} {name.upper()}':<17} {doc}\n" for name, doc in options.items()),
        ),
    ]
    for section in sections(cls):
        lines = [f"  {k.path} ({k.type}, {_default_words(k)})\n      {k.doc}" for k in section.keys]
        parts.append("\n".join([f"{section.header} {section.doc}".strip(), *lines]))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _default_words(entry: Entry) -> str:
    return entry.default if entry.default == "required" else f"default {entry.default}"
