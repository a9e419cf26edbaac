"""Seeds of the fuzz target `shard`: small shards as ShardWriter writes them, laid out as csrc/fuzz/shard.cpp reads.

    python scripts/fuzz_seeds.py [FOLDER]        csrc/fuzz/corpus/shard by default

Sections stand 64 bytes apart and not on pages: what a fuzzer changes is then mostly something that is read. The ids
come last: decoding reads on behind them. The core under test asks for no checksums, so none need to be mended.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np

from vtrain.data.format import SEGMENT, SPARE, STORES, Modality, Schema, read_pages
from vtrain.data.writer import ShardWriter
from vtrain.vocab import Vocabulary

# As in shard.cpp.
IDS = ("TOK", "TOK1", "TOK2", "LBL", "LBL1", "LBL2", "OFF", "SEG", "SEGO", "RUN", "RUNO", "KEY", "COL.a")
LENGTHS = (9, 0, 20, 1, 30)  # of the samples
FOLDER = Path(__file__).parents[1] / "csrc/fuzz/corpus/shard"


def write(path: Path, store: str, labels: bool) -> None:
    """A shard in that store: text, in the longer samples before a 1 x 2 x 3 picture; with labels also loss runs and a
    column."""
    size = STORES[store].capacity if store != "u32" else 1 << 20
    vocab = Vocabulary.of(text=size - 100, visual=100)
    schema = Schema(vocab, columns={"a": "<f4"} if labels else {}, labels=labels)
    lengths = np.array(LENGTHS)
    ids, segments = [], []
    for length in lengths.tolist():
        ids.append(np.arange(1, length + 1) * 48271 % (size - 100))
        segments.append((0, Modality.TEXT, 1, 0, 0, 0, 0, 0, 0))
        if length > 6:
            ids[-1][-6:] = size - np.arange(1, 7)
            segments.append((length - 6, Modality.IMAGE, 2, 0, 0, 1, 2, 3, 0))
    counts = np.where(lengths > 6, 2, 1)
    extra = {}
    if labels:
        extra = {"labels": np.concatenate(ids)[::-1], "columns": {"a": np.arange(len(lengths), dtype="<f4")}}
        extra |= {"runs": lengths.astype(np.uint32) | 1 << 24, "run_offsets": np.arange(len(lengths) + 1)}
    with ShardWriter(path, schema, uuid=bytes(16), id_store=store) as writer:
        writer.append_batch(
            np.concatenate(ids),
            np.concatenate(([0], np.cumsum(lengths))),
            np.array(segments, dtype=SEGMENT),
            np.concatenate(([0], np.cumsum(counts))),
            keys=np.arange(1, len(lengths) + 1, dtype=np.uint64),
            **extra,
        )


def seed_of(path: Path) -> bytes:
    """The sections of a shard and some questions, as the target reads them."""
    footer, _ = read_pages(path)
    data = path.read_bytes()
    table, body = b"", b""
    sections = [section for section in footer.sections.values() if section.id in IDS]
    for section in reversed(sections):
        item = section.bytes // section.count if section.count else 1
        table += struct.pack("<BBII", IDS.index(section.id), item, len(body), section.bytes)
        body += data[section.offset : section.offset + section.bytes] + bytes(SPARE + -section.bytes % 8)
    queries = [(sample, 1, 7) for sample in range(len(LENGTHS))]
    head = struct.pack("<BIIB", "COL.a" in footer.sections, footer.samples, footer.max_id, len(sections))
    return head + table + bytes([len(queries)]) + b"".join(struct.pack("<HHH", *q) for q in queries) + body


def seeds() -> dict[str, bytes]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for store, labels in product(STORES, (False, True)):
            path = Path(folder) / "seed.vts"
            write(path, store, labels)
            found[f"{store}-labels" if labels else store] = seed_of(path)
    return found


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)
        print(f"{folder / name}: {len(data)} bytes")


if __name__ == "__main__":
    main()
