"""Starting on 1e8 samples (minutes to prepare, 1.4 GB): opening, the order and the first batch, each in a new process.

    PYTHONPATH=. python bench/scale.py [--rounds 5] [--out FILE] [--quick] [--data FOLDER]

The samples have one or two tokens, in 256 shards. Of the peers only the order of an epoch is made, by their own
functions, without any file. Memory is the growth of the process after its imports, at its peak, without the pages of
mapped files, which have a row of their own.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Child, Rows, serve

SHARDS = 256
BATCH = 1 << 16
MEGATRON_SEQUENCE = 8192
TOKENS_OF_A_SAMPLE = 682  # the mean of the plain corpus: Megatron's index depends on it


def prepare(folder: Path, samples: int) -> None:
    """The dataset, unless it is there."""
    from vtrain.data import Schema, ShardWriter
    from vtrain.data.format import SEGMENT
    from vtrain.data.manifest import publish
    from vtrain.data.samples import cumulative
    from vtrain.vocab import Vocabulary

    if folder.exists():
        return
    half = folder.with_name(folder.name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    schema, random, infos, written = Schema(Vocabulary.of(text=256)), np.random.default_rng(0), [], 0
    bare = np.zeros(0, dtype=SEGMENT)
    for shard in range(SHARDS):
        name = f"{shard:06d}.vts"
        with ShardWriter(half / name, schema, uuid=uuid.uuid5(uuid.NAMESPACE_OID, name).bytes) as writer:
            end = samples * (shard + 1) // SHARDS
            while written < end:
                count = min(BATCH, end - written)
                offsets = cumulative(random.integers(1, 3, count))
                ids = random.integers(0, 256, offsets[-1], dtype=np.uint8)
                keys = np.arange(written + 1, written + count + 1, dtype=np.uint64)
                writer.append_batch(ids, offsets, bare, np.zeros(count + 1, dtype=np.int64), keys=keys)
                written += count
        infos.append(writer.info)
    publish(half, schema, infos)
    half.rename(folder)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS, RssFile (of them, pages of mapped files) or, since the last reset, VmHWM."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of work(), which keeps what it makes until it is measured, and the bytes that the process grew by.

    Pages of mapped files are told apart: they are the page cache's, which can drop them at any time.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, mapped, start = resident("VmRSS"), resident("RssFile"), time.perf_counter()
    kept = work()
    took = time.perf_counter() - start
    files = max(resident("RssFile") - mapped, 0)
    grown = resident("VmHWM") - before - files
    del kept
    return {"seconds": took, "bytes": grown, "mapped": files}


def vtrain(folder: Path, samples: int) -> dict[str, float]:
    from vtrain.data import Dataset, Loader, Source, make_composer
    from vtrain.vocab import Vocabulary

    vocabulary = Vocabulary.of(text=256)
    composer = make_composer("language_model")
    options = {"pack_tokens": 8192, "bins_per_step": 1, "prefetch": 0, "raw": True}

    def start() -> object:
        loader = Loader([Source(Dataset(folder))], composer, vocabulary, **options)
        return loader, next(iter(loader))

    return measured(start)


def numpy_permutation(folder: Path, samples: int) -> dict[str, float]:
    return measured(lambda: np.random.default_rng(0).permutation(samples))


def olmo(folder: Path, samples: int) -> dict[str, float]:
    """As its data loader makes the global order: u32 numbers, shuffled."""

    def order() -> np.ndarray:
        numbers = np.arange(samples, dtype=np.uint32)
        np.random.Generator(np.random.PCG64(seed=0)).shuffle(numbers)
        return numbers

    return measured(order)


def hugging_face(folder: Path, samples: int) -> dict[str, float]:
    """Dataset.shuffle: an index table. The dataset itself is one column of bytes."""
    import pyarrow as pa
    from datasets import Dataset

    dataset = Dataset(pa.table({"ids": pa.array(np.zeros(samples, dtype=np.uint8))}))
    return measured(lambda: dataset.shuffle(seed=0, keep_in_memory=True))


def mds(folder: Path, samples: int) -> dict[str, float]:
    from streaming.base.shuffle import get_shuffle

    sizes = np.full(SHARDS, samples // SHARDS, dtype=np.int64)
    return measured(lambda: get_shuffle("py1e", sizes, 64, 0, 0, 1 << 18))


def megatron(folder: Path, samples: int) -> dict[str, float]:
    """The three arrays of GPTDataset for one epoch."""
    from megatron.core.datasets import gpt_dataset, helpers

    lengths = np.full(samples, TOKENS_OF_A_SAMPLE, dtype=np.int32)

    def arrays() -> object:
        random = np.random.RandomState(0)
        documents = gpt_dataset._build_document_index(np.arange(samples, dtype=np.int32), 1, random, False)
        tokens = samples * TOKENS_OF_A_SAMPLE
        cuts = helpers.build_sample_idx(lengths, documents, MEGATRON_SEQUENCE, 1, tokens, True, 1)
        return documents, cuts, gpt_dataset._build_shuffle_index(len(cuts) - 1, len(cuts) - 1, random)

    return measured(arrays)


# Case, key of the answer, what its unit is worth, unit.
FIGURES = (
    ("start", "seconds", 1e-3, "ms"),
    ("start, memory", "bytes", 1e6, "MB"),
    ("start, mapped files", "mapped", 1e6, "MB"),
)
WAYS = {
    "vtrain": (vtrain, ""),
    "numpy permutation": (numpy_permutation, "numpy"),
    "OLMo-core": (olmo, "ai2-olmo-core"),
    "HF datasets": (hugging_face, "datasets"),
    "Megatron GPTDataset": (megatron, "megatron-core"),
    "MDS py1e": (mds, "mosaicml-streaming"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of vtrain; the peers, which take seconds, get 1")
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "vtrain-bench")
    parser.add_argument("--quick", action="store_true", help="a look: 2 rounds of 1e6 samples")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.samples = 2, 1_000_000
    folder = arguments.data / f"tiny-{arguments.samples}"
    if arguments.child:
        serve(lambda _: WAYS[arguments.child][0](folder, arguments.samples))
        return
    prepare(folder, arguments.samples)
    rows = Rows("scale", arguments.out)
    for name, (_, package) in WAYS.items():
        report(rows, name, package, arguments)


def report(rows: Rows, name: str, package: str, arguments: argparse.Namespace) -> None:
    """One new process a round: nothing of the round before is warm but the files."""
    command = [__file__, "--child", name, "--samples", str(arguments.samples), "--data", str(arguments.data)]
    answers: list[dict[str, Any]] = []
    for _ in range(arguments.rounds if name == "vtrain" else 1):
        with Child(command, arguments.data / f"scale {name}.txt") as child:
            answers.append(child.ask({}))
    error = next((a["error"] for a in answers if "error" in a), "")
    more = {"shape": {"samples": arguments.samples}, "package": package, "error": error}
    for case, key, scale, unit in FIGURES:
        rows.add(case, name, [] if error else [a[key] / scale for a in answers], unit, **more)


if __name__ == "__main__":
    main()
