"""Pictures with captions or conversations: texts become tokens, the pictures' bytes lie in the twin `image`.

A sample is a record of a source (vtrain.data.sources). Turns go through a chat template, which leaves a segment for
every stretch of template, system, user and assistant; captions are a segment each. A picture is a feature segment
without tokens: features of it can be added later, as rows of a twin of their own.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from vtrain.data.format import SEGMENT
from vtrain.data.importers.base import VOCABULARY, Batch, Options, SampleList, make_schema
from vtrain.data.schema import Modality, Role
from vtrain.data.sources import KINDS, Record, Skipped, Unit, open_source
from vtrain.data.twins import BlobWriter, twin_path
from vtrain.text.chat import ChatTemplate, Span, chat_template

TWIN = "image"
BATCH_RECORDS, BATCH_BYTES = 256, 1 << 26
ROLES = {"template": Role.INPUT, "system": Role.SYSTEM, "user": Role.USER, "assistant": Role.ASSISTANT}
_OWN = ("template", "images", "annotations", "image_field", "caption_fields", "no_pictures")


class Records:
    """An importer of one kind of source; inputs: its one file, folder or pattern."""

    takes = (*VOCABULARY, *_OWN)
    noun = "records"
    kind: str

    def __init__(self, inputs: Sequence[Path], options: Options) -> None:
        if len(inputs) != 1:
            raise ValueError(f"import {self.kind}: {len(inputs)} inputs; expected one: {KINDS[self.kind]}")
        self.schema, self.tokenizer = make_schema(self.kind, options)
        if self.tokenizer is None:
            raise ValueError(f"import {self.kind}: no text tokenizer; expected --text-tokenizer")
        self.assets = {"text_tokenizer": self.tokenizer}
        self.template: ChatTemplate | None = chat_template(options.template) if options.template else None
        self.pictures = not options.no_pictures
        self.source = open_source(
            self.kind,
            records=inputs[0],
            images=options.images or "",
            annotations=options.annotations or "",
            image=options.image_field or "",
            captions=tuple(filter(None, (options.caption_fields or "").split(","))),
        )

    def total(self) -> int | None:
        return self.source.total()

    def units(self, size: int) -> list[tuple[int, int, int]]:
        return [(unit.file, unit.first, unit.last) for unit in self.source.units(size)]

    def fingerprint(self) -> dict:
        template = self.template.name if self.template else None
        return {**self.source.fingerprint(), "template": template, "pictures": self.pictures}

    def describe(self) -> str:
        return f"{self.kind}: {self.source.describe()}"

    def read(self, *unit: int) -> Iterator[Batch]:
        found, pictures, records, held = SampleList(), [], 0, 0
        for record in self.source.read(Unit(*unit)):
            records += 1
            try:
                pieces, segments, files = self._sample(record)
            except (ValueError, OSError, KeyError) as error:
                reason = error.args[0] if isinstance(error, KeyError) else str(error)
                found.skip(getattr(record, "key", 0), record.name, reason.removeprefix(f"{record.name}: "))
                continue
            found.add(pieces, segments, record.key)
            pictures += files
            held += sum(map(len, files))
            if records >= BATCH_RECORDS or held >= BATCH_BYTES:
                yield self._batch(found, pictures, records)
                found, pictures, records, held = SampleList(), [], 0, 0
        yield self._batch(found, pictures, records)

    def _batch(self, found: SampleList, pictures: list[bytes], records: int) -> Batch:
        batch = found.batch()
        batch.records, batch.pictures = records, pictures
        return batch

    def _sample(self, record: Record | Skipped) -> tuple[list[np.ndarray], np.ndarray, list[bytes]]:
        """(ids per segment, SEGMENT[m], bytes per picture) of a record; ValueError or OSError if it is unusable."""
        if isinstance(record, Skipped):
            raise ValueError(record.reason)
        files = [read_picture(image) for image in record.images] if self.pictures else []
        if record.turns and self.template is None:
            raise ValueError("turns and no --template; expected one (see --help)")
        if record.turns:
            spans = self.template.spans(record.turns, self.tokenizer)
            pieces, segments = chat_segments(spans)
        else:
            pieces, segments = self._captions(record)
        return pieces, segments, files

    def _captions(self, record: Record) -> tuple[list[np.ndarray], np.ndarray]:
        """A text segment per caption, then a feature segment per picture; `variant` numbers both."""
        if not record.captions and not record.images:
            raise ValueError("no turns, no captions and no pictures")
        pieces = [np.array(self.tokenizer.encode(caption), dtype=np.int64) for caption in record.captions]
        captions, pictures = len(record.captions), len(record.images)
        segments = np.zeros(captions + pictures, dtype=SEGMENT)
        segments["modality"] = np.repeat([Modality.TEXT, Modality.FEATURE], [captions, pictures])
        segments["role"] = Role.INPUT
        segments["variant"] = np.concatenate([np.arange(captions), np.arange(pictures)]) % 256
        return [*pieces, *[np.zeros(0, dtype=np.int64)] * pictures], segments


def chat_segments(spans: Sequence[Span]) -> tuple[list[np.ndarray], np.ndarray]:
    """(ids per segment, SEGMENT[m]) of a conversation: text by role, a feature segment for every picture."""
    segments = np.zeros(len(spans), dtype=SEGMENT)
    segments["modality"] = [Modality.FEATURE if span.image else Modality.TEXT for span in spans]
    segments["role"] = [Role.INPUT if span.image else ROLES[span.role] for span in spans]
    return [np.array(span.ids, dtype=np.int64) for span in spans], segments


def read_picture(image: Path | bytes) -> bytes:
    """The bytes of a picture's file; ValueError where they are none (its pixels are not decoded)."""
    try:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
    except OSError as error:
        raise ValueError(f"{Path(image).name}: {error.strerror}") from None  # no path of this machine: see Build
    try:
        with Image.open(io.BytesIO(data)):
            return data
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        name = "" if isinstance(image, bytes) else f"{Path(image).name}: "
        raise ValueError(f"{name}not a picture: {len(data)} bytes that begin with {data[:8]!r}") from None


