"""A figure of the kernels' rows of one GPU: ours beside the best peer, and how much of the roofline is reached.

PYTHONPATH=. python bench/plot_kernels.py bench/results/<gpu> [--figure docs/kernels_bench.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kernel_rows import Place, Results, read

COLORS = {"forward": "#c44e2b", "backward": "#4c6a92", "both": "#7a6a9c"}


def bars(results: Results, machine: str) -> list[tuple[Place, float, float]]:
    """(place, times as fast as the best peer, share of the roofline) wherever both ran, in the order of the places."""
    found = []
    for place in results.by_place:
        ours, peer = results.ours(place), results.peer(place)
        if place.machine == machine and ours and peer:
            found.append((place, peer["p50"] / ours["p50"], ours["roofline"]))
    return found


def draw(path: Path, results: Results, machine: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = bars(results, machine)[::-1]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 1.5 + 0.2 * len(found)), constrained_layout=True, sharey=True)
    labels = [f"{place.op}, {place.name}, {place.what}" for place, _, _ in found]
    colors = [COLORS[place.what] for place, _, _ in found]
    side(axes[0], "times as fast as the best peer", labels, [speed for _, speed, _ in found], colors)
    side(axes[1], "share of the roofline", labels, [share for _, _, share in found], colors)
    axes[0].axvline(1, color="#333333", linewidth=0.8)
    figure.suptitle(machine, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def side(axis: Any, title: str, labels: list[str], values: list[float], colors: list[str]) -> None:
    axis.barh(range(len(values)), values, color=colors, height=0.7)
    for at, value in enumerate(values):
        axis.text(value, at, f" {value:.2f}", va="center", fontsize=6)
    axis.set_yticks(range(len(labels)), labels, fontsize=6)
    axis.set_title(title, fontsize=9)
    for edge in ("top", "right"):
        axis.spines[edge].set_visible(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of JSON-lines files")
    parser.add_argument("--figure", type=Path, default=Path("docs/kernels_bench.png"))
    arguments = parser.parse_args()
    results = Results(read(arguments.results))
    machines = results.machines("cuda")
    if len(machines) != 1:
        print(f"error: {arguments.results}: rows of {machines or 'no GPU'}; expected those of one", file=sys.stderr)
        return 2
    draw(arguments.figure, results, machines[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
