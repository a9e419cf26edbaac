"""Rows of a GPU -> kernels/vkernels/measured/<gpu>.json: our backends, the fastest first, by op and facts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from kernel_rows import read

from vkernels import measured

OURS = "vkernels "


def orders(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{op: [{"where": facts, "order": backends}]}, of forward and backward passes of kernels on a GPU.

    Where several shapes have the same facts, the geometric mean of the times over the shape's fastest decides. Of rows
    about the same thing the last one counts.
    """
    times: dict[tuple, dict[str, float]] = defaultdict(dict)  # (op, facts, shape) -> {backend: time}
    for row in filter(_counts, rows):
        for op, facts in row["facts"].items():
            times[op, json.dumps(facts), json.dumps(row["shape"])][row["impl"].removeprefix(OURS)] = row["p50"]
    logs: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (op, facts, _), found in times.items():
        best = min(found.values())
        for backend, time in found.items():
            logs[op, facts][backend].append(math.log(time / best))
    table: dict[str, list[dict[str, Any]]] = {}
    for (op, facts), found in sorted(logs.items()):
        if len(found) > 1:
            order = sorted(found, key=lambda name: sum(found[name]) / len(found[name]))
            table.setdefault(op, []).append({"where": json.loads(facts), "order": order})
    return table


def _counts(row: dict[str, Any]) -> bool:
    """Whether it is the time of a backend of ours on a GPU."""
    ours = row["suite"] == "kernels" and row["impl"].startswith(OURS)
    return ours and row.get("device") == "cuda" and row["p50"] is not None


def write(folder: Path) -> Path:
    """Write the table of the one GPU whose rows lie in `folder`. ValueError where there are none or of several."""
    rows = read(folder)
    gpus = {row["env"]["gpu"] for row in rows if _counts(row)}
    if len(gpus) != 1:
        raise ValueError(f"{folder}: rows of {sorted(gpus) or 'no GPU'}; expected those of one GPU")
    path = measured.FOLDER / f"{measured.slug(gpus.pop())}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(orders(rows), indent=1) + "\n")
    return path
