"""One case of the kernel benches: every backend of ours and every peer, forward and backward, one row each."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from cases import Case, Cost, On, Problem, in_words
from gpu import Ceilings, Timer, in_turn, one_line
from harness import Rows

import vkernels
from vkernels import registry
from vkernels.check.judge import error as relative_error

NO_TIME = "no time left"
BASELINE = "torch eager"  # rows tell how many times as fast they are
PACKAGES = {
    "Liger": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "flash-kmeans": "flash-kmeans",
    "vector-quantize-pytorch": "vector-quantize-pytorch",
    "HF": "transformers",
}


class Implementation:
    """One way to do a problem, with its own copies of the leaves: some write into what they are given."""

    def __init__(self, problem: Problem, function: Callable[..., Any], force: Callable[[], object] = lambda: None):
        self._function, self._force = function, force
        wants = problem.backward is not None
        self.leaves = [x.detach().clone().requires_grad_(wants) for x in problem.leaves]

    def forward(self) -> list[torch.Tensor]:
        return tensors_of(self._function(*self.leaves))

    def gradients(self, outputs: Sequence[torch.Tensor], retain: bool) -> Sequence[torch.Tensor | None]:
        pairs = [(o, c) for o, c in zip(outputs, cotangents(outputs)) if o.requires_grad]
        return torch.autograd.grad(
            [o for o, _ in pairs], self.leaves, [c for _, c in pairs], retain_graph=retain, allow_unused=True
        )

    def both(self) -> None:
        self.gradients(self.forward(), retain=False)

    def prepare(self, what: str) -> Callable[[], object]:
        """What is timed in a pass; made before each round."""
        self._force()
        if what == "forward":
            return self.forward
        if what == "both":
            return self.both
        outputs = self.forward()
        cotangents(outputs)  # drawn outside the timing
        return lambda: self.gradients(outputs, retain=True)


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """The float outputs; integers where there are no others."""
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    tensors = [o for o in outputs if isinstance(o, torch.Tensor)]
    return [o for o in tensors if o.is_floating_point()] or tensors


_drawn: dict[tuple, torch.Tensor] = {}


def cotangents(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of outputs: random ones, kept by shape; ones of sums (at most 64 elements)."""
    found = []
    for i, o in enumerate(outputs):
        key = (i, tuple(o.shape), o.dtype, o.device)
        if key not in _drawn:
            generator = torch.Generator(o.device).manual_seed(i)
            shape = {"generator": generator, "device": o.device}
            _drawn[key] = torch.randn(o.shape, **shape).to(o.dtype) if o.numel() > 64 else torch.ones_like(o).detach()
        found.append(_drawn[key])
    return found


def implementations(case: Case, problem: Problem, device: torch.device, without: Sequence[str]) -> Iterator[tuple]:
    """(name, what makes the implementation), ours by backend and then the peers."""
    for backend in registry.backends(case.op, device):
        force = functools.partial(vkernels.force, case.op, backend)
        yield f"vkernels {backend}", functools.partial(Implementation, problem, problem.ours, force)
    for name, build in problem.peers.items():
        if not name.startswith(tuple(without)):
            yield name, lambda build=build: Implementation(problem, build())


@contextlib.contextmanager
def facts_seen() -> Iterator[dict[str, dict[str, Any]]]:
    """{name in the measured table: facts} of the ops that are called inside, as the ops themselves state them."""
    seen: dict[str, dict[str, Any]] = {}
    select = registry.select

    def spy(op: str, device: torch.device, facts: Any = None, name: str = "") -> registry.Backend:
        seen[name or op] = dict(facts or {})
        return select(op, device, facts, name)

    with mock.patch.object(registry, "select", spy):
        yield seen


