"""The one training loop. A task brings micro-batches and terms; the loop owns steps, normalisation, logs, checkpoints.

One step: sum the host counts of all micro-batches over all ranks, then for every optimizer run its micro-batches, each
term divided by its own global count, so that the gradient does not depend on how the step was cut into micro-batches
and ranks; clip; update; end the step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vtrain.dist.comm import raise_together, sum_over_ranks
from vtrain.dist.fsdp import reshard, sync_gradients
from vtrain.dist.mesh import World
from vtrain.files import clear_leftovers, replace_folder, write_durably
from vtrain.train import checkpoint
from vtrain.train.ema import Ema
from vtrain.train.meter import Meter
from vtrain.train.optim import AdamW
from vtrain.train.saver import Saver
from vtrain.train.schedule import lr_factor
from vtrain.train.signals import StopRequest
from vtrain.train.sinks import open_sinks
from vtrain.train.stage import TRAINING, Stage, place, stages_of, take_over, trained_steps
from vtrain.train.watchdog import Watchdog


class DataEnded(ValueError):
    """There is no next step. All ranks raise it in the same call of `next_work`; the loop saves what was trained."""


@dataclass
class Work:
    """This rank's share of one step.

    batches: micro-batches, the same number on every rank. counts: per micro-batch {name: host count} of every term and
    counted stat, the same names on every rank. units: real tokens (or images); capacity: with padding; flops: model
    floating-point operations, 0 = unknown.
    """

    batches: list[Any]
    counts: list[dict[str, float]]
    units: float
    capacity: float
    flops: float = 0.0


class Task(Protocol):
    """A training job. All ranks call every method in the same order."""

    kind: str  # "pretrain", "autoencoder"
    unit: str  # what throughput counts: "tokens" or "images"
    peak_flops: float | None  # of the device, where it is known: then MFU is reported
    root: nn.Module  # model + objective, sharded
    optimizers: dict[str, AdamW]  # stepped in this order, each over its own pass through the micro-batches

    def next_work(self) -> Work:
        """The next step's micro-batches, on the device; `DataEnded` after the last."""

    def terms(self, optimizer: str, batch: Any) -> tuple[dict, dict]:
        """Forward of one micro-batch: (terms {name: (sum, weight)}, stats {name: detached sum})."""

    def end_step(self, step: int, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """After the updates of a step; device scalars for the log. kept (device scalar): 0 = the step was skipped."""

    def show(self, step: int, averaged: Callable[[], AbstractContextManager]) -> None:
        """Pictures of how it goes, at the steps the task chooses; inside averaged() the weights are the averages."""

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{source: {"loss": mean, ...}}; empty when there is nothing to evaluate on."""

    def identity(self) -> dict:
        """What a checkpoint of this task must agree with: model, vocabulary."""

    def state(self) -> dict:
        """JSON-able state that is not a tensor (the loader's cursor)."""

    def load_state(self, state: dict) -> None: ...

    def next_stage(self, state: dict) -> None:
        """Go on from the state of the stage before; only of tasks whose runs may have stages."""

    def export(self, folder: Path) -> None:
        """Write the finished model (a collective)."""


def run(task: Task, settings: Any, world: World, stage: Stage | None = None) -> bool:
    """Train to the last step, or resume and do so, and export the model to `out/final`; stage: this part of a run.

    False where a rank was asked to stop: then no other stage should begin.
    """
    return _Run(task, settings, world, stage or stages_of([settings])[0]).run()


class _Run:
    def __init__(self, task: Task, settings: Any, world: World, stage: Stage) -> None:
        self.task, self.settings, self.world, self.stage = task, settings, world, stage
        self.out = Path(settings.run.out)
        self.folder = self.out / "checkpoints"
        self.step, self.steps = stage.first, stage.last  # of all stages
        self.saved_step = stage.first  # of the newest checkpoint that was begun or resumed from
        self.best: dict = {}  # {"step": n, "loss": x}
        self.counted_apart: dict[str, list[list[str]]] = {}  # what the optimizers were told when the stage began
        self.term_weights: dict[str, float] = {}
        self.bad_steps = torch.zeros((), device=world.device)  # skipped ones; read when a line is logged
        self.meter = Meter(world.device, task.unit, task.peak_flops)
        self.saver = Saver(self.folder, world, settings.checkpoint.keep)
        self.ema = self._new_ema()
        self.watchdog = Watchdog(world.rank, settings.run.timeout_s)
        self.stop = StopRequest()
        self.sinks: list = []
        for module in (task.root, *task.root.children()):  # a long evaluation or a drawing gets on by forwards
            module.register_forward_pre_hook(lambda *_: self.watchdog.beat())

    def run(self) -> bool:
        try:
            with self.stop, self.watchdog:
                return self._run()
        except BaseException as error:
            place = f"rank {self.world.rank}, step {self.step}, {self.watchdog.operation}"
            print(f"{place}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise
        finally:
            for sink in self.sinks:
                sink.close()

    def _run(self) -> bool:
        self._on_main(self._clear_leftovers)
        self._resume()
        final = self.stage.exported(self.out)
        if self.step == self.steps and self._of_main(trained_steps(final)) == self.steps:
            self._say(f"{self.out}: already trained to step {self.step}; nothing to do")
            return True
        self._on_main(self._open_out)
        self.meter.restart_clock()
        self._train()
        self._doing("writing the checkpoint")
        self.saver.wait()
        if self.step < self.steps:
            self._say(f"stopped at step {self.step}/{self.steps}, which is saved; the same command goes on from there")
        else:
            self._finish(final)
        return not sum_over_ranks([bool(self.stop.name)])[0]

    def _clear_leftovers(self) -> None:
        for folder in (self.out, self.folder):
            clear_leftovers(folder)

    def _open_out(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.saver.prune(self._protected())  # what a killed run did not come to
        write_durably(self.out / "config.toml", self.stage.config)
        self.sinks = open_sinks(self.settings.log.sinks, self.out, self.settings.run.name, self.step)

    def _train(self) -> None:
        every = self.settings
        while self.step < self.steps:
            try:
                norm, stopping = self._one_step()
            except DataEnded as error:  # on all ranks at the same step
                if self.saved_step < self.step:
                    self._save()
                    self.saver.wait()
                raise self._data_ended(error) from None
            last = self.step == self.steps
            if last or self.step % every.log.every == 0:
                self._log(norm)
            improved = False
            if every.eval.every and (last or self.step % every.eval.every == 0):
                improved = self._evaluate()
            self._doing("drawing pictures")
            self.task.show(self.step, self._averaged)
            due = every.checkpoint.every and self.step % every.checkpoint.every == 0
            if last or due or stopping or (improved and every.checkpoint.best):
                self._save()
            if stopping:
                return

    def _data_ended(self, error: DataEnded) -> DataEnded:
        stage, trained = self.stage, self.step - self.stage.first
        key = "train.steps" if stage.count == 1 else f"stage.{stage.number}.train.steps"
        advice = f"; {key}={trained} exports what was trained" if trained else ""
        return DataEnded(f"the data ended after step {self.step}, which is saved: {error}{advice}")

    def _one_step(self) -> tuple[torch.Tensor, bool]:
        """One update; (gradient norm, whether a rank was asked to stop)."""
        task, started = self.task, time.perf_counter()
        self._doing("loading data")
        work = task.next_work()
        wait = time.perf_counter() - started
        self._doing("summing counts over ranks")
        counts, stopping = self._agree(work.counts)
        optim = self.settings.optim
        factor = lr_factor(
            self.step - self.stage.first,
            self.settings.train.steps,
            kind=optim.schedule,
            warmup=optim.warmup,
            decay=optim.decay,
            floor=optim.min_lr,
        )
        for name, optimizer in task.optimizers.items():
            loss = self._forward_backward(name, work, counts)
            self._doing("reducing the gradient norm")
            norm = optimizer.clip(optim.grad_clip, loss)
            kept = norm.isfinite().float()
            optimizer.set_lr(optimizer.base_lr * factor)
            optimizer.step(kept)
        self._doing("ending the step")
        self.last_stats = task.end_step(self.step, kept)
        if self.ema is not None:
            self.ema.update(kept)
        self.bad_steps += 1.0 - kept
        self.step += 1
        self.lr = next(iter(task.optimizers.values())).base_lr * factor
        self.meter.step_done(kept, counts, units=work.units, capacity=work.capacity, flops=work.flops, wait=wait)
        return norm, stopping

    def _forward_backward(self, optimizer: str, work: Work, counts: dict[str, float]) -> torch.Tensor:
        """Gradients of the step's loss for one optimizer; the detached loss of this rank."""
        whole = torch.zeros((), device=self.world.device)
        for i, batch in enumerate(work.batches):
            self._doing(f"forward and backward of micro-batch {i}")
            sync_gradients(self.task.root, i == len(work.batches) - 1)
            terms, stats = self.task.terms(optimizer, batch)
            loss = torch.zeros((), device=self.world.device)
            for term, (total, weight) in terms.items():
                self.term_weights[term] = weight
                loss = loss + total * (weight / max(counts[term], 1e-12))
                self.meter.add(term, total)
            loss.backward()
            whole += loss.detach()
            for stat, total in stats.items():
                self.meter.add(stat, total)
        return whole

    def _agree(self, counts: list[dict[str, float]]) -> tuple[dict[str, float], bool]:
        """The one exchange of host numbers in a step: global counts, who is asked to stop, who wrote or failed to."""
        names = sorted(counts[0])
        own = [sum(c[n] for c in counts) for n in names]
        flags = [bool(self.stop.name), self.saver.written, self.saver.failed]
        *sums, stopping, written, failed = sum_over_ranks([*own, *map(float, flags)])
        if written == self.world.size:
            self._doing("completing a checkpoint")
            self.saver.commit()
        if failed:
            self.saver.wait()  # raises; the next checkpoint may be hours away
        return dict(zip(names, sums)), stopping > 0

    def _log(self, norm: torch.Tensor) -> None:
        self._doing("logging")
        values = self.meter.record(self.term_weights)
        bad = int(self.bad_steps)
        record = {"kind": "train", "step": self.step, "steps": self.steps, "unit": self.task.unit, **values}
        record |= {"lr": self.lr, "grad_norm": float(norm), "eta_s": values["step_s"] * (self.steps - self.step)}
        record |= {f"stat/{name}": float(value) for name, value in self.last_stats.items()}
        record |= {"bad_steps": bad} if bad else {}
        self._write(record)
        limit = self.settings.train.max_bad_steps
        if bad > limit:
            raise ValueError(
                f"step {self.step}: {bad} steps had a loss or gradient that is not finite and were skipped; "
                f"train.max_bad_steps is {limit}"
            )

    def _evaluate(self) -> bool:
        self._doing("evaluating")
        self.task.root.eval()
        with torch.no_grad(), self._averaged():
            results = self.task.evaluate()
        self.task.root.train()
        if not results:
            return False
        loss = sum(r["loss"] for r in results.values()) / len(results)
        improved = loss < self.best.get("loss", float("inf"))
        if improved:
            self.best = {"step": self.step, "loss": loss}
        record = {"kind": "eval", "step": self.step, "steps": self.steps, "best": improved}
        record |= {f"eval/{source}/{name}": v for source, result in results.items() for name, v in result.items()}
        self._write(record)
        self.meter.restart_clock()  # an evaluation is not training time
        return improved

    def _new_ema(self) -> Ema | None:
        return Ema(self.task.optimizers.values(), self.settings.optim.ema) if self.settings.optim.ema else None

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model computes with the averaged weights, if there are any, inside the block."""
        if self.ema is None:
            yield
            return
        with self.ema.applied():
            try:
                yield
            finally:
                reshard(self.task.root)  # a forward without backward leaves the root gathered, with these weights

    def _save(self) -> None:
        self._doing("waiting for the checkpoint before")
        self.saver.wait()
        self._doing("copying the state for a checkpoint")
        state = {
            "step": self.step,
            "identity": self.task.identity(),
            "task": self.task.state(),
            "best": self.best,
            "units": self.meter.total_units,
            "bad_steps": int(self.bad_steps),
        }
        if self.stage.count > 1:
            state["stage"] = {**self.stage.state(), "counted_apart": self.counted_apart}
        own = {"meter": self.meter.state()}
        self._on_main(lambda: [sink.sync() for sink in self.sinks])
        self.saver.begin(self.step, self._tensors(), state, own, self.stage.config, self._protected())
        self.saved_step = self.step

    def _protected(self) -> set[int]:
        return {self.best["step"]} if self.settings.checkpoint.best and self.best else set()

    def _tensors(self) -> checkpoint.Tensors:
        frozen = not self.settings.checkpoint.trainable_only
        tensors = checkpoint.module_tensors(self.task.root, "root", frozen=frozen)
        for name, optimizer in self.task.optimizers.items():
            tensors = tensors.joined(optimizer.tensors(f"optim.{name}"))
        return tensors.joined(self.ema.tensors()) if self.ema is not None else tensors

    def _resume(self) -> None:
        self._doing("resuming")
        choice = self.settings.checkpoint.resume
        newest = self._of_main(max(checkpoint.list_steps(self.folder), default=-1))
        if choice == "never" and newest >= 0:
            raise ValueError(
                f"{self.folder}: has a checkpoint at step {newest}, and checkpoint.resume is never; "
                "choose another run.out, or checkpoint.resume=auto"
            )
        if choice == "never" or (choice == "auto" and newest < 0):
            return
        source = checkpoint.step_folder(self.folder, newest) if choice == "auto" else Path(choice)
        state = checkpoint.read_state(source)
        if place(state)[0] == self.stage.number - 1:
            self._begin_stage(source, state)
        else:
            self._restore(source, state)
        if newest > self.step:
            raise ValueError(
                f"{self.folder}: has a checkpoint at step {newest}, later than {source} at step {self.step}; "
                "move the later ones away, choose another run.out, or go on with checkpoint.resume=auto"
            )
        self._say(f"resumed from {source} at step {self.step}/{self.steps}")

    def _begin_stage(self, source: Path, state: dict) -> None:
        """Take over from the last checkpoint of the stage before."""
        self.stage.check_before(state, source)
        self.counted_apart = take_over(self.task, self.settings.init, source, state, self.world)
        try:
            self.task.next_stage(state["task"])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        self.ema = self._new_ema()
        self.meter.total_units = state["units"]

    def _restore(self, source: Path, state: dict) -> None:
        self.stage.check_own(state, source)
        checkpoint.check_identity(source, state["identity"], self.task.identity())
        self.counted_apart = state.get("stage", {}).get("counted_apart", {})
        for name, groups in self.counted_apart.items():
            for group in groups:
                self.task.optimizers[name].count_apart(group)
        _, own = checkpoint.load(source, self._tensors(), self.world, state)
        try:
            self.task.load_state(state["task"])
        except ValueError as error:
            raise ValueError(f"{source}: {error}; set them back, or take another run.out") from None
        self.step, self.best, self.meter.total_units = state["step"], state["best"], state["units"]
        self.saved_step = self.step
        self.bad_steps.fill_(state["bad_steps"])
        self.meter.load_state([rank["meter"] for rank in own], self.world.rank, self.world.size)
        self._forget_lost_best()

    def _forget_lost_best(self) -> None:
        """A best checkpoint that is not in this folder cannot be exported: that of another folder, or a deleted one."""
        if not (self._protected() and self.settings.checkpoint.export == "best"):
            return
        if not self._of_main(checkpoint.step_folder(self.folder, self.best["step"]).is_dir()):
            self._say(f"the best checkpoint so far, step {self.best['step']}, is not in {self.folder}: forgotten")
            self.best = {}

    def _finish(self, final: Path) -> None:
        """Export the last weights, or the best ones of the evaluations."""
        exported = self.step
        if self.settings.checkpoint.export == "best" and self._protected() - {self.step}:
            exported = self.best["step"]
            self._doing("loading the best checkpoint")
            checkpoint.load(checkpoint.step_folder(self.folder, exported), self._tensors(), self.world)
            self._say(f"exporting the best checkpoint: step {exported}, eval loss {self.best['loss']:.4f}")
        self._doing("exporting")
        new = final.with_name(f".tmp-{final.name}")
        self._on_main(self._check_out)
        with self._averaged():
            self.task.export(new)

        def name_it() -> None:
            write_durably(new / TRAINING, json.dumps({"step": exported, "trained_steps": self.step}))
            self._plot()  # first: where final is, nothing is left to do
            replace_folder(new, final)

        self._on_main(name_it)
        self._say(f"done: {final}")

    def _check_out(self) -> None:
        if not self.folder.is_dir():
            raise ValueError(f"{self.out}: the output folder is gone")

    def _plot(self) -> None:
        try:
            from vtrain.train.curve import plot_losses
        except ImportError:
            self._say("no loss curve: matplotlib is not installed (pip install 'vtrain[plots]')")
            return
        plot_losses(self.out / "metrics.jsonl", self.out / "loss.png")

    def _on_main(self, action: Callable[[], None]) -> None:
        """Do what only the main rank does; all ranks fail when it fails on the disk or the user's input."""
        problem = None
        if self.world.main:
            try:
                action()
            except (OSError, ValueError) as error:
                problem = str(error)
        raise_together(problem)

    def _of_main(self, number: int) -> int:
        """The main rank's number, on all ranks: what they see of a shared folder may differ for a while."""
        return int(sum_over_ranks([number if self.world.main else 0])[0])

    def _doing(self, operation: str) -> None:
        self.watchdog.doing(operation, self.step)

    def _write(self, record: dict) -> None:
        if self.stage.count > 1:
            record = record | {"stage": self.stage.number}
        for sink in self.sinks:
            sink.write(record)

    def _say(self, text: str) -> None:
        if self.world.main:
            print(text, flush=True)
