"""The data benches' rows as the README's tables and a figure.

    PYTHONPATH=. python bench/plot.py bench/results/<machine> [--readme README.md] [--figure docs/data_bench.png]

Of rows about the same thing the last one counts: files by name, which begins with the date, then lines in order. The
tables replace what stands between the two markers in the README.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- data bench: made by bench/plot.py -->", "<!-- data bench: end -->"
LOADERS = {
    "memcpy": "memcpy (the limit)",
    "vtrain raw, with a thread": "**vtrain**, with a thread",
    "vtrain raw": "**vtrain**",
    "numpy memmap": "numpy memmap",
    "Megatron IndexedDataset": "Megatron IndexedDataset",
    "litdata": "litdata StreamingDataset",
    "HF datasets, 256 rows": "HF datasets, 256 rows a call",
    "MDS getitem": "MosaicML streaming, getitem",
    "webdataset": "webdataset",
    "HF datasets, torch rows": "HF datasets, rows as torch",
}
GRIDS, UNIFORM = "grids 256-2048 + text 16-384", "uniform 64-1300"


class Results:
    """The last row of each (suite, case, impl, dtype, law or size)."""

    def __init__(self, folder: Path) -> None:
        self.rows: dict[tuple, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.rows[tuple(row[k] for k in ("suite", "case", "impl", "dtype")) + self._about(row)] = row

    @staticmethod
    def _about(row: dict[str, Any]) -> tuple:
        shape = row["shape"]
        return (str(shape.get("law", shape.get("samples", "") if row["suite"] in ("packer", "scale") else "")),)

    def get(self, suite: str, case: str, impl: str, dtype: str = "", about: str = "") -> dict[str, Any] | None:
        """A row by its key, of an `about` that begins like this; the largest of those."""
        key = (suite, case, impl, dtype)
        found = [k for k in self.rows if k[:4] == key and k[4].startswith(about)]
        return self.rows[max(found, key=lambda k: (len(k[4]), k[4]))] if found else None

    def median(self, *key: str) -> float | None:
        row = self.get(*key)
        return row["p50"] if row else None


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def loader_table(results: Results) -> list[str]:
    lines = [
        "| one process, from the page cache | int32, Mtok/s | x Megatron | uint16 | 17-bit | writing, k samples/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for impl, label in LOADERS.items():
        rows = [results.get("loader", "shuffled packs", impl, variant) for variant in ("int32", "uint16", "17-bit")]
        if rows[0] is None:
            continue
        if rows[0]["p50"] is None:
            lines.append(f"| {label} | failed | | | | |")
            continue
        speeds = [number(row["p50"]) if row else "" for row in rows]
        write = results.get("loader", "write", impl, "int32")
        version = rows[0]["env"].get("peer", "").partition(" ")[2]
        name = f"{label} {version}" if version and impl != "memcpy" else label
        ratio = number(rows[0]["ratio"])
        lines.append(f"| {name} | {speeds[0]} | {ratio} | {speeds[1]} | {speeds[2]} | {written(write)} |")
    return lines


def written(row: dict[str, Any] | None) -> str:
    return number(row["p50"]) if row and row["p50"] else ""


@dataclass(frozen=True)
class Target:
    """What is aimed at: value(results) >= goal, or <= goal where `below`; None = not measured."""

    label: str
    value: Callable[[Results], float | None]
    goal: float
    unit: str = ""
    below: bool = False


def beside(peer: str, goal: float) -> Target:
    def value(results: Results) -> float | None:
        ours, theirs = (results.median("loader", "shuffled packs", name, "int32") for name in ("vtrain raw", peer))
        return ours / theirs if ours and theirs else None

    return Target(f"raw packs beside {peer}", value, goal, "x")


def one(label: str, goal: float, unit: str, *key: str, scale: float = 1.0, below: bool = False) -> Target:
    def value(results: Results) -> float | None:
        median = results.median(*key)
        return None if median is None else median * scale

    return Target(label, value, goal, unit, below)


def of_int32(label: str, goal: float, case: str, below: bool = False) -> Target:
    def value(results: Results) -> float | None:
        ours, whole = (results.median("loader", case, "vtrain raw", variant) for variant in ("17-bit", "int32"))
        return ours / whole if ours and whole else None

    return Target(label, value, goal, "x", below)


def cold(label: str, goal: float, way: str, other: str) -> Target:
    def value(results: Results) -> float | None:
        ours, theirs = (results.median("cold", "cold", name, "int32") for name in (way, other))
        return ours / theirs if ours and theirs else None

    return Target(f"cold files: {label}", value, goal, "x")


def unevenness(results: Results) -> float | None:
    """The mean chi2/df that is farthest from 1."""
    cases = (f"order, chi2/df of {what}" for what in ("positions", "low bits", "steps"))
    rows = [results.get("packer", case, "vtrain Order") for case in cases]
    return max(abs(row["mean"] - 1) for row in rows) if all(rows) else None


TARGETS = [
    beside("Megatron IndexedDataset", 4),
    beside("litdata", 7.5),
    beside("HF datasets, 256 rows", 13),
    beside("MDS getitem", 28),
    beside("webdataset", 70),
    one("text-to-image batches, one core", 100, "Mtok/s", "loader", "composed", "vtrain text_to_image", "17-bit"),
    of_int32("17-bit ids beside int32, speed", 0.9, "shuffled packs"),
    of_int32("17-bit ids beside int32, bytes", 0.54, "size, ids", below=True),
    one("packer", 40, "M samples/s", "packer", "pack", "vtrain, pool 512", "", UNIFORM),
    one("fill, uniform lengths", 99.9, "%", "packer", "fill", "vtrain, pool 512", "", UNIFORM),
    one("fill, grids", 99.4, "%", "packer", "fill", "vtrain, pool 512", "", GRIDS),
    one("64 ranks, layer cost, max / mean", 1.02, "", "packer", "ranks, layer cost", "vtrain, pool 512", "", GRIDS,
        below=True),
    one("order of an epoch", 300, "M/s", "packer", "order", "vtrain Order"),
    Target("order, largest deviation of mean chi2/df from 1", unevenness, 0.03, "", below=True),
    one("start on 1e8 samples", 20, "ms", "scale", "start", "vtrain", "", "100000000", below=True),
    one("start on 1e8 samples, memory but mapped files", 64, "MB", "scale", "start, memory", "vtrain", "", "100000000",
        below=True),
    cold("look-ahead beside none, global order", 2, "global order, look-ahead", "global order"),
    cold("order by blocks beside global order", 9, "order by blocks, look-ahead", "global order"),
    cold("order by blocks beside sequential", 0.35, "order by blocks, look-ahead", "sequential"),
    one("verify", 8, "GB/s", "loader", "verify", "vtrain raw", "int32"),
    one("write, int32", 1, "M samples/s", "loader", "write", "vtrain raw", "int32", scale=1e-3),
    one("write, uint16", 1, "M samples/s", "loader", "write", "vtrain raw", "uint16", scale=1e-3),
]  # fmt: skip


def target_table(results: Results) -> list[str]:
    lines = ["| | measured | target | |", "|---|---:|---:|---|"]
    for target in TARGETS:
        value = target.value(results)
        if value is None:
            continue
        reached = value <= target.goal if target.below else value >= target.goal
        found = f"{value:.4g} {target.unit}".strip()
        goal = f"{'<=' if target.below else '>='} {target.goal:g}"
        lines.append(f"| {target.label} | {found} | {goal} | {'' if reached else 'missed'} |")
    return lines


def legend(results: Results) -> str:
    """The machine and the commits that the rows come from."""
    rows = [row for key, row in results.rows.items() if key[0] in ("loader", "packer", "scale", "cold")]
    machines = sorted({row["env"]["cpu"] for row in rows})
    commits = sorted({f"{row['env']['commit']} ({row['env']['date']})" for row in rows})
    return f"Medians; {'; '.join(machines)} a process; commit {', '.join(commits)}."


def write_readme(path: Path, results: Results) -> None:
    text = path.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"error: {path}: no lines {BEGIN!r} and {END!r} to write between")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    body = [BEGIN, "", *loader_table(results), "", *target_table(results), "", legend(results), "", END]
    path.write_text(before + "\n".join(body) + after)


def draw(path: Path, results: Results) -> None:
    """Bars of reading and of writing, logarithmic: the slowest is a hundred times slower."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, case, title in zip(
        axes, ("shuffled packs", "write"), ("Shuffled packs, one process: Mtok/s", "Writing: thousand samples/s")
    ):
        bars(axis, case, title, results)
    figure.savefig(path, dpi=110)


