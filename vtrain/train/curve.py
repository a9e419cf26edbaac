"""The loss curve of a run, from its metrics.jsonl (needs the extra `plots`)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vtrain.files import write_whole


def plot_losses(metrics: Path, target: Path) -> None:
    """Draw training loss, its parts and every evaluated loss over steps into a PNG."""
    series: dict[str, tuple[list, list]] = {}
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if _is_loss(name) and isinstance(value, float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for name, (steps, values) in series.items():
        style = {"marker": "o", "markersize": 3, "linestyle": "--"} if name.startswith("eval/") else {}
        axes.plot(steps, values, label=name, linewidth=1.8 if name == "loss" else 1.0, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if series and min(v for _, values in series.values() for v in values) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize=8)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    write_whole(target, picture.getvalue())


def _is_loss(name: str) -> bool:
    return name == "loss" or name.startswith("loss/") or name.startswith("eval/")
