"""The layout of a token shard `*.vts` and of its twins `*.vtf`. Little endian, immutable, every byte checksummed.

    header page | sections, each from a page on | footer page

Pages are 4096 bytes and end in the crc32c of the rest of the page. A section is followed by at least 64 zero bytes (so
that readers may over-read), zeros up to the next page. What is unknown when writing starts stands in the footer: the
section table, counts and extremes. The last section is BCRC: u32 crc32c of every block (1 MiB) of all bytes before it,
header included. A shard of N samples, T tokens, M segments, R loss runs has, in this order:

    TOK    u8|u16|u32[T]  ids of the one vocabulary that the schema names; with TOK1 or TOK2 only their low 16 bits
    TOK1   u8[ceil(T/8)]  bit 16 of the id of token i: bit i % 8 of byte i / 8              (store "u16+1")
    TOK2   u8[ceil(T/4)]  bits 16 and 17 of the id of token i: bits 2 * (i % 4) of byte i / 4 and above ("u16+2")
    LBL    like TOK       what the model is to predict at each token (LBL1, LBL2 like TOK1, TOK2); absent = the next id
    OFF    u32[N+1]       first token of each sample          SEG   SEGMENT[M], SEGO u32[N+1]: pieces of the samples
    RUN    u32[R]         loss runs: length | class << 24     RUNO  u32[N+1]; both absent = every token has weight 1
    KEY    u64[N]         sample keys, never 0                COL.x any[N]  the column x of the schema
    SCHEMA u8             canonical JSON of the schema

A twin adds rows or bytes to the segments of one shard, whose uuid it has (see twins.py):

    ROW    any[R*dim]     R rows of features, or BYTES u8[B]  ROWO  u64[M+1]  first row or byte of each segment
    SCALE  f4[R]          only of rows of i1                  META  u8  canonical JSON of the twin's name, dtype, ...

Versioning is by section: readers refuse a higher major and unknown sections that are not flagged optional.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import lru_cache
from pathlib import Path

import numpy as np

from vtrain._host import crc32c
from vtrain.data.schema import COLUMN_DTYPES as COLUMN_DTYPES
from vtrain.data.schema import Modality as Modality
from vtrain.data.schema import Role as Role
from vtrain.data.schema import Schema as Schema
from vtrain.data.schema import SegmentFlag as SegmentFlag
from vtrain.data.schema import canonical_json as canonical_json

PAGE = 4096
SPARE = 64  # zero bytes after a section at the least
BLOCK_LOG2 = 20
MAJOR, MINOR = 1, 1
HEAD_MAGIC = b"VTSHARD\0"
TAIL_MAGIC = b"VTSTAIL\0"
ENDIAN_MARK = 0x01020304
MAX_ROWS = 2**32 - 1  # tokens, samples, segments, loss runs of a shard: offsets are u32
MAX_SAMPLE = 2**31 - 1  # of a sample: lengths are int32 in batches
RUN_LENGTH_BITS = 24
MAX_RUN = 2**RUN_LENGTH_BITS - 1


class ShardError(ValueError):
    """A shard or manifest that cannot be used: one line with file, section, what was found, what was expected."""


class Kind(IntEnum):
    """What a file is, as its header says."""

    SHARD = 0
    FEATURES = 1
    BLOBS = 2


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
DTYPES = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    3: np.dtype("<u4"),
    4: np.dtype("<u8"),
    5: np.dtype("<i4"),
    6: np.dtype("<i8"),
    7: np.dtype("<f4"),
    8: np.dtype("<f8"),
    9: np.dtype("<f2"),
    10: np.dtype("i1"),
    16: SEGMENT,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Store:
    """How ids are stored: the section of `dtype`, and a section of `plane` high bits per id where plane > 0."""

    name: str
    dtype: np.dtype
    plane: int = 0

    @property
    def capacity(self) -> int:
        """The largest vocabulary whose ids fit."""
        return 1 << (8 * self.dtype.itemsize + self.plane)

    def plane_bytes(self, tokens: int) -> int:
        return -(-tokens * self.plane // 8)


# From the smallest to the largest.
STORES = {
    store.name: store
    for store in (
        Store("u8", DTYPES[1]),
        Store("u16", DTYPES[2]),
        Store("u16+1", DTYPES[2], 1),
        Store("u16+2", DTYPES[2], 2),
        Store("u32", DTYPES[3]),
    )
}
_ID_DTYPES = (DTYPES[1], DTYPES[2], DTYPES[3])
_STREAM = {"": _ID_DTYPES, "1": (DTYPES[1],), "2": (DTYPES[1],)}  # of TOK and LBL, by what is added to the name
# Sections that this version knows, and the dtypes each may have; "COL." stands for COL.<name>.
KNOWN = {
    Kind.SHARD: {
        **{stream + plane: dtypes for stream in ("TOK", "LBL") for plane, dtypes in _STREAM.items()},
        "OFF": (DTYPES[3],),
        "SEG": (SEGMENT,),
        "SEGO": (DTYPES[3],),
        "RUN": (DTYPES[3],),
        "RUNO": (DTYPES[3],),
        "KEY": (DTYPES[4],),
        "COL.": tuple(COLUMN_DTYPES.values()),
        "SCHEMA": (DTYPES[1],),
        "BCRC": (DTYPES[3],),
    },
    Kind.FEATURES: {
        "ROW": (DTYPES[2], DTYPES[7], DTYPES[9], DTYPES[10]),
        "ROWO": (DTYPES[4],),
        "SCALE": (DTYPES[7],),
        "META": (DTYPES[1],),
        "BCRC": (DTYPES[3],),
    },
    Kind.BLOBS: {"BYTES": (DTYPES[1],), "ROWO": (DTYPES[4],), "META": (DTYPES[1],), "BCRC": (DTYPES[3],)},
}
REQUIRED = {
    Kind.SHARD: ("TOK", "OFF", "SEG", "SEGO", "KEY", "SCHEMA", "BCRC"),
    Kind.FEATURES: ("ROW", "ROWO", "META", "BCRC"),
    Kind.BLOBS: ("BYTES", "ROWO", "META", "BCRC"),
}

# Lower edges of the 64 length bins: 0, 1, 2, 3, 4, 6, 8, 12, 16, ... two per octave up to 2**32.
LENGTH_EDGES = np.array([0, 1] + [edge for k in range(1, 32) for edge in (2**k, 3 * 2 ** (k - 1))], dtype=np.int64)

_HEADER = struct.Struct("<8sHHI16sIII")
_FOOTER = struct.Struct("<16sQQQIIII32sI")
_FOOTER_HISTOGRAM = 128
_FOOTER_SECTIONS = _FOOTER_HISTOGRAM + 8 * len(LENGTH_EDGES)
_PAGE_CRC = PAGE - 4
_TAIL_MAGIC = _PAGE_CRC - len(TAIL_MAGIC)
MAX_SECTIONS = (_TAIL_MAGIC - _FOOTER_SECTIONS) // SECTION.itemsize


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard as manifests list it. file: name in the dataset's folder; uuid: hex; bytes: size of the file."""

    file: str
    uuid: str
    samples: int
    tokens: int
    bytes: int
    footer_crc: int

    @classmethod
    def of(cls, file: str, footer: Footer) -> ShardInfo:
        return cls(file, footer.uuid.hex(), footer.samples, footer.tokens, footer.file_bytes, footer.crc)


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
    """All that a reader must know before it touches the data. Extremes are 0 where there is nothing to measure.

    Ids: those of tokens and labels. Of a twin `samples` are its segments, `tokens` its rows or bytes, lengths those of
    its segments; schema_hash is the sha256 of META.
    """

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
    kind: Kind = Kind.SHARD

    @property
    def store(self) -> Store:
        """How this shard stores its ids (and labels)."""
        return store_of(self.sections, "TOK")


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


