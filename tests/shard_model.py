"""Token shards the slow way: samples as plain Python, and a reader written from the layout with struct alone."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from vtrain._host import crc32c, crc32c_blocks
from vtrain.data import format
from vtrain.data.format import SEGMENT, Footer, Modality, Schema, ShardInfo, read_pages
from vtrain.data.samples import pack_runs
from vtrain.data.writer import ShardWriter
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=40, visual=24)


@dataclass
class Sample:
    """segments: tuples in the order of SEGMENT; runs: (length, loss class) pairs or None."""

    key: int
    ids: list[int]
    segments: list[tuple] = field(default_factory=list)
    runs: list[tuple[int, int]] | None = None


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


def batch(found: list[Sample], with_runs: bool = True) -> tuple[tuple, dict]:
    """The arguments of `append_batch`."""

    def cu(lengths):
        return np.cumsum([0, *lengths])

    ids = np.array([i for s in found for i in s.ids], dtype=np.int64)
    segments = np.array([g for s in found for g in s.segments], dtype=SEGMENT)
    options = {"keys": np.array([s.key for s in found], dtype=np.uint64)}
    if with_runs:
        runs = [r for s in found for r in s.runs or ()]
        options["runs"] = pack_runs([n for n, _ in runs], [c for _, c in runs])
        options["run_offsets"] = cu(len(s.runs or ()) for s in found)
    return (ids, cu(len(s.ids) for s in found), segments, cu(len(s.segments) for s in found)), options


def write_shard(path: Path, schema: Schema, found: list[Sample], *, cuts: tuple[int, ...] = (), **options) -> ShardInfo:
    """A finished shard, appended in batches that end at `cuts`. Its uuid comes from its name."""
    options.setdefault("uuid", path.name.encode().ljust(16, b"\0")[:16])
    with_runs = any(s.runs is not None for s in found)
    with ShardWriter(path, schema, **options) as writer:
        for first, last in zip((0, *cuts), (*cuts, len(found))):
            arguments, keywords = batch(found[first:last], with_runs)
            writer.append_batch(*arguments, **keywords)
    return writer.info


def slow_read(path: Path) -> tuple[dict, list[Sample]]:
    """(schema JSON, samples) by struct alone, from the layout in vtrain/data/format.py."""
    data = path.read_bytes()
    assert data[:8] == b"VTSHARD\0"
    footer = data[-4096:]
    file_bytes, count, tokens = struct.unpack_from("<QQQ", footer, 16)
    (n_sections,) = struct.unpack_from("<I", footer, 88)
    assert file_bytes == len(data)
    raw = {}
    for at in range(640, 640 + 48 * n_sections, 48):
        id, code, flags, crc, offset, size, items = struct.unpack_from("<16sHHIQQQ", footer, at)
        assert flags == 0
        assert offset % 4096 == 0
        assert crc == crc32c(data[offset : offset + size])
        raw[id.rstrip(b"\0").decode()] = (data[offset : offset + size], code, items)

    def numbers(id: str) -> list[int]:
        content, code, items = raw[id]
        return list(struct.unpack(f"<{items}{' BHIQ'[code]}", content))

    ids, off, sego, keys = numbers("TOK"), numbers("OFF"), numbers("SEGO"), numbers("KEY")
    assert len(ids) == tokens
    segments = list(struct.iter_unpack("<IBBBBHHHH", raw["SEG"][0]))
    found = [Sample(keys[n], ids[off[n] : off[n + 1]], segments[sego[n] : sego[n + 1]], None) for n in range(count)]
    if "RUN" in raw:
        runs, runo = numbers("RUN"), numbers("RUNO")
        for n, sample in enumerate(found):
            sample.runs = [(r & 0xFFFFFF, r >> 24) for r in runs[runo[n] : runo[n + 1]]]
    return json.loads(raw["SCHEMA"][0]), found


def rewrite_footer(path: Path, **changes) -> Footer:
    """Replace fields of a shard's footer (`sections` included) and give the page a right checksum again."""
    footer = replace(read_pages(path)[0], **changes)
    with open(path, "r+b") as file:
        file.seek(-format.PAGE, 2)
        file.write(format.pack_footer(footer))
    return footer


def overwrite(path: Path, offset: int, data: bytes, *, checksums: bool = False) -> None:
    """Put bytes into a shard; `checksums` makes blocks, sections and footer agree with them."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    if not checksums:
        return
    content = bytearray(path.read_bytes())
    footer, block = read_pages(path)
    blocks = footer.sections["BCRC"]
    content[blocks.offset : blocks.offset + blocks.bytes] = crc32c_blocks(content[: blocks.offset], block).tobytes()
    path.write_bytes(content)
    sections = {id: replace(s, crc=crc32c(content[s.offset : s.offset + s.bytes])) for id, s in footer.sections.items()}
    rewrite_footer(path, sections=sections)
