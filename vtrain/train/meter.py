"""What a run measures between two log lines. Sums stay on the device until a line is due."""

from __future__ import annotations

import resource
import time
from collections import defaultdict

import torch

from vtrain.dist.comm import max_over_ranks, sum_over_ranks


class Meter:
    """Collects losses, counts, sizes and times of steps; `record` turns the window into one dictionary of means."""

    def __init__(self, device: torch.device, unit: str, peak_flops: float | None) -> None:
        self.device, self.unit, self.peak_flops = device, unit, peak_flops
        self.total_units = 0.0  # real tokens or images since the start of training, over all ranks
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, float] = defaultdict(float)  # already global
        self.units = self.capacity = self.flops = 0.0  # of this rank
        self.wait = 0.0
        self.steps = 0
        self.started = time.perf_counter()

    def restart_clock(self) -> None:
        """Time until now does not belong to the window."""
        self.started = time.perf_counter()

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a detached device scalar to the window's sum of `name`."""
        value = value.detach().float()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def step_done(self, counts: dict[str, float], units: float, capacity: float, flops: float, wait: float) -> None:
        for name, count in counts.items():
            self.counts[name] += count
        self.units += units
        self.capacity += capacity
        self.flops += flops
        self.wait += wait
        self.steps += 1

    def record(self, term_weights: dict[str, float]) -> dict[str, float]:
        """Means over the window (a collective: all ranks call it), then start a new window.

        loss = sum of weight * mean over the terms; loss/<name> for every other counted sum.
        """
        names = sorted(self.sums)
        values = torch.stack([self.sums[n] for n in names]).double().tolist()  # the one copy to the host
        elapsed = time.perf_counter() - self.started
        *values, units, capacity, flops = sum_over_ranks([*values, self.units, self.capacity, self.flops])
        wait, memory = max_over_ranks([self.wait, memory_gb(self.device)])
        self.total_units += units
        means = {n: v / max(self.counts[n], 1e-12) for n, v in zip(names, values)}
        out = {"loss": sum(weight * means[n] for n, weight in term_weights.items())}
        shown = names if len(term_weights) > 1 else [n for n in names if n not in term_weights]
        out |= {f"loss/{n}": means[n] for n in shown if self.counts[n] > 0}
        out |= {
            f"{self.unit}_per_s": units / elapsed,
            self.unit: self.total_units,
            "padding": 1.0 - units / max(capacity, 1.0),
            "data_wait": wait / elapsed,
            "memory_gb": memory,
            "step_s": elapsed / max(self.steps, 1),
        }
        if self.peak_flops and flops:
            ranks = sum_over_ranks([1.0])[0]
            out["mfu"] = flops / elapsed / (self.peak_flops * ranks)
        self._reset()
        return out


def memory_gb(device: torch.device) -> float:
    """Peak memory: of the GPU's allocator, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