def pack_header(uuid: bytes, kind: Kind = Kind.SHARD) -> bytes:
    page = bytearray(PAGE)
    _HEADER.pack_into(page, 0, HEAD_MAGIC, MAJOR, MINOR, ENDIAN_MARK, uuid, BLOCK_LOG2, 0, kind)
    return _seal(page)


def unpack_header(page: bytes, name: str) -> tuple[bytes, int, int]:
    """(uuid, block size in bytes, kind) of a header page; ShardError tells what is wrong with it."""
    magic, major, _minor, endian, uuid, block_log2, flags, kind = _HEADER.unpack_from(page)
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
    return uuid, 1 << block_log2, kind


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


def unpack_footer(page: bytes, name: str, file_bytes: int, kind: Kind = Kind.SHARD) -> Footer:
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
    if samples > MAX_ROWS or (tokens > MAX_ROWS and kind == Kind.SHARD):
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
        sections=_sections(table, name, file_bytes - PAGE, kind),
        crc=crc,
        kind=kind,
    )
    _check_presence(footer, name)
    _check_counts(footer, name)
    return footer


def _sections(table: np.ndarray, name: str, footer_offset: int, kind: Kind) -> dict[str, Section]:
    sections: dict[str, Section] = {}
    free = PAGE  # the first byte that no section has taken
    for raw_id, code, flags, crc, offset, size, count in table.tolist():
        id, dtype, problem = _section_kind(kind, raw_id, code, flags)
        if id in sections:
            raise ShardError(f"{name}: footer: section {id} stands twice in the table")
        if problem:
            raise ShardError(f"{name}: section {id}: {problem}")
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


@lru_cache(maxsize=256)  # the same few in every shard of a dataset
def _section_kind(kind: Kind, raw_id: bytes, code: int, flags: int) -> tuple[str, np.dtype | None, str]:
    """(id, dtype, what is wrong or "") of a row of the section table."""
    id, dtype = raw_id.decode("ascii", "replace"), DTYPES.get(code)
    expected = KNOWN[kind].get("COL." if id.startswith("COL.") else id)
    if expected is None and not flags & SectionFlag.OPTIONAL:
        return id, dtype, "unknown to this version of vtrain and not optional"
    if expected is not None and dtype not in expected:
        return id, dtype, f"dtype code {code}; expected {_codes(expected)}"
    return id, dtype, ""


