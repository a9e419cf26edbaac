"""The rows of bench/run.py as numbers: what was measured where, ours beside the best peer, and what is aimed at.

Ours are the kernels of this library (`cpu`, `triton`, `gluon`, `cuda`). Its other backends hand the work to torch,
cuDNN or flash-attn and count among the peers here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

OWN = tuple(f"vkernels {name}" for name in ("cpu", "triton", "gluon", "cuda"))
PASSES = ("forward", "backward", "both")


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of all files below: by name, which begins with the date, then lines in order."""
    paths = sorted(folder.rglob("*.jsonl"), key=lambda path: (path.name, path))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


class Place(NamedTuple):
    """One problem on one machine."""

    machine: str
    op: str
    name: str
    what: str  # forward, backward, both


class Results:
    """The last row of each implementation at each place, for the kernels suite; errors too."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.by_place: dict[Place, dict[str, dict[str, Any]]] = {}
        self.ceilings: dict[str, dict[str, dict[str, Any]]] = {}  # machine -> case (+ bytes) -> row
        self.steps: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}  # (machine, name) -> impl -> row
        for row in rows:
            machine = machine_of(row)
            if row["suite"] == "kernels" and "pass" in row and row["impl"] != "-":
                place = Place(machine, row["op"], row["name"], row["pass"])
                self.by_place.setdefault(place, {})[row["impl"]] = row
            elif row["suite"] == "ceilings":
                self.ceilings.setdefault(machine, {})[row["case"] + str(row["shape"].get("bytes", ""))] = row
            elif row["suite"] == "e2e":
                self.steps.setdefault((machine, row["name"]), {})[row["impl"]] = row

    def machines(self, device: str) -> list[str]:
        """Those with rows of kernels: "cuda" or "cpu"."""
        found = {p.machine for p, rows in self.by_place.items() for r in rows.values() if r["device"] == device}
        return sorted(found)

    def places(self, machine: str, op: str) -> Iterator[Place]:
        """Of an op, by case, then by pass."""
        names = dict.fromkeys(p.name for p in self.by_place if p.machine == machine and p.op == op)
        for name in names:
            yield from (p for w in PASSES if (p := Place(machine, op, name, w)) in self.by_place)

    def ours(self, place: Place) -> dict[str, Any] | None:
        """Our fastest kernel."""
        return fastest(r for impl, r in self.by_place.get(place, {}).items() if impl in OWN)

    def peer(self, place: Place, pattern: str = "") -> dict[str, Any] | None:
        """The fastest of the others, or of those whose name matches."""
        rows = self.by_place.get(place, {}).items()
        return fastest(r for impl, r in rows if impl not in OWN and re.search(pattern, impl))

    def failures(self, place: Place) -> dict[str, str]:
        return {impl: r["error"] for impl, r in self.by_place[place].items() if r["p50"] is None}


def machine_of(row: dict[str, Any]) -> str:
    return row["env"]["gpu"] if row.get("device") == "cuda" else row["env"]["cpu"]


def fastest(rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    return min((r for r in rows if r["p50"]), key=lambda r: r["p50"], default=None)


@dataclass(frozen=True)
class Target:
    """What is aimed at on a GPU: value(results, machine) >= goal; None = not measured."""

    label: str
    goal: float
    value: Callable[[Results, str], float | None]
    unit: str = "x"


def beside(label: str, goal: float, op: str, case: str, what: str, peer: str = "") -> Target:
    """How many times as fast as a peer (the best one) in the case, of those that match, where this is least."""

    def value(results: Results, machine: str) -> float | None:
        found = []
        for place in results.places(machine, op):
            if place.what == what and re.search(case, place.name):
                ours, theirs = results.ours(place), results.peer(place, peer)
                found += [theirs["p50"] / ours["p50"]] if ours and theirs else []
        return min(found, default=None)

    return Target(label, goal, value)


def of_roofline(label: str, goal: float, op: str, case: str, what: str) -> Target:
    def value(results: Results, machine: str) -> float | None:
        ours = results.ours(Place(machine, op, case, what))
        return ours["roofline"] if ours else None

    return Target(label, goal, value, "of the copy bandwidth")


def of_own(label: str, goal: float, op: str, less: str, more: str, what: str) -> Target:
    """One case of ours beside another."""

    def value(results: Results, machine: str) -> float | None:
        a, b = (results.ours(Place(machine, op, name, what)) for name in (less, more))
        return b["p50"] / a["p50"] if a and b else None

    return Target(label, goal, value)


def of_step(label: str, goal: float, model: str, peer: str) -> Target:
    """Tokens per second of a training step beside a peer's."""

    def value(results: Results, machine: str) -> float | None:
        rows = results.steps.get((machine, model), {})
        ours, theirs = rows.get("vtrain"), rows.get(peer)
        return theirs["p50"] / ours["p50"] if ours and theirs and ours["p50"] and theirs["p50"] else None

    return Target(label, goal, value)


