"""Datasets of token shards and the loader that turns them into packed batches; docs/data.md is the guide.

Imports neither models nor triton. Write with ShardWriter, `publish` the folder, and read it with Dataset; a Loader
mixes Sources, has a Composer make sequences of their samples, and packs these. Twins (FeatureWriter, BlobWriter,
`add_twins`) give the segments of a dataset rows of features or bytes. Other formats come in through
vtrain.data.importers; vtrain.data.huggingface fits a Loader into a Hugging Face Trainer.
"""

from importlib import import_module
from typing import Any

# Public names by the module that defines them, imported at first use.
_HOME = {
    "SEGMENT": "format",
    "BlobWriter": "twins",
    "BlockOrder": "order",
    "Chat": "compose",
    "Composer": "compose",
    "Dataset": "reader",
    "FeatureWriter": "twins",
    "LanguageModel": "compose",
    "Loader": "loader",
    "Modality": "format",
    "RawPack": "raw",
    "RawPacks": "raw",
    "Role": "format",
    "Schema": "format",
    "ShardError": "format",
    "ShardWriter": "writer",
    "Source": "mix",
    "Step": "loader",
    "StoredOrder": "order",
    "TextToImage": "compose",
    "add_twins": "manifest",
    "make_composer": "compose",
    "publish": "manifest",
    "sequential_batches": "loader",
    "twin_path": "twins",
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
