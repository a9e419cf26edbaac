"""What a run measures between two log lines. Sums stay on the device until a line is due."""

from __future__ import annotations

import math
import resource
import time

import torch

from vtrain.dist.comm import max_over_ranks, sum_over_ranks


class Meter:
    """Collects losses, counts, sizes and times of steps; `record` turns the window into one dictionary of means."""

    def __init__(self, device: torch.device, unit: str, peak_flops: float | None) -> None:
        self.device, self.unit, self.peak_flops = device, unit, peak_flops
        self.total_units = 0.0  # real tokens or images since the start of training, over all ranks
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}  # of this rank, float64 device scalars
        self.counts: dict[str, torch.Tensor] = {}  # of all ranks, without skipped steps
        self.pending: dict[str, torch.Tensor] = {}  # of the step under way
        self.units = self.capacity = self.flops = 0.0  # of this rank
        self.wait = 0.0
        self.steps = 0
        self.started = time.perf_counter()

    def restart_clock(self) -> None:
        """Time until now does not belong to the window."""
        self.started = time.perf_counter()

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a detached device scalar to the step's sum of `name`."""
        value = value.detach().double()
        self.pending[name] = self.pending[name] + value if name in self.pending else value

    def step_done(
        self,
        kept: torch.Tensor,
        counts: dict[str, float],
        *,
        units: float,
        capacity: float,
        flops: float,
        wait: float,
    ) -> None:
        """End a step. kept: device scalar, 0 = the step was skipped and its losses are left out; counts: global."""
        for name, value in self.pending.items():
            self._accumulate(self.sums, name, torch.where(kept > 0, value, 0.0))
            self._accumulate(self.counts, name, kept.double() * counts[name])
        self.pending = {}
        self.units += units
        self.capacity += capacity
        self.flops += flops
        self.wait += wait
        self.steps += 1

    @staticmethod
    def _accumulate(into: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        into[name] = into[name] + value if name in into else value

    def state(self) -> dict:
        """This rank's open window for a checkpoint, JSON-able (one copy to the host)."""
        numbers = {name: getattr(self, name) for name in ("units", "capacity", "flops", "steps")}
        return {"sums": _to_host(self.sums), "counts": _to_host(self.counts), **numbers}

    def load_state(self, states: list[dict], rank: int, ranks: int) -> None:
        """Go on with the window of a checkpoint, given the states of all the ranks that wrote it.

        The same number of ranks: each takes its own, and the window's means are the same to the last bit. Another
        number: rank 0 takes the sums of all.
        """
        if len(states) == ranks:
            mine = [states[rank]]
        else:
            mine = states if rank == 0 else []
        for state in mine:
            for name, value in state["sums"].items():
                self._accumulate(self.sums, name, self._scalar(value))
            self.units += state["units"]
            self.capacity += state["capacity"]
            self.flops += state["flops"]
        if not mine:
            self.sums = {name: self._scalar(0.0) for name in states[0]["sums"]}
        self.counts = {name: self._scalar(value) for name, value in states[0]["counts"].items()}
        self.steps = states[0]["steps"]

    def _scalar(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def record(self, term_weights: dict[str, float]) -> dict[str, float]:
        """Means over the window (a collective: all ranks call it), then start a new window.

        loss = sum of weight * mean over the terms; loss/<name> for every other counted sum.
        """
        names = sorted(self.sums)
        values, counts = (list(_to_host({n: d[n] for n in names}).values()) for d in (self.sums, self.counts))
        elapsed = time.perf_counter() - self.started
        *values, units, capacity, flops = sum_over_ranks([*values, self.units, self.capacity, self.flops])
        wait, memory = max_over_ranks([self.wait, memory_gb(self.device)])
        self.total_units += units
        total = dict(zip(names, counts))
        means = {n: v / total[n] if total[n] else math.nan for n, v in zip(names, values)}
        out = {"loss": sum(weight * means[n] for n, weight in term_weights.items())}
        shown = names if len(term_weights) > 1 else [n for n in names if n not in term_weights]
        out |= {f"loss/{n}": means[n] for n in shown if total[n] > 0}
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


def _to_host(scalars: dict[str, torch.Tensor]) -> dict[str, float]:
    """All values in one copy."""
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist())) if scalars else {}