def mfu(label: str, goal: float, model: str) -> Target:
    def value(results: Results, machine: str) -> float | None:
        row = results.steps.get((machine, model), {}).get("vtrain")
        return row.get("mfu") if row else None

    return Target(label, goal, value, "MFU")


FLASH, FLEX = "torch varlen_attn", "FlexAttention"
TARGETS = [
    beside("attention forward, beside torch's flash (FA2)", 1.5, "varlen_attention", "docs", "forward", FLASH),
    beside("attention forward, beside the best peer", 0.9, "varlen_attention", "docs", "forward"),
    beside("attention backward, beside torch's flash (FA2)", 1.25, "varlen_attention", "docs", "backward", FLASH),
    beside("attention backward, beside the best peer", 0.85, "varlen_attention", "docs", "backward"),
    beside("image blocks, forward and backward, beside FlexAttention", 1.3, "varlen_attention", "image", "both", FLEX),
    beside("head and loss, beside Liger", 1.4, "linear_cross_entropy", "^152k$", "both", "Liger"),
    of_own("restricted head, beside our whole one", 2.4, "linear_cross_entropy", "152k + 16k, restricted", "152k + 16k",
           "both"),
    beside("nearest code, beside vector-quantize-pytorch", 5, "vq_nearest", "D=32 K=16k$", "forward", "vector-q"),
    beside("nearest code, beside flash-kmeans", 1.2, "vq_nearest", "16k$", "forward", "flash-kmeans"),
    beside("embedding backward, beside torch", 3, "embed", "^152k, order from the host", "backward", "torch eager"),
    beside("AdamW with clipping, beside torch fused", 1.5, "adamw_step", "", "forward", "torch eager"),
    beside("Newton-Schulz, beside torch.optim.Muon's", 1.5, "newton_schulz", "", "forward", "torch eager"),
    beside("RMSNorm forward, beside torch.compile", 1.0, "rms_norm", "", "forward", "torch.compile"),
    beside("RMSNorm backward, beside torch.compile", 1.0, "rms_norm", "", "backward", "torch.compile"),
    of_roofline("RMSNorm forward", 0.9, "rms_norm", "T=32768 C=2048", "forward"),
    beside("norm and rotation of q and k, beside torch.compile", 1.5, "qk_norm_rope", "", "both", "torch.compile"),
    mfu("training step, qwen3-0.6b, documents of 8k", 0.45, "qwen3-0.6b, even"),
    mfu("training step, qwen3-1.7b, documents of 4k", 0.51, "qwen3-1.7b, even"),
    of_step("training step, qwen3-1.7b, beside torch.compile", 1.15, "qwen3-1.7b, even", "torch.compile, Liger head"),
    of_step("training step, qwen3-1.7b, beside HF and Liger", 1.5, "qwen3-1.7b, even", "HF + Liger"),
]  # fmt: skip
