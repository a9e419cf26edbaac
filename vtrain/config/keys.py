"""What a settings class is made of: keys with types, limits and one line each, and how they read in words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, is_dataclass
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

REQUIRED = MISSING  # as the default of a key: the user has to give it
NO_LIMITS = MappingProxyType({})


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
        kind, here = kinds[f.name], join(path, f.name)
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


def describe(kind: Any, limits: Any = NO_LIMITS) -> str:
    """A type in words: `int >= 0`, `list of str`, `"cosine" | "constant"`."""
    kind = without_none(kind)
    if get_origin(kind) is tuple:
        elements = get_args(kind)
        count = f"list of {len(elements)}" if elements[-1] is not ... else "list of"
        count = f"non-empty {count}" if limits.get("filled") else count
        return f"{count} {'tables' if is_dataclass(elements[0]) else describe(elements[0], limits)}"
    choices = choices_of(kind, limits)
    if choices:
        return " | ".join(map(toml_value, choices))
    signs = {"min": ">=", "above": ">", "max": "<="}
    bounds = [f"{sign} {limits[name]}" for name, sign in signs.items() if limits.get(name) is not None]
    name = {bool: "true | false", str: "non-empty str" if limits.get("filled") else "str"}.get(kind, kind.__name__)
    return " ".join([name, " and ".join(bounds)]).strip()


def choices_of(kind: Any, limits: Any) -> tuple[str, ...]:
    return get_args(kind) if get_origin(kind) is Literal else limits.get("choices", ())


def without_none(kind: Any) -> Any:
    """T of `T | None`, else the type itself. None is how an absent key reads; TOML cannot write it."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (k for k in get_args(kind) if k is not NoneType)
    return kind


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def toml_value(value: Any) -> str:
    """One value in TOML syntax."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else str(value)
