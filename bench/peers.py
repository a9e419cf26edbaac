"""The other loaders: how each writes the corpus, and its shuffled batches.

Each uses its own order and hands its samples to one next-fit packer into int32 tensors of 8192 tokens. The settings are
those that make it fast in one process by its own documentation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from corpus import PACK_TOKENS, Corpus, Way

CHUNK_BYTES = 64 << 20  # of the files of those that cut the corpus into files
ROWS_PER_CALL = 256  # of Hugging Face datasets
ROWS_PER_WRITE = 1000  # its default
TAR_SAMPLES = 10_000
SHUFFLE_BUFFER = 1000  # of webdataset, as in its documentation
Samples = Iterator[np.ndarray]


def next_fit(samples: Samples) -> Iterator[int]:
    """The tokens of each packed ids int32[8192] and cu_seqlens: new tensors, as a trainer may keep them."""
    ids = torch.empty(PACK_TOKENS, dtype=torch.int32)
    row, cu, at = ids.numpy(), [0], 0
    for sample in samples:
        stop = at + len(sample)
        if stop > PACK_TOKENS:
            torch.tensor(cu, dtype=torch.int32)
            yield at
            ids = torch.empty(PACK_TOKENS, dtype=torch.int32)
            row, cu, at, stop = ids.numpy(), [0], 0, len(sample)
        row[at:stop] = sample
        cu.append(stop)
        at = stop


def shuffled(count: int) -> Iterator[int]:
    """Sample numbers, epoch after epoch."""
    for epoch in itertools.count():
        yield from np.random.default_rng(epoch).permutation(count).tolist()


def write_raw(corpus: Corpus, folder: Path) -> None:
    corpus.ids.tofile(folder / "ids.bin")
    np.save(folder / "cu.npy", corpus.cu)


def memmap(corpus: Corpus, folder: Path) -> Iterator[int]:
    ids, cu = np.memmap(folder / "ids.bin", dtype=corpus.dtype, mode="r"), np.load(folder / "cu.npy").tolist()
    return next_fit(ids[cu[i] : cu[i + 1]] for i in shuffled(len(cu) - 1))


def memcpy(corpus: Corpus, folder: Path) -> Iterator[int]:
    """The limit: the whole corpus copied in memory, in one piece."""
    source = np.fromfile(folder / "ids.bin", dtype=corpus.dtype)
    target = np.empty_like(source)
    while True:
        np.copyto(target, source)
        yield len(source)


def write_megatron(corpus: Corpus, folder: Path) -> None:
    """One add_document a sample, as its preprocessing tool does."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=corpus.dtype.type)
    for sample in corpus.samples():
        builder.add_document(sample, [len(sample)])
    builder.finalize(str(folder / "corpus.idx"))


def megatron(corpus: Corpus, folder: Path) -> Iterator[int]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / "corpus"))
    return next_fit(dataset[i] for i in shuffled(len(dataset)))


def write_litdata(corpus: Corpus, folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes=CHUNK_BYTES)
    for number, sample in enumerate(corpus.samples()):
        cache[number] = sample
    cache.done()
    cache.merge()


def litdata(corpus: Corpus, folder: Path) -> Iterator[int]:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    return next_fit(sample for _ in itertools.count() for sample in dataset)


def write_mds(corpus: Corpus, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"ids": f"ndarray:{corpus.dtype.name}"}) as writer:
        for sample in corpus.samples():
            writer.write({"ids": sample})


def mds(corpus: Corpus, folder: Path) -> Iterator[int]:
    """dataset[i] in a random order: its own iterator is about ten times slower in one process."""
    from streaming import LocalDataset

    dataset = LocalDataset(str(folder))
    return next_fit(dataset[i]["ids"] for i in shuffled(len(dataset)))


def write_arrow(corpus: Corpus, folder: Path) -> None:
    """Whole tables of 1000 rows: much quicker than row by row."""
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    writer = None
    for first in range(0, len(corpus.lengths), ROWS_PER_WRITE):
        cu = corpus.cu[first : first + ROWS_PER_WRITE + 1]
        values = pa.array(corpus.ids[cu[0] : cu[-1]])
        table = pa.table({"ids": pa.ListArray.from_arrays(pa.array(cu - cu[0], pa.int32()), values)})
        writer = writer or ArrowWriter(path=str(folder / "corpus.arrow"), schema=table.schema)
        writer.write_table(table)
    writer.finalize()


def arrow(corpus: Corpus, folder: Path, rows: int = ROWS_PER_CALL) -> Iterator[int]:
    """rows at a time, as numpy."""

    def samples() -> Samples:
        from datasets import Dataset

        stored = Dataset.from_file(str(folder / "corpus.arrow")).with_format("numpy")
        for epoch in itertools.count():
            dataset = stored.shuffle(seed=epoch, keep_in_memory=True)
            for first in range(0, len(dataset), rows):
                yield from dataset[first : first + rows]["ids"]

    return next_fit(samples())


def arrow_rows(corpus: Corpus, folder: Path) -> Iterator[int]:
    """Row by row as torch tensors: what a DataLoader does with it."""

    def samples() -> Samples:
        from datasets import Dataset

        stored = Dataset.from_file(str(folder / "corpus.arrow")).with_format("torch")
        for epoch in itertools.count():
            dataset = stored.shuffle(seed=epoch, keep_in_memory=True)
            yield from (dataset[i]["ids"].numpy() for i in range(len(dataset)))

    return next_fit(samples())


def write_tar(corpus: Corpus, folder: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=TAR_SAMPLES, verbose=0) as writer:
        for number, sample in enumerate(corpus.samples()):
            writer.write({"__key__": f"{number:08d}", "ids": sample.tobytes()})


def tar(corpus: Corpus, folder: Path) -> Iterator[int]:
    import webdataset

    files = sorted(str(file) for file in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(SHUFFLE_BUFFER)
    return next_fit(np.frombuffer(s["ids"], dtype=corpus.dtype) for _ in itertools.count() for s in dataset)


PEERS = {
    "memcpy": Way(write_raw, memcpy, "numpy"),
    "numpy memmap": Way(write_raw, memmap, "numpy"),
    "Megatron IndexedDataset": Way(write_megatron, megatron, "megatron-core"),
    "litdata": Way(write_litdata, litdata, "litdata"),
    "MDS getitem": Way(write_mds, mds, "mosaicml-streaming"),
    "HF datasets, 256 rows": Way(write_arrow, arrow, "datasets"),
    "HF datasets, torch rows": Way(write_arrow, arrow_rows, "datasets"),
    "webdataset": Way(write_tar, tar, "webdataset"),
}