def bars(axis: Any, case: str, title: str, results: Results) -> None:
    found = {}
    for impl, label in reversed(LOADERS.items()):
        values = [results.median("loader", case, impl, variant) for variant in ("int32", "uint16")]
        if any(values):
            found[label.replace("*", "")] = [value or 0 for value in values]
    for at, (label, values) in enumerate(found.items()):
        colors = ("#c44e2b", "#e9a58f") if label.startswith("vtrain") else ("#4c6a92", "#a9bbd3")
        for value, color, shift in zip(values, colors, (0.2, -0.2)):
            axis.barh(at + shift, value, height=0.38, color=color)
            if value:
                axis.text(value * 1.08, at + shift, number(value), va="center", fontsize=7)
    axis.set_yticks(range(len(found)), list(found), fontsize=8)
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xlim(right=axis.get_xlim()[1] * 2)  # room for the numbers
    axis.set_title(f"{title}\n(dark: int32, light: uint16)", fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of JSON-lines files")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--figure", type=Path, default=Path("docs/data_bench.png"))
    arguments = parser.parse_args()
    results = Results(arguments.results)
    if not results.rows:
        sys.exit(f"error: {arguments.results}: no rows in *.jsonl")
    write_readme(arguments.readme, results)
    draw(arguments.figure, results)


if __name__ == "__main__":
    main()
