"""Where pictures and texts come from: folders, lists of LLaVA, SimpleAR and VGT, tars, Parquet and Arrow tables."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vtrain.data.sources.image_folder import ImageFolder
from vtrain.data.sources.llava import Llava
from vtrain.data.sources.record import IndexedSource, Record, Skipped, Source, Turn, Unit
from vtrain.data.sources.simplear import SimpleARImages
from vtrain.data.sources.vgt import Vgt
from vtrain.data.sources.webdataset import WebDataset

KINDS = {  # and what input.records is for each
    "image_folder": "a JSONL file, or input.images alone for all images of a folder",
    "llava": "a JSON or JSONL file of conversations",
    "parquet": "a Parquet or Arrow file, a folder of them, or a pattern",
    "simplear": "a JSON or JSONL file of pictures and captions, a pattern, or a YAML mix of them",
    "vgt": "a JSON list of images and annotations",
    "webdataset": "a tar, a folder of tars, or a pattern such as shard-{000..010}.tar",
}

__all__ = ["KINDS", "IndexedSource", "Record", "Skipped", "Source", "Turn", "Unit", "open_indexed", "open_source"]


def open_source(
    kind: str,
    *,
    records: str | os.PathLike = "",
    images: str | os.PathLike = "",
    annotations: str | os.PathLike = "",
    image: str = "",
    captions: Sequence[str] = (),
) -> Source:
    """A source from what a configuration says; what is empty is as the kind has it.

    records: the JSONL, JSON, tars or tables. images, annotations: the folders that paths in them are relative to; empty
    = the folder of `records`. image, captions: the names of fields.
    """
    if kind not in KINDS:
        raise ValueError(f"input.kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if not records and (kind != "image_folder" or not images):
        raise ValueError("input.records is empty; expected " + KINDS[kind])
    names = {**({"image": image} if image else {}), **({"captions": tuple(captions)} if captions else {})}
    root = images or (records if os.path.isdir(records) else os.path.dirname(records) or ".")
    if kind == "webdataset":
        return WebDataset(records, **names)
    if kind == "parquet":
        return _tables()(records, images or None, **names)
    if kind == "simplear":
        return SimpleARImages(images or None, records, **names)
    if kind == "vgt":
        return Vgt(root, records, annotations=annotations or None, **names)
    if kind == "llava":
        return Llava(root, records, **names)
    return ImageFolder(root, records or None, **names)


def open_indexed(kind: str, **options) -> IndexedSource:
    """`open_source` for who needs records in any order; ValueError for a kind that is read from front to end."""
    source = open_source(kind, **options)
    if isinstance(source, WebDataset):
        return source.indexed()
    if not isinstance(source, IndexedSource):
        raise ValueError(f"input.kind is {kind}, which is read in order only; unpack its images into a folder")
    return source


def _tables() -> type:
    try:
        from vtrain.data.sources.parquet import Table  # here: pyarrow is an extra, and slow to import
    except ImportError as error:
        raise ValueError(f"input.kind parquet needs pyarrow ({error}); pip install 'vtrain[data]'") from None
    return Table
