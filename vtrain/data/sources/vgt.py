"""VGT's lists: JSON of {"image": path, "annotation": path of a JSON or text file} or with the captions inline."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from vtrain.data.sources.json_file import JsonFile
from vtrain.data.sources.record import (
    IndexedSource,
    Record,
    Skipped,
    file_digest,
    inside,
    shown,
    stable_key,
    strings,
    texts,
)

# Where the sets that VGT is trained on keep their captions.
CAPTIONS = ("caption", "caption_internlm2_short", "re_caption", "prompt", "input_prompt")


class Vgt(IndexedSource):
    """The entries of a JSON list (or JSON Lines), or of all `.json` and `.jsonl` files of a folder by name.

    captions: keys of the annotation (or of the entry itself, where it names none); an annotation that is not `.json` is
    the caption. An entry without caption is skipped, as is one whose annotation cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        records: str | os.PathLike,
        *,
        annotations: str | os.PathLike | None = None,
        image: str = "image",
        captions: Sequence[str] = CAPTIONS,
    ) -> None:
        self.root, self.path, self.fields = Path(root), Path(records), (image, tuple(captions))
        self.annotations = Path(root if annotations is None else annotations)
        for folder in (self.root, self.annotations):
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such folder")
        listed = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        lists = [path for path in listed if path == self.path or path.suffix in (".json", ".jsonl")]
        self.files = [JsonFile(path) for path in lists]
        self.cu = [0, *accumulate(map(len, self.files))]
        if not len(self):
            raise ValueError(f"{self.path}: empty; expected entries of images and annotations")

    def __len__(self) -> int:
        return self.cu[-1]

    def __getitem__(self, index: int) -> Record | Skipped:
        number = bisect.bisect_right(self.cu, index) - 1
        file, index = self.files[number], index - self.cu[number]
        try:
            return self._record(file.name(index), file.object(index))
        except (ValueError, OSError) as error:
            return Skipped(file.name(index), str(error))

    def _record(self, name: str, value: dict) -> Record:
        image, names = self.fields
        paths = strings(value.get(image), "image")
        captions = texts(value, names) if value.get("annotation") is None else self._annotated(value["annotation"])
        if not captions:
            raise ValueError(f"no caption; expected one of {', '.join(names)}")
        return Record(stable_key(*paths), name, tuple(inside(self.root, path) for path in paths), captions)

    def _annotated(self, annotation: object) -> tuple[str, ...]:
        """The captions of an annotation file."""
        if not isinstance(annotation, str):
            raise ValueError(f"annotation is {shown(annotation)}; expected a path")
        file = inside(self.annotations, annotation)
        if not file.is_file():
            raise ValueError(f"{file}: no such annotation")
        text = file.read_bytes()
        if file.suffix != ".json":
            return tuple(filter(None, [text.decode("utf-8-sig").strip()]))
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{file}: not a JSON object")
        return texts(value, self.fields[1])

    def fingerprint(self) -> dict:
        digest = hashlib.sha256("".join(file_digest(file.path) for file in self.files).encode())
        return {"kind": "vgt", "records": digest.hexdigest(), "fields": list(self.fields)}

    def describe(self) -> str:
        return f"{len(self)} images of {self.path}"
