"""What the numbers of a dataset mean: its vocabulary, its codes, its columns. Stored in every shard, equal in all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from functools import cached_property

import numpy as np

from vtrain.vocab import Vocabulary

DEFAULT_LOSS_WEIGHTS = (0.0,) + (1.0,) * 255  # class 0 is not scored
COLUMN_DTYPES = {name: np.dtype(name) for name in ("u1", "<u2", "<u4", "<u8", "<i4", "<i8", "<f4", "<f8")}
_NAME = re.compile(r"[a-z0-9_]{1,12}")  # of columns and twins: "COL." and a name fill the 16 bytes of a section's id


class Modality(IntEnum):
    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    LATENT = 3
    FEATURE = 4


class Role(IntEnum):
    INPUT = 0
    ADD = 1
    TARGET = 2
    USER = 3
    ASSISTANT = 4
    SYSTEM = 5


class SegmentFlag(IntFlag):
    MERGED = 1  # visual BPE: fewer tokens than t * h * w


def canonical_json(value: object) -> bytes:
    """The one spelling of a JSON value that is hashed and stored."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def check_name(name: str, what: str) -> str:
    """The name of a column or twin; ValueError unless it fits into section ids and file names."""
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"{what} {name!r}: expected a name of 1..12 of a-z, 0-9 and _")
    return name


@dataclass(frozen=True)
class Schema:
    """What the numbers of a dataset mean; equal in all its shards.

    specials: name -> global id. text_tokenizer, image_tokenizer: sha256, "" = none. image: how pictures were prepared,
    e.g. {"resolution": 256, "downscale": 16}. text: how captions were encoded, e.g. {"caption_space": True}: with a
    space before. loss_weights: float32 weight of each of the 256 loss classes. columns: name -> numpy dtype (a key of
    COLUMN_DTYPES) of a number that every sample has. labels: every token has a label of its own; else the label of a
    token is the next token of the sample.
    """

    vocab: Vocabulary
    specials: Mapping[str, int] = field(default_factory=dict)
    text_tokenizer: str = ""
    image_tokenizer: str = ""
    image: Mapping[str, object] = field(default_factory=dict)
    text: Mapping[str, object] = field(default_factory=dict)
    loss_weights: tuple[float, ...] = DEFAULT_LOSS_WEIGHTS
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: bool = False

    def __post_init__(self) -> None:
        weights = np.asarray(self.loss_weights, dtype=np.float32)
        if weights.shape != (256,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"schema: loss_weights: {weights.size} numbers; expected 256 finite ones >= 0")
        object.__setattr__(self, "loss_weights", tuple(weights.tolist()))
        for name, token in self.specials.items():
            if not 0 <= token < self.vocab.size:
                raise ValueError(f"schema: special {name!r} has id {token}; expected 0..{self.vocab.size - 1}")
        columns = {check_name(name, "schema: column"): _column_dtype(name, self.columns[name]) for name in self.columns}
        object.__setattr__(self, "columns", dict(sorted(columns.items())))

    def to_json(self) -> dict:
        value = {
            "vocab": self.vocab.to_json(),
            "specials": dict(self.specials),
            "text_tokenizer": self.text_tokenizer,
            "image_tokenizer": self.image_tokenizer,
            "image": dict(self.image),
            "modalities": [m.name.lower() for m in Modality],
            "roles": [r.name.lower() for r in Role],
            "segment_flags": {f.name.lower(): int(f) for f in SegmentFlag},
        }
        if self.text:
            value["text"] = dict(self.text)
        if self.loss_weights != DEFAULT_LOSS_WEIGHTS:
            value["loss_weights"] = list(self.loss_weights)
        if self.columns:
            value["columns"] = dict(self.columns)
        if self.labels:
            value["labels"] = True
        return value

    @classmethod
    def from_json(cls, value: object) -> Schema:
        """The inverse of `to_json`; ValueError for a missing or unknown key and for codes that mean something else."""
        try:
            schema = cls(
                vocab=Vocabulary.from_json(value["vocab"]),
                specials={str(name): int(token) for name, token in value["specials"].items()},
                text_tokenizer=str(value["text_tokenizer"]),
                image_tokenizer=str(value["image_tokenizer"]),
                image=dict(value["image"]),
                text=dict(value.get("text", {})),
                loss_weights=tuple(value.get("loss_weights", DEFAULT_LOSS_WEIGHTS)),
                columns=dict(value.get("columns", {})),
                labels=bool(value.get("labels", False)),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"schema: {type(error).__name__} {error}; expected the keys of a vtrain schema") from None
        ours = schema.to_json()
        for key in sorted(ours.keys() | value.keys()):
            if ours.get(key) != value.get(key):
                raise ValueError(f"schema: {key}: found {value.get(key)!r}, this version knows {ours.get(key)!r}")
        return schema

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def differences(self, other: Schema) -> list[str]:
        """`key: mine, other's` for every key that differs; empty when equal."""
        mine, theirs = self.to_json(), other.to_json()
        keys = sorted(mine.keys() | theirs.keys())
        return [f"{k}: {mine.get(k)!r} and {theirs.get(k)!r}" for k in keys if mine.get(k) != theirs.get(k)]

    @cached_property
    def id_spans(self) -> np.ndarray:
        """int64[2, modalities, 2]: `id_span` of plain and of merged segments."""
        return np.array([[self.id_span(m, merged) for m in Modality] for merged in (False, True)], dtype=np.int64)

    def id_span(self, modality: Modality, merged: bool = False) -> tuple[int, int]:
        """[low, high) of the ids that a segment may hold; (0, 0) where the vocabulary has no such range."""
        if modality == Modality.TEXT:
            names = ("text",)
        elif modality in (Modality.IMAGE, Modality.VIDEO):
            names = ("visual", "vbpe") if merged else ("visual",)
        else:
            return 0, self.vocab.size
        found = [self.vocab[name] for name in names if name in self.vocab]
        return (min(r.base for r in found), max(r.end for r in found)) if found else (0, 0)


def _column_dtype(name: str, dtype: object) -> str:
    """The key of COLUMN_DTYPES that spells `dtype`."""
    for spelling, known in COLUMN_DTYPES.items():
        if dtype == spelling or (isinstance(dtype, (type, np.dtype)) and np.dtype(dtype) == known):
            return spelling
    raise ValueError(f"schema: column {name!r} has dtype {dtype!r}; expected one of {', '.join(COLUMN_DTYPES)}")
