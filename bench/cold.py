"""Reading a corpus that is not in the page cache: what look-ahead and the order by blocks are worth.

    PYTHONPATH=. python bench/cold.py [--rounds 5] [--out FILE] [--quick] [--data FOLDER]

The files (6.5 GB, on the disk of --data) are dropped from the cache before every round, each way is a new process. Only
the beginning of an epoch is timed, less than a tenth of the files: a page fault reads 128 KB, so a longer look would
measure the cache again. `sequential` reads the files in pieces of 1 MiB and is the limit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ours
from corpus import PACK_TOKENS, Corpus
from harness import Child, Rows, serve, timed_rate

from vtrain.data import Dataset, Loader, Source, make_composer
from vtrain.data.order import BlockOrder

PIECE = 1 << 20
COPIES = 12  # of the plain corpus
BLOCK = BlockOrder(block=512, open=16)  # about 1.4 MB as int32
READAHEAD = 4  # steps
SECONDS = 60.0  # at most


def steps(folder: Path, readahead: int, order: BlockOrder | None = None) -> Iterator[int]:
    """Tokens of the steps of one epoch; small ones, so that the first comes soon."""
    dataset = Dataset(folder)
    loader = Loader(
        [Source(dataset, order=order, max_epochs=1)],
        make_composer("language_model"),
        dataset.schema.vocab,
        pack_tokens=PACK_TOKENS,
        bins_per_step=8,
        prefetch=0,
        raw=True,
        readahead=readahead,
    )
    return (ours.taken(step, raw=True) for step in loader)


def sequential(folder: Path) -> Iterator[int]:
    """Ids of the whole files: all but 2 % of them."""
    for file in sorted(folder.glob("*.vts")):
        with open(file, "rb", buffering=0) as stream:
            while size := len(stream.read(PIECE)):
                yield size // 4


@dataclass(frozen=True)
class Cold:
    """tokens(folder), of which `share` (of all) is timed. A sample of 2.7 KB alone brings 128 KB with it."""

    tokens: Callable[[Path], Iterator[int]]
    share: float


WAYS = {
    "sequential": Cold(sequential, 0.1),
    "global order": Cold(lambda folder: steps(folder, 0), 0.002),
    "global order, look-ahead": Cold(lambda folder: steps(folder, READAHEAD), 0.002),
    "order by blocks": Cold(lambda folder: steps(folder, 0, BLOCK), 0.1),
    "order by blocks, look-ahead": Cold(lambda folder: steps(folder, READAHEAD, BLOCK), 0.1),
}


def drop(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def prepare(folder: Path, corpus: Corpus) -> None:
    if not folder.exists():
        half = folder.with_name(folder.name + ".half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        ours.write(corpus, half, COPIES)
        half.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "vtrain-bench", help="on the disk")
    parser.add_argument("--quick", action="store_true", help="a look: 2 rounds over a twentieth")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    corpus = Corpus("plain", "int32", 0.05 if arguments.quick else 1.0)
    folder = arguments.data / f"cold-{corpus.scale:g}"  # files that no other bench keeps mapped
    if arguments.child:
        way, tokens = WAYS[arguments.child], COPIES * corpus.shape["tokens"]
        serve(lambda _: timed_rate(way.tokens(folder), SECONDS, way.share * tokens))
        return
    prepare(folder, corpus)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    command = [__file__, "--data", str(arguments.data), *(["--quick"] if arguments.quick else []), "--child"]
    for _ in range(2 if arguments.quick else arguments.rounds):
        for name in WAYS:
            drop(folder)
            with Child([*command, name], arguments.data / f"cold {name}.txt") as child:
                found[name].append(child.ask({}))
    report(Rows("cold", arguments.out), found, corpus)


def report(rows: Rows, found: dict[str, list[dict[str, Any]]], corpus: Corpus) -> None:
    """Ratios of the plain global order."""
    good = {name: [a["rate"] / 1e6 for a in answers if "rate" in a] for name, answers in found.items()}
    baseline = statistics.median(good["global order"]) if good["global order"] else None
    for name, answers in found.items():
        error = next((a["error"] for a in answers if "error" in a), "")
        values = [] if error else good[name]
        shape = {**corpus.shape, "copies": COPIES}
        rows.add("cold", name, values, "Mtok/s", shape=shape, dtype="int32", baseline=baseline, error=error)


if __name__ == "__main__":
    main()
