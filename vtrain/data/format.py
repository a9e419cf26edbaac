"""The layout of a token shard `*.vts`, and what a legal sample is. Little endian, immutable, every byte checksummed.

    header page | TOK | OFF | SEG | SEGO | [RUN | RUNO] | KEY | SCHEMA | BCRC | footer page

Pages are 4096 bytes and end in the crc32c of the rest of the page. Sections start on a page and are followed by at
least 64 zero bytes (so that readers may over-read), zeros up to the next page. What is unknown when writing starts
stands in the footer: the section table, counts and extremes. N samples, T tokens, M segments, R loss runs:

    TOK    u8|u16|u32[T]  ids of the one vocabulary that the schema names
    OFF    u32[N+1]       first token of each sample          SEG   SEGMENT[M], SEGO u32[N+1]: pieces of the samples
    RUN    u32[R]         loss runs: length | class << 24     RUNO  u32[N+1]; both absent = every token has weight 1
    KEY    u64[N]         sample keys, never 0                SCHEMA JSON text
    BCRC   u32            crc32c of every block (1 MiB) of all bytes before BCRC, header included

Versioning is by section: readers refuse a higher major and unknown sections that are not flagged optional.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from functools import cached_property
from pathlib import Path

import numpy as np

from vtrain._host import crc32c
from vtrain.vocab import Vocabulary

PAGE = 4096
SPARE = 64  # zero bytes after a section at the least
BLOCK_LOG2 = 20
MAJOR, MINOR = 1, 0
HEAD_MAGIC = b"VTSHARD\0"
TAIL_MAGIC = b"VTSTAIL\0"
ENDIAN_MARK = 0x01020304
MAX_ROWS = 2**32 - 1  # tokens, samples, segments, loss runs of a shard: offsets are u32
MAX_SAMPLE = 2**31 - 1  # of a sample: lengths are int32 in batches
RUN_LENGTH_BITS = 24
MAX_RUN = 2**RUN_LENGTH_BITS - 1


class ShardError(ValueError):
    """A shard or manifest that cannot be used: one line with file, section, what was found, what was expected."""


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


class SectionFlag(IntFlag):
    OPTIONAL = 1  # a reader that does not know the section may ignore it


# A piece of a sample. start: its first token, counted in the sample; it ends where the next segment starts. The
# segments of a sample tile it. t, h, w: the grid of an image or a video, t * h * w == tokens, or all 0.
SEGMENT = np.dtype(
    [
        ("start", "<u4"),
        ("modality", "u1"),
        ("role", "u1"),
        ("variant", "u1"),
        ("flags", "u1"),
        ("t", "<u2"),
        ("h", "<u2"),
        ("w", "<u2"),
        ("codebook", "<u2"),
    ]
)
# What readers return: the same and the number of tokens.
SEGMENT_SPAN = np.dtype([*((name, SEGMENT[name]) for name in SEGMENT.names), ("length", "<i4")])

SECTION = np.dtype(
    [
        ("id", "S16"),
        ("dtype", "<u2"),
        ("flags", "<u2"),
        ("crc", "<u4"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
        ("count", "<u8"),
    ]
)
DTYPES = {1: np.dtype("u1"), 2: np.dtype("<u2"), 3: np.dtype("<u4"), 4: np.dtype("<u8"), 16: SEGMENT}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
ID_DTYPES = (DTYPES[1], DTYPES[2], DTYPES[3])
# Sections that this version knows, and the dtypes each may have.
KNOWN = {
    "TOK": ID_DTYPES,
    "OFF": (DTYPES[3],),
    "SEG": (SEGMENT,),
    "SEGO": (DTYPES[3],),
    "RUN": (DTYPES[3],),
    "RUNO": (DTYPES[3],),
    "KEY": (DTYPES[4],),
    "SCHEMA": (DTYPES[1],),
    "BCRC": (DTYPES[3],),
}
REQUIRED = ("TOK", "OFF", "SEG", "SEGO", "KEY", "SCHEMA", "BCRC")

# Lower edges of the 64 length bins: 0, 1, 2, 3, 4, 6, 8, 12, 16, ... two per octave up to 2**32.
LENGTH_EDGES = np.array([0, 1] + [edge for k in range(1, 32) for edge in (2**k, 3 * 2 ** (k - 1))], dtype=np.int64)

DEFAULT_LOSS_WEIGHTS = (0.0,) + (1.0,) * 255  # class 0 is not scored

_HEADER = struct.Struct("<8sHHI16sII")
_FOOTER = struct.Struct("<16sQQQIIII32sI")
_FOOTER_HISTOGRAM = 128
_FOOTER_SECTIONS = _FOOTER_HISTOGRAM + 8 * len(LENGTH_EDGES)
_PAGE_CRC = PAGE - 4
_TAIL_MAGIC = _PAGE_CRC - len(TAIL_MAGIC)
MAX_SECTIONS = (_TAIL_MAGIC - _FOOTER_SECTIONS) // SECTION.itemsize


def canonical_json(value: object) -> bytes:
    """The one spelling of a JSON value that is hashed and stored."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Schema:
    """What the numbers of a dataset mean; equal in all its shards.

    specials: name -> global id. text_tokenizer, image_tokenizer: sha256, "" = none. image: how pictures were prepared,
    e.g. {"resolution": 256, "downscale": 16}. loss_weights: float32 weight of each of the 256 loss classes.
    """

    vocab: Vocabulary
    specials: Mapping[str, int] = field(default_factory=dict)
    text_tokenizer: str = ""
    image_tokenizer: str = ""
    image: Mapping[str, object] = field(default_factory=dict)
    loss_weights: tuple[float, ...] = DEFAULT_LOSS_WEIGHTS

    def __post_init__(self) -> None:
        weights = np.asarray(self.loss_weights, dtype=np.float32)
        if weights.shape != (256,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError(f"schema: loss_weights: {weights.size} numbers; expected 256 finite ones >= 0")
        object.__setattr__(self, "loss_weights", tuple(weights.tolist()))
        for name, token in self.specials.items():
            if not 0 <= token < self.vocab.size:
                raise ValueError(f"schema: special {name!r} has id {token}; expected 0..{self.vocab.size - 1}")

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
        if self.loss_weights != DEFAULT_LOSS_WEIGHTS:
            value["loss_weights"] = list(self.loss_weights)
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
                loss_weights=tuple(value.get("loss_weights", DEFAULT_LOSS_WEIGHTS)),
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


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard as manifests list it. file: name in the dataset's folder; uuid: hex; bytes: size of the file."""

    file: str
    uuid: str
    samples: int
    tokens: int
    bytes: int
    footer_crc: int


@dataclass(frozen=True)
class Section:
    id: str
    dtype: np.dtype | None  # None: a code that this version does not know (optional sections only)
    flags: int
    crc: int
    offset: int
    bytes: int
    count: int


@dataclass(frozen=True)
class Footer:
    """All that a reader must know before it touches the data. Extremes are 0 where there is nothing to measure."""

    uuid: bytes
    file_bytes: int
    samples: int
    tokens: int
    min_id: int
    max_id: int
    min_length: int
    max_length: int
    schema_hash: str
    histogram: np.ndarray  # u64[64], samples per length bin (LENGTH_EDGES)
    sections: dict[str, Section]
    crc: int = 0


def padded(end: int) -> int:
    """The page on which the section after one that ends at byte `end` starts."""
    return -(-(end + SPARE) // PAGE) * PAGE


def _seal(page: bytearray) -> bytes:
    struct.pack_into("<I", page, _PAGE_CRC, crc32c(memoryview(page)[:_PAGE_CRC]))
    return bytes(page)


def _page_crc(page: bytes, name: str, what: str) -> int:
    (stored,) = struct.unpack_from("<I", page, _PAGE_CRC)
    found = crc32c(memoryview(page)[:_PAGE_CRC])
    if stored != found:
        raise ShardError(f"{name}: {what}: crc32c {found:08x}, the page says {stored:08x}")
    return stored


def pack_header(uuid: bytes) -> bytes:
    page = bytearray(PAGE)
    _HEADER.pack_into(page, 0, HEAD_MAGIC, MAJOR, MINOR, ENDIAN_MARK, uuid, BLOCK_LOG2, 0)
    return _seal(page)


def unpack_header(page: bytes, name: str) -> tuple[bytes, int]:
    """(uuid, block size in bytes) of a header page; ShardError tells what is wrong with it."""
    magic, major, _minor, endian, uuid, block_log2, flags = _HEADER.unpack_from(page)
    if magic != HEAD_MAGIC:
        raise ShardError(f"{name}: header: starts with {magic!r}, expected {HEAD_MAGIC!r}: not a token shard")
    if major != MAJOR:
        raise ShardError(f"{name}: header: format version {major}, this program reads {MAJOR}")
    _page_crc(page, name, "header")
    if endian != ENDIAN_MARK or flags or not 12 <= block_log2 <= 30:
        raise ShardError(
            f"{name}: header: endian mark {endian:#x}, flags {flags:#x}, block 2**{block_log2}; "
            f"expected {ENDIAN_MARK:#x}, 0, 2**12..2**30"
        )
    return uuid, 1 << block_log2


def pack_footer(footer: Footer) -> bytes:
    page = bytearray(PAGE)
    _FOOTER.pack_into(
        page,
        0,
        footer.uuid,
        footer.file_bytes,
        footer.samples,
        footer.tokens,
        footer.min_id,
        footer.max_id,
        footer.min_length,
        footer.max_length,
        bytes.fromhex(footer.schema_hash),
        len(footer.sections),
    )
    histogram = footer.histogram.astype("<u8").tobytes()
    page[_FOOTER_HISTOGRAM : _FOOTER_HISTOGRAM + len(histogram)] = histogram
    table = np.array(
        [(s.id, DTYPE_CODES[s.dtype], s.flags, s.crc, s.offset, s.bytes, s.count) for s in footer.sections.values()],
        dtype=SECTION,
    ).tobytes()
    page[_FOOTER_SECTIONS : _FOOTER_SECTIONS + len(table)] = table
    page[_TAIL_MAGIC:_PAGE_CRC] = TAIL_MAGIC
    return _seal(page)


def unpack_footer(page: bytes, name: str, file_bytes: int) -> Footer:
    """The footer of a file of `file_bytes` bytes, with a section table whose every entry lies inside the file."""
    if page[_TAIL_MAGIC:_PAGE_CRC] != TAIL_MAGIC:
        raise ShardError(
            f"{name}: footer: ends with {page[_TAIL_MAGIC:_PAGE_CRC]!r}, expected {TAIL_MAGIC!r}: the file is cut off"
        )
    crc = _page_crc(page, name, "footer")
    uuid, size, samples, tokens, min_id, max_id, min_length, max_length, schema_hash, count = _FOOTER.unpack_from(page)
    if size != file_bytes:
        raise ShardError(f"{name}: footer: written for a file of {size} bytes, this one has {file_bytes}")
    if count > MAX_SECTIONS:
        raise ShardError(f"{name}: footer: {count} sections, the table holds {MAX_SECTIONS}")
    if tokens > MAX_ROWS or samples > MAX_ROWS:
        raise ShardError(f"{name}: footer: {samples} samples, {tokens} tokens; a shard holds at most {MAX_ROWS}")
    table = np.frombuffer(page, SECTION, count, _FOOTER_SECTIONS)
    footer = Footer(
        uuid=uuid,
        file_bytes=size,
        samples=samples,
        tokens=tokens,
        min_id=min_id,
        max_id=max_id,
        min_length=min_length,
        max_length=max_length,
        schema_hash=schema_hash.hex(),
        histogram=np.frombuffer(page, "<u8", len(LENGTH_EDGES), _FOOTER_HISTOGRAM),
        sections=_sections(table, name, file_bytes - PAGE),
        crc=crc,
    )
    _check_counts(footer, name)
    return footer


def _sections(table: np.ndarray, name: str, footer_offset: int) -> dict[str, Section]:
    sections: dict[str, Section] = {}
    free = PAGE  # the first byte that no section has taken
    for raw_id, code, flags, crc, offset, size, count in table.tolist():
        id = raw_id.decode("ascii", "replace")
        dtype = DTYPES.get(code)
        optional = bool(flags & SectionFlag.OPTIONAL)
        if id in sections:
            raise ShardError(f"{name}: footer: section {id} stands twice in the table")
        if id not in KNOWN and not optional:
            raise ShardError(f"{name}: section {id}: unknown to this version of vtrain and not optional")
        if id in KNOWN and dtype not in KNOWN[id]:
            raise ShardError(f"{name}: section {id}: dtype code {code}; expected {_codes(KNOWN[id])}")
        if offset % PAGE or offset < free or offset + size + SPARE > footer_offset:
            raise ShardError(
                f"{name}: section {id}: bytes {offset}..{offset + size}; expected a page boundary >= {free} "
                f"and {SPARE} spare bytes before the footer at {footer_offset}"
            )
        if dtype is not None and size != count * dtype.itemsize:
            raise ShardError(f"{name}: section {id}: {size} bytes for {count} items of {dtype.itemsize}")
        sections[id] = Section(id, dtype, flags, crc, offset, size, count)
        free = padded(offset + size)
    return sections


def _codes(dtypes: tuple[np.dtype, ...]) -> str:
    return " or ".join(str(DTYPE_CODES[dtype]) for dtype in dtypes)


def _check_counts(footer: Footer, name: str) -> None:
    sections = footer.sections
    missing = [id for id in REQUIRED if id not in sections]
    if missing or ("RUN" in sections) != ("RUNO" in sections):
        raise ShardError(f"{name}: footer: no section {', '.join(missing) or 'RUN or RUNO'}")
    expected = {"TOK": footer.tokens, "KEY": footer.samples}
    expected |= dict.fromkeys(("OFF", "SEGO", "RUNO"), footer.samples + 1)
    for id, count in expected.items():
        if id in sections and sections[id].count != count:
            raise ShardError(f"{name}: section {id}: {sections[id].count} items, expected {count}")
    last = list(sections)[-1]
    if last != "BCRC":
        raise ShardError(f"{name}: footer: section {last} stands last, expected BCRC: nothing may follow its checksums")


def read_pages(path: Path | str) -> tuple[Footer, int]:
    """(footer, block size) of a shard after all checks that need only its two pages: microseconds."""
    path = Path(path)
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, 2)
        if size < 2 * PAGE or size % PAGE:
            raise ShardError(f"{path}: file: {size} bytes; expected whole pages of {PAGE}: empty or cut off")
        file.seek(0)
        head = file.read(PAGE)
        file.seek(size - PAGE)
        tail = file.read(PAGE)
    uuid, block = unpack_header(head, str(path))
    footer = unpack_footer(tail, str(path), size)
    if footer.uuid != uuid:
        raise ShardError(f"{path}: footer: uuid {footer.uuid.hex()}, the header has {uuid.hex()}")
    blocks = -(-footer.sections["BCRC"].offset // block)
    if footer.sections["BCRC"].count != blocks:
        raise ShardError(f"{path}: section BCRC: {footer.sections['BCRC'].count} checksums, expected {blocks}")
    return footer, block


def shard_info(path: Path | str) -> ShardInfo:
    """What a manifest lists, read from a finished shard (to adopt one that a killed job left)."""
    footer, _ = read_pages(path)
    return ShardInfo(
        file=Path(path).name,
        uuid=footer.uuid.hex(),
        samples=footer.samples,
        tokens=footer.tokens,
        bytes=footer.file_bytes,
        footer_crc=footer.crc,
    )


def id_dtype_for(vocab_size: int) -> np.dtype:
    """The smallest stored dtype that holds the ids 0..vocab_size-1."""
    return next(dtype for dtype in ID_DTYPES if vocab_size <= np.iinfo(dtype).max + 1)