def _codes(dtypes: tuple[np.dtype, ...]) -> str:
    return " or ".join(str(DTYPE_CODES[dtype]) for dtype in dtypes)


def _check_presence(footer: Footer, name: str) -> None:
    sections = footer.sections
    missing = [id for id in REQUIRED[footer.kind] if id not in sections]
    if ("RUN" in sections) != ("RUNO" in sections):
        missing.append("RUN or RUNO")
    if missing:
        raise ShardError(f"{name}: footer: no section {', '.join(missing)}")
    last = list(sections)[-1]
    if last != "BCRC":
        raise ShardError(f"{name}: footer: section {last} stands last, expected BCRC: nothing may follow its checksums")
    if footer.kind == Kind.SHARD:
        _check_stores(sections, name)
    if footer.kind == Kind.FEATURES and ("SCALE" in sections) != (sections["ROW"].dtype == DTYPES[10]):
        raise ShardError(f"{name}: section SCALE: expected with rows of dtype code 10 and with no others")


def _check_stores(sections: dict[str, Section], name: str) -> None:
    for stream in ("TOK", "LBL"):
        planes = [id for id in (f"{stream}1", f"{stream}2") if id in sections]
        if planes and (len(planes) > 1 or stream not in sections or sections[stream].dtype != DTYPES[2]):
            raise ShardError(f"{name}: section {planes[-1]}: expected one plane, beside {stream} of dtype code 2")
    if "LBL" in sections and store_of(sections, "LBL") != store_of(sections, "TOK"):
        raise ShardError(
            f"{name}: section LBL: stored as {store_of(sections, 'LBL').name}; "
            f"expected {store_of(sections, 'TOK').name} as TOK"
        )


def _check_counts(footer: Footer, name: str) -> None:
    samples, tokens, sections = footer.samples, footer.tokens, footer.sections
    if footer.kind == Kind.SHARD:
        expected = dict.fromkeys(("TOK", "LBL"), tokens) | dict.fromkeys(("OFF", "SEGO", "RUNO"), samples + 1)
        expected |= dict.fromkeys(("TOK1", "TOK2", "LBL1", "LBL2"), footer.store.plane_bytes(tokens))
        expected |= {id: samples for id in sections if id == "KEY" or id.startswith("COL.")}
    else:
        expected = {"ROWO": samples + 1, "BYTES": tokens, "SCALE": tokens}
    for id, count in expected.items():
        if id in sections and sections[id].count != count:
            raise ShardError(f"{name}: section {id}: {sections[id].count} items, expected {count}")
    if footer.kind == Kind.FEATURES:
        items = sections["ROW"].count
        if items % tokens if tokens else items:
            raise ShardError(f"{name}: section ROW: {items} items, expected a multiple of {tokens}")


def store_of(sections: dict[str, Section], stream: str) -> Store:
    """How the ids of TOK or LBL are stored."""
    plane = next((bits for bits in (1, 2) if f"{stream}{bits}" in sections), 0)
    return next(s for s in STORES.values() if (s.dtype, s.plane) == (sections[stream].dtype, plane))


def read_pages(path: Path | str, *kinds: Kind) -> tuple[Footer, int]:
    """(footer, block size) of a shard after all checks that need only its two pages: microseconds.

    kinds: what the file may be, no kind = a shard.
    """
    path = str(path)
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, 2)
        if size < 2 * PAGE or size % PAGE:
            raise ShardError(f"{path}: file: {size} bytes; expected whole pages of {PAGE}: empty or cut off")
        head, tail = os.pread(file.fileno(), PAGE, 0), os.pread(file.fileno(), PAGE, size - PAGE)
    uuid, block, kind = unpack_header(head, path)
    if kind not in (kinds or (Kind.SHARD,)):
        found = Kind(kind).name.lower() if kind in set(Kind) else kind
        expected = " or ".join(k.name.lower() for k in kinds or (Kind.SHARD,))
        raise ShardError(f"{path}: header: a file of kind {found}; expected {expected}")
    footer = unpack_footer(tail, path, size, Kind(kind))
    if footer.uuid != uuid:
        raise ShardError(f"{path}: footer: uuid {footer.uuid.hex()}, the header has {uuid.hex()}")
    blocks = -(-footer.sections["BCRC"].offset // block)
    if footer.sections["BCRC"].count != blocks:
        raise ShardError(f"{path}: section BCRC: {footer.sections['BCRC'].count} checksums, expected {blocks}")
    return footer, block


def shard_info(path: Path | str) -> ShardInfo:
    """What a manifest lists, read from a finished shard (to adopt one that a killed job left)."""
    return ShardInfo.of(Path(path).name, read_pages(path)[0])


def store_for(vocab_size: int) -> Store:
    """The smallest store that holds the ids 0..vocab_size-1."""
    return next(store for store in STORES.values() if vocab_size <= store.capacity)
