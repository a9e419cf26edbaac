"""Datasets of token shards and the loader that turns them into packed batches. Imports neither models nor triton."""

from importlib import import_module
from typing import Any

# Public names by the module that defines them, imported at first use.
_HOME = {
    "BlockOrder": "order",
    "Chat": "compose",
    "Composer": "compose",
    "Dataset": "reader",
    "LanguageModel": "compose",
    "Loader": "loader",
    "RawPack": "raw",
    "Schema": "format",
    "ShardError": "format",
    "ShardWriter": "writer",
    "Source": "mix",
    "Step": "loader",
    "TextToImage": "compose",
    "make_composer": "compose",
    "sequential_batches": "loader",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
