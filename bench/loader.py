"""Loaders beside one another: shuffled packed batches, writing, sizes, verifying. One process each, rounds interleaved.

    PYTHONPATH=. python bench/loader.py [--rounds 5] [--seconds 2] [--out FILE] [--quick] [--data FOLDER] [--only ...]

The peers are packages that vtrain does not need (bench/constraints.txt has their versions); one that is missing or
fails becomes a row that says so. `read` is tokens per second out of the page cache, each loader in its own order.
`write` goes to `--scratch` (memory), so it is what the format costs; `write, durable` is the same on disk, synced.
Rows tell the processor cores that were in use, the work of a loader's own threads included.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from corpus import VARIANTS, Corpus, Way, folder_bytes
from harness import Child, Rows, interleaved, serve, timed_rate
from ours import PICTURES, PLAIN
from peers import PEERS

from vtrain.data.format import read_pages

BASELINE = "Megatron IndexedDataset"
PARTS = ("read", "composed", "write", "durable", "size", "verify")
MILLION, GIGA = 1e6, 1e9


def ways(corpus: Corpus) -> dict[str, Way]:
    """What can keep a corpus: 17-bit ids and pictures are ours alone, the baseline of the former is int32."""
    if corpus.kind == "pictures":
        return PICTURES
    return PLAIN if corpus.variant == "17-bit" else {**PEERS, **PLAIN}


def place(corpus: Corpus, way: Way, data: Path) -> Path:
    """The folder of a corpus: ways that write the same share it."""
    return data / f"{corpus.name}-{corpus.scale:g}" / f"{way.write.__module__}.{way.write.__name__}"


class Answers:
    """A child's side: does what it is asked for one way of one corpus, which it keeps under `data`."""

    def __init__(self, corpus: Corpus, way: Way, data: Path) -> None:
        self.corpus, self.way = corpus, way
        self.folder = place(corpus, way, data)
        self._counts = None

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        do = request.pop("do")
        return getattr(self, do)(**request)

    def prepare(self) -> dict[str, Any]:
        """Write the corpus where it is read, unless it is there."""
        if not self.folder.exists():
            half = self.folder.with_name(self.folder.name + ".half")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            self.way.write(replace(self.corpus), half)  # a copy: what it has generated ends with it
            half.rename(self.folder)
        return {"bytes": folder_bytes(self.folder), "ids": self._id_bytes()}

    def _id_bytes(self) -> int:
        """What the ids take without everything else that is kept: known of our own files."""
        footers = [read_pages(path)[0] for path in self.folder.glob("*.vts")]
        return sum(s.bytes for f in footers for s in f.sections.values() if s.id in ("TOK", "TOK1", "TOK2"))

    def write(self, scratch: str) -> dict[str, Any]:
        """The rate of writing it once more, in samples and in bytes of ids."""
        ids, _ = self.corpus.ids, self.corpus.batches  # made before the clock starts
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            start, used = time.perf_counter(), time.process_time()
            self.way.write(self.corpus, Path(folder))
            took = time.perf_counter() - start
        cores = (time.process_time() - used) / took
        return {"rate": len(self.corpus.lengths) / took, "bytes": ids.nbytes / took, "cores": cores}

    def read(self, seconds: float) -> dict[str, Any]:
        if self._counts is None:
            self._counts = self.way.counts(self.corpus, self.folder)
        return timed_rate(self._counts, seconds)

    def verify(self) -> dict[str, Any]:
        from vtrain.data.verify import verify

        start, used = time.perf_counter(), time.process_time()
        problems = verify(self.folder)
        took = time.perf_counter() - start
        if problems:
            raise ValueError(problems[0])
        return {"rate": folder_bytes(self.folder) / took, "cores": (time.process_time() - used) / took}


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rows = Rows("loader", arguments.out)
        self.medians: dict[tuple[str, str], float] = {}  # (case, variant) -> what the baseline did

    def child(self, corpus: Corpus, name: str) -> Child:
        folder = self.arguments.data / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        words = ("--child", name, "--corpus", corpus.kind, corpus.variant)
        options = ("--data", str(self.arguments.data), "--scale", str(corpus.scale))
        return Child([__file__, *words, *options], folder / f"{corpus.name} {name}.txt")

    def ask_all(self, corpus: Corpus, names: list[str], request: dict) -> dict[str, list[dict]]:
        """Prepare the corpus for every way, then take turns. The children end with this."""
        children = {name: self.child(corpus, name) for name in names}
        try:
            failed = {n: a for n, child in children.items() if "error" in (a := child.ask({"do": "prepare"}))}
            working = {name: child for name, child in children.items() if name not in failed}
            answers = interleaved(working, request, self.arguments.rounds)
            return {name: [failed[name]] if name in failed else answers[name] for name in names}
        finally:
            for child in children.values():
                child.close()

    def report(self, case: str, corpus: Corpus, answers: dict[str, list[dict]], unit: str, scale: float) -> None:
        """Rows of the answers, as ratios of the baseline's: its own variant, int32 where it has none."""
        for name, found in sorted(answers.items(), key=lambda item: item[0] != BASELINE):
            error = found[0].get("error", "")
            values = [] if error else [a["rate"] / scale for a in found]
            if name == BASELINE and values:
                self.medians[case, corpus.variant] = statistics.median(values)
            baseline = self.medians.get((case, corpus.variant), self.medians.get((case, "int32")))
            more = {} if error else {"cores": round(statistics.median(a["cores"] for a in found), 2)}
            if not error and "bytes" in found[0]:
                more["GB/s"] = round(statistics.median(a["bytes"] for a in found) / GIGA, 3)
            package = ways(corpus)[name].package
            shape = corpus.shape
            self.rows.add(
                case, name, values, unit, shape=shape, dtype=corpus.variant, baseline=baseline, package=package,
                error=error, **more,
            )  # fmt: skip

    def read(self, corpus: Corpus, case: str) -> None:
        answers = self.ask_all(corpus, list(ways(corpus)), {"do": "read", "seconds": self.arguments.seconds})
        self.report(case, corpus, answers, "Mtok/s", MILLION)

    def write(self, corpus: Corpus) -> None:
        names = [name for name in one_of_each(corpus) if name != "memcpy"]
        answers = self.ask_all(corpus, names, {"do": "write", "scratch": str(self.arguments.scratch)})
        self.report("write", corpus, answers, "k samples/s", 1e3)

    def durable(self, corpus: Corpus) -> None:
        name = next(iter(PLAIN))
        answers = self.ask_all(corpus, [name], {"do": "write", "scratch": str(self.arguments.data)})
        self.report("write, durable", corpus, answers, "k samples/s", 1e3)

    def verify(self, corpus: Corpus) -> None:
        answers = self.ask_all(corpus, [next(iter(PLAIN))], {"do": "verify"})
        self.report("verify", corpus, answers, "GB/s", GIGA)

    def size(self, corpus: Corpus) -> None:
        """Bytes a token, beside those of the ids alone as int32."""
        for name in one_of_each(corpus):
            with self.child(corpus, name) as child:
                found = child.ask({"do": "prepare"})
            for case, key in {"size": "bytes", "size, ids": "ids"}.items():
                values = [found[key] / corpus.shape["tokens"]] if found.get(key) else []
                if values or case == "size":
                    self.rows.add(
                        case, name, values, "bytes/token", shape=corpus.shape, dtype=corpus.variant, baseline=4.0,
                        package=ways(corpus)[name].package, error=found.get("error", ""),
                    )  # fmt: skip

    def run(self) -> None:
        scale, only = self.arguments.scale, self.arguments.only
        for variant in VARIANTS:
            corpus = Corpus("plain", variant, scale)
            if "read" in only:
                self.read(corpus, "shuffled packs")
            for part in only:
                if part in ("write", "durable", "size", "verify"):
                    getattr(self, part)(corpus)
        if "composed" in only:
            self.read(Corpus("pictures", "17-bit", scale), "composed")


def one_of_each(corpus: Corpus) -> list[str]:
    """The first name of every way to write."""
    first: dict[Any, str] = {}
    for name, way in ways(corpus).items():
        first.setdefault(way.write, name)
    return list(first.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one loader in one round")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "vtrain-bench", help="the corpora")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), help="where writing is measured")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the corpora")
    parser.add_argument("--quick", action="store_true", help="a look: 2 rounds of 0.3 s over a twentieth")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        corpus = Corpus(*arguments.corpus, arguments.scale)
        serve(Answers(corpus, ways(corpus)[arguments.child], arguments.data))
        return
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.scale = 2, 0.3, 0.05
    Bench(arguments).run()


if __name__ == "__main__":
    main()
