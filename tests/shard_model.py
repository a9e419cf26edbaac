"""Shards and twins the slow way: samples as plain Python, and readers written from the layout with struct alone."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from vtrain._host import crc32c, crc32c_blocks
from vtrain.data import format
from vtrain.data.format import SEGMENT, Footer, Kind, Modality, Schema, ShardInfo, read_pages
from vtrain.data.samples import pack_runs
from vtrain.data.writer import ShardWriter
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=40, visual=24)


@dataclass
class Sample:
    """segments: tuples in the order of SEGMENT; runs: (length, loss class) pairs; labels: one per id; or None."""

    key: int
    ids: list[int]
    segments: list[tuple] = field(default_factory=list)
    runs: list[tuple[int, int]] | None = None
    labels: list[int] | None = None
    columns: dict[str, float] = field(default_factory=dict)


def samples(vocab: Vocabulary, max_size: int = 8) -> st.SearchStrategy[list[Sample]]:
    """Lists of legal samples: empty ones, without segments, with empty segments, ids at the ends of their range."""
    span = st.tuples(st.sampled_from(["text", "visual"]), st.integers(0, 5), st.booleans(), st.integers(0, 255))
    one = st.tuples(
        st.integers(1, 2**64 - 1),
        st.one_of(st.integers(0, 9), st.lists(span, max_size=5)),
        st.booleans(),
        st.randoms(use_true_random=False),
    )
    return st.lists(one.map(lambda parts: _sample(vocab, *parts)), max_size=max_size)


def _sample(vocab: Vocabulary, key: int, pieces: int | list, with_runs: bool, rng: random.Random) -> Sample:
    ids: list[int] = []
    segments = []
    if isinstance(pieces, int):  # no segments: any ids of the vocabulary
        ids = [rng.choice([0, vocab.size - 1, rng.randrange(vocab.size)]) for _ in range(pieces)]
    else:
        for name, length, grid, byte in pieces:
            modality = Modality.TEXT if name == "text" else rng.choice([Modality.IMAGE, Modality.VIDEO])
            shape = (1, 1, length) if grid and modality != Modality.TEXT and length else (0, 0, 0)
            segments.append((len(ids), modality, byte % 6, byte, 0, *shape, byte * 257))
            r = vocab[name]
            ids += [rng.choice([r.base, r.end - 1, rng.randrange(r.base, r.end)]) for _ in range(length)]
    runs = None
    if with_runs:
        cut = rng.randint(0, len(ids))
        runs = [(cut, rng.randrange(256)), (len(ids) - cut, rng.randrange(256))]
    return Sample(key, ids, segments, runs)


def some_samples(count: int, seed: int = 0, vocab: Vocabulary = VOCAB) -> list[Sample]:
    """`count` samples of a caption, a 1 x 2 x 3 picture and loss runs; every fifth is empty or has no segments."""
    rng = random.Random(seed)
    found = []
    for n in range(count):
        caption, picture = ("text", rng.randint(1, 5), False, n % 256), ("visual", 6, True, 2)
        sample = _sample(vocab, rng.randrange(1, 2**64), n % 10 if n % 5 == 0 else [caption, picture], True, rng)
        if len(sample.segments) == 2:
            sample.segments[1] = (*sample.segments[1][:5], 1, 2, 3, 0)
        found.append(sample)
    return found


def dressed(found: list[Sample], schema: Schema, seed: int = 0) -> list[Sample]:
    """The same samples with the labels and columns that the schema asks for."""
    rng = random.Random(seed)

    def value(dtype: str) -> float:
        kind = np.dtype(dtype)
        if kind.kind == "f":
            return float(np.array(rng.uniform(-1e6, 1e6)).astype(kind))
        return rng.choice([int(np.iinfo(kind).min), int(np.iinfo(kind).max), rng.randrange(100)])

    last = schema.vocab.size - 1
    return [
        replace(
            sample,
            labels=[rng.choice([0, last, rng.randint(0, last)]) for _ in sample.ids] if schema.labels else None,
            columns={name: value(dtype) for name, dtype in schema.columns.items()},
        )
        for sample in found
    ]


def batch(found: list[Sample], with_runs: bool = True, schema: Schema | None = None) -> tuple[tuple, dict]:
    """The arguments of `append_batch`; with the labels and columns of a schema."""

    def cu(lengths):
        return np.cumsum([0, *lengths])

    ids = np.array([i for s in found for i in s.ids], dtype=np.int64)
    segments = np.array([g for s in found for g in s.segments], dtype=SEGMENT)
    options = {"keys": np.array([s.key for s in found], dtype=np.uint64)}
    if with_runs:
        runs = [r for s in found for r in s.runs or ()]
        options["runs"] = pack_runs([n for n, _ in runs], [c for _, c in runs])
        options["run_offsets"] = cu(len(s.runs or ()) for s in found)
    if schema and schema.labels:
        options["labels"] = np.array([i for s in found for i in s.labels], dtype=np.int64)
    if schema and schema.columns:
        options["columns"] = {
            name: np.array([s.columns[name] for s in found], dtype=dtype) for name, dtype in schema.columns.items()
        }
    return (ids, cu(len(s.ids) for s in found), segments, cu(len(s.segments) for s in found)), options


def write_shard(path: Path, schema: Schema, found: list[Sample], *, cuts: tuple[int, ...] = (), **options) -> ShardInfo:
    """A finished shard, appended in batches that end at `cuts`. Its uuid comes from its name."""
    options.setdefault("uuid", path.name.encode().ljust(16, b"\0")[:16])
    with_runs = any(s.runs is not None for s in found)
    with ShardWriter(path, schema, **options) as writer:
        for first, last in zip((0, *cuts), (*cuts, len(found))):
            arguments, keywords = batch(found[first:last], with_runs, schema)
            writer.append_batch(*arguments, **keywords)
    return writer.info


def _slow_sections(path: Path, kind: int) -> tuple[int, int, dict]:
    """(samples, tokens, section id -> (bytes, dtype code, items)) by struct alone, from the layout in format.py."""
    data = path.read_bytes()
    assert data[:8] == b"VTSHARD\0"
    assert struct.unpack_from("<I", data, 40) == (kind,)
    footer = data[-4096:]
    file_bytes, samples, tokens = struct.unpack_from("<QQQ", footer, 16)
    (n_sections,) = struct.unpack_from("<I", footer, 88)
    assert file_bytes == len(data)
    raw = {}
    for at in range(640, 640 + 48 * n_sections, 48):
        id, code, flags, crc, offset, size, items = struct.unpack_from("<16sHHIQQQ", footer, at)
        id = id.rstrip(b"\0").decode()
        assert flags == id.startswith("COL.")
        assert offset % 4096 == 0
        assert crc == crc32c(data[offset : offset + size])
        raw[id] = (data[offset : offset + size], code, items)
    assert list(raw)[-1] == "BCRC"
    return samples, tokens, raw


def _numbers(section: tuple) -> list:
    content, code, items = section
    return list(struct.unpack(f"<{items}{' BHIQiqfdeb'[code]}", content))


def _slow_ids(raw: dict, stream: str) -> list[int]:
    """The ids of TOK or LBL, whose high bits may stand in a plane."""
    ids = _numbers(raw[stream])
    for bits in (1, 2):
        if f"{stream}{bits}" in raw:
            plane = int.from_bytes(raw[f"{stream}{bits}"][0], "little")
            assert len(raw[f"{stream}{bits}"][0]) == -(-len(ids) * bits // 8)
            assert plane >> (len(ids) * bits) == 0
            ids = [low + ((plane >> (i * bits)) % 2**bits) * 2**16 for i, low in enumerate(ids)]
    return ids


def slow_read(path: Path) -> tuple[dict, list[Sample]]:
    """(schema JSON, samples) of a shard."""
    count, tokens, raw = _slow_sections(path, kind=0)
    ids, off, sego, keys = _slow_ids(raw, "TOK"), _numbers(raw["OFF"]), _numbers(raw["SEGO"]), _numbers(raw["KEY"])
    assert len(ids) == tokens
    segments = list(struct.iter_unpack("<IBBBBHHHH", raw["SEG"][0]))
    found = [Sample(keys[n], ids[off[n] : off[n + 1]], segments[sego[n] : sego[n + 1]], None) for n in range(count)]
    if "RUN" in raw:
        runs, runo = _numbers(raw["RUN"]), _numbers(raw["RUNO"])
        for n, sample in enumerate(found):
            sample.runs = [(r & 0xFFFFFF, r >> 24) for r in runs[runo[n] : runo[n + 1]]]
    if "LBL" in raw:
        labels = _slow_ids(raw, "LBL")
        for n, sample in enumerate(found):
            sample.labels = labels[off[n] : off[n + 1]]
    for id in (id for id in raw if id.startswith("COL.")):
        for sample, value in zip(found, _numbers(raw[id]), strict=True):
            sample.columns[id[4:]] = value
    return json.loads(raw["SCHEMA"][0]), found


def slow_read_twin(path: Path) -> tuple[dict, list]:
    """(META JSON, per segment its rows as lists of floats or its bytes)."""
    (kind,) = struct.unpack_from("<I", path.read_bytes(), 40)
    segments, total, raw = _slow_sections(path, kind)
    meta, offsets = json.loads(raw["META"][0]), _numbers(raw["ROWO"])
    assert len(offsets) == segments + 1
    assert offsets[-1] == total
    spans = list(pairwise(offsets))
    if kind == 2:
        return meta, [raw["BYTES"][0][a:b] for a, b in spans]
    values = _numbers(raw["ROW"])
    if meta["dtype"] == "bf16":
        values = [struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in values]
    rows = [values[n * meta["dim"] : (n + 1) * meta["dim"]] for n in range(total)]
    if meta["dtype"] == "i1":
        rows = [[step * scale for step in row] for row, scale in zip(rows, _numbers(raw["SCALE"]), strict=True)]
    return meta, [rows[a:b] for a, b in spans]


def rewrite_footer(path: Path, **changes) -> Footer:
    """Replace fields of a shard's or twin's footer (`sections` too) and give the page a right checksum again."""
    footer = replace(read_pages(path, *Kind)[0], **changes)
    with open(path, "r+b") as file:
        file.seek(-format.PAGE, 2)
        file.write(format.pack_footer(footer))
    return footer


def overwrite(path: Path, offset: int, data: bytes, *, checksums: bool = False) -> None:
    """Put bytes into a shard or twin; `checksums` makes blocks, sections and footer agree with them."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    if not checksums:
        return
    content = bytearray(path.read_bytes())
    footer, block = read_pages(path, *Kind)
    blocks = footer.sections["BCRC"]
    content[blocks.offset : blocks.offset + blocks.bytes] = crc32c_blocks(content[: blocks.offset], block).tobytes()
    path.write_bytes(content)
    sections = {id: replace(s, crc=crc32c(content[s.offset : s.offset + s.bytes])) for id, s in footer.sections.items()}
    rewrite_footer(path, sections=sections)