class Truth:
    """The first output and the gradient of the first leaf in float64, of the rows that are judged."""

    def __init__(self, problem: Problem) -> None:
        self._judged = problem.judged
        self._wants = problem.backward is not None and problem.judged is not None and problem.judged.gradient
        self._found: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def error(self, implementation: Implementation) -> float | None:
        """The larger relative error of the two; the share of wrong rows of integers. None where nothing is judged."""
        if self._judged is None:
            return None
        outputs = implementation.forward()
        rows, value = slice(self._judged.rows), outputs[0]
        if self._found is None:
            self._found = self._truth(outputs)
        output, gradient = self._found
        errors = []
        if self._judged.outputs:
            compare = relative_error if value.is_floating_point() else wrong
            errors.append(compare(value[rows], output))
        if gradient is not None:
            errors.append(relative_error(implementation.gradients(outputs, retain=False)[0][rows], gradient[rows]))
        return max(errors)

    def _truth(self, like: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """like: the outputs of an implementation, which tell what the gradients are taken of."""
        inputs = [x.detach().double().requires_grad_(self._wants) for x in self._judged.inputs]
        outputs = tensors_of(self._judged.oracle(*inputs))
        if not self._wants:
            return outputs[0].detach(), None
        rows = slice(self._judged.rows)
        factors = [(c[rows] if c.ndim else c).to(o) for o, c in zip(outputs, cotangents(like))]
        (gradient,) = torch.autograd.grad(outputs, inputs[:1], factors)
        return outputs[0].detach(), gradient


def wrong(found: torch.Tensor, true: torch.Tensor) -> float:
    """The share that differs."""
    return (found != true).double().mean().item()


@dataclass
class Contest:
    """A problem with those that take part; extra: columns of their rows; facts: of our ops, as the table keys them."""

    about: dict[str, Any]
    problem: Problem
    passes: Sequence[str]
    ready: dict[str, Implementation] = field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


class Bench:
    """Measures cases on a device into rows."""

    def __init__(self, rows: Rows, timer: Timer, ceilings: Ceilings, dtype: torch.dtype, without: Sequence[str]):
        self.rows, self.timer, self.ceilings, self.dtype, self.without = rows, timer, ceilings, dtype, without

    def measure(self, case: Case, seconds: float, left: Callable[[], float]) -> None:
        """All passes of all implementations in about so many seconds, compilation and float64 apart.

        An implementation whose turn to compile comes when no time is left (`left() <= 0`) is a row that says so.
        """
        sizes = case.full if self.timer.on_gpu else case.small
        name = case.name if self.timer.on_gpu else in_words(sizes)  # which speaks of the sizes of a GPU
        print(f"{case.op}: {name}", flush=True)
        about = {"op": case.op, "name": name, "shape": sizes}
        try:
            problem = case.make(On(self.timer.device, self.dtype), **sizes)
            contest = Contest(about, problem, ("forward",) if problem.backward is None else problem.passes)
            self._gather(case, contest, left)
            for what in contest.passes:
                self._time(contest, what, seconds / len(contest.passes))
        except Exception as error:  # the next case may still work
            self._failed(about, "-", "forward", one_line(error))
        finally:
            _drawn.clear()
            if case.op in registry.ops():
                vkernels.force(case.op, None)

    def _gather(self, case: Case, contest: Contest, left: Callable[[], float]) -> None:
        """Make every implementation and run it once."""
        truth = Truth(contest.problem)
        for name, build in implementations(case, contest.problem, self.timer.device, self.without):
            if left() <= 0:
                self._failed(contest.about, name, contest.passes[0], NO_TIME)
                continue
            try:
                self._try(contest, truth, name, build)
            except ModuleNotFoundError as missing:
                self._failed(contest.about, name, contest.passes[0], f"not installed: {missing.name}")
            except Exception as error:  # a peer that fails is a result
                self._failed(contest.about, name, contest.passes[0], one_line(error))

    def _try(self, contest: Contest, truth: Truth, name: str, build: Callable[[], Implementation]) -> None:
        one, last = build(), contest.passes[-1]
        one.prepare("forward")
        with facts_seen() as seen:
            error = truth.error(one)
            one.prepare(last)()
        if name.startswith("vkernels"):  # of this op alone: others that it calls choose their own backends
            op = contest.about["op"]
            contest.facts |= {key: facts for key, facts in seen.items() if key in (op, f"{op}_backward")}
        contest.extra[name] = {"err": error, "peak_bytes": self.timer.peak_bytes(one.prepare(last))}
        contest.ready[name] = one

    def _time(self, contest: Contest, what: str, seconds: float) -> None:
        problem, graph = contest.problem, contest.problem.graph
        calls = {name: functools.partial(self._prepare, one, what, graph) for name, one in contest.ready.items()}
        found, errors = in_turn(self.timer, calls, seconds)
        cost = {"forward": problem.forward, "backward": problem.backward}.get(what) or _sum(problem)
        baseline = median(found.get(BASELINE))
        for name, values in found.items():
            if name in errors:
                self._failed(contest.about, name, what, errors[name])
                continue
            facts = _decided(contest.facts, what, contest.passes) if name.startswith("vkernels") else {}
            host = self.timer.host_time(contest.ready[name].prepare(what))
            columns = {"facts": facts, "graph": graph, "host_us": round(host, 1), **contest.extra[name], **problem.more}
            columns |= self._rates(cost, values) | {"baseline": baseline, "less": True}
            self._row(contest.about, name, what, values, **columns)

    def _prepare(self, one: Implementation, what: str, graph: bool) -> Callable[[], object]:
        call = one.prepare(what)
        return self.timer.captured(call) if graph else call

    def _rates(self, cost: Cost, values: Sequence[float]) -> dict[str, Any]:
        seconds = median(values) / 1e6
        floor = self.ceilings.floor(*cost)
        bound = "flops" if cost.flops / self.ceilings.flops > cost.bytes / self.ceilings.bandwidth else "bytes"
        return {
            "flops": cost.flops, "bytes": cost.bytes, "bound": bound, "roofline": round(floor / seconds, 4),
            "tflops": round(cost.flops / seconds / 1e12, 3), "gbs": round(cost.bytes / seconds / 1e9, 2),
        }  # fmt: skip

    def _failed(self, about: dict, name: str, what: str, reason: str) -> None:
        self._row(about, name, what, [], error=reason)

    def _row(self, about: dict, name: str, what: str, values: Sequence[float], **more: Any) -> None:
        package = next((p for start, p in PACKAGES.items() if name.startswith(start)), "")
        dtype = str(self.dtype).removeprefix("torch.")
        rest = {"pass": what, "device": self.timer.device.type, **about}
        self.rows.add(f"{about['op']} {what}", name, values, "us", dtype=dtype, package=package, **rest, **more)


def _decided(facts: dict[str, dict], what: str, passes: Sequence[str]) -> dict[str, dict]:
    """The names in the measured table, with facts, that this pass decides about."""
    if what == "both":
        return facts if passes == ("both",) else {}
    return {name: found for name, found in facts.items() if name.endswith("_backward") == (what == "backward")}


def median(values: Sequence[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _sum(problem: Problem) -> Cost:
    return Cost(*(a + b for a, b in zip(problem.forward, problem.backward)))