class Pictures:
    """The pictures of one shard, held in a file without a name until the shard is there to have a twin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = None
        self._sizes: list[np.ndarray] = []
        self._bytes = 0

    def __enter__(self) -> Pictures:
        self._file = tempfile.TemporaryFile(dir=self.folder)  # gone with the process, whatever ends it
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, segments: np.ndarray, pictures: Sequence[bytes]) -> None:
        """The pictures of further samples: one for each of their feature segments, or none at all."""
        sizes = np.zeros(len(segments), dtype=np.int64)
        if pictures:
            sizes[segments["modality"] == Modality.FEATURE] = [len(picture) for picture in pictures]
            for picture in pictures:
                self._file.write(picture)
        self._sizes.append(sizes)
        self._bytes += int(sizes.sum())

    def write(self, shard: Path) -> dict[str, dict]:
        """Make the twin of the shard, if there are pictures: `beside` of Build.make."""
        if not self._bytes:
            return {}
        self._file.seek(0)
        with BlobWriter(twin_path(shard, TWIN), shard, TWIN, producer="files") as writer:
            for sizes in self._sizes:
                writer.append(self._file.read(int(sizes.sum())), sizes)
        kind = {key: value for key, value in asdict(writer.meta).items() if key != "name"}
        return {TWIN: {**kind, "file": asdict(writer.info)}}


def _importer(kind: str) -> type[Records]:
    return type(f"Records_{kind}", (Records,), {"kind": kind, "__doc__": f"Records of the source {kind}."})


# What is called simplear among the importers are codes, not pictures.
RECORDS: dict[str, type[Records]] = {kind: _importer(kind) for kind in KINDS if kind != "simplear"}
