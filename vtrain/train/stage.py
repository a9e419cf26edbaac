"""Stages: parts of one run, each with settings of its own and a fresh build of task and model.

A stage takes its weights over from the last checkpoint of the stage before; step numbers run on. A run without stages
is one stage.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vtrain import config
from vtrain.dist.comm import raise_together, sum_over_ranks
from vtrain.dist.mesh import World
from vtrain.settings import Init
from vtrain.train import checkpoint

TRAINING = "training.json"  # in an exported folder: {"step": of the weights, "trained_steps": of the run}


@dataclass(frozen=True)
class Stage:
    """One stage as its loop sees it: its settings, its place among all, and the configuration of all in TOML."""

    settings: Any
    config: str
    number: int = 1  # from 1
    count: int = 1
    first: int = 0  # steps of the stages before

    @property
    def last(self) -> int:
        """The number of steps at its end, those of the stages before included."""
        return self.first + self.settings.train.steps

    @property
    def title(self) -> str:
        return f"stage {self.number} of {self.count}"

    def exported(self, out: Path) -> Path:
        """The folder of its finished model."""
        return out / ("final" if self.number == self.count else f"stage-{self.number}")

    def state(self) -> dict:
        """What a checkpoint notes about it; nothing where there are no stages."""
        return {"number": self.number, "first": self.first} if self.count > 1 else {}

    def check_before(self, state: Mapping, source: Path) -> None:
        """ValueError unless the checkpoint with this state is the end of the stage before."""
        if state["step"] != self.first:
            raise ValueError(f"{source}: is at step {state['step']}; expected {self.first}, where {self.title} begins")

    def check_own(self, state: Mapping, source: Path) -> None:
        """ValueError unless the checkpoint with this state lies inside this stage."""
        number, first = place(state)
        if (number, first) != (self.number, self.first):
            raise ValueError(
                f"{source}: is of stage {number}, which began at step {first}; expected stage {self.number}, "
                f"which begins at step {self.first}: set train.steps of earlier stages back, or take another run.out"
            )
        if state["step"] > self.last:
            sums = f" of stages 1..{self.number} together" if self.count > 1 else ""
            raise ValueError(f"{source}: is at step {state['step']}, past train.steps = {self.last}{sums}")


def place(state: Mapping) -> tuple[int, int]:
    """(number, first step) of the stage that a checkpoint was made in; one without stages is the first."""
    stage = state.get("stage") or {"number": 1, "first": 0}
    return stage["number"], stage["first"]


def stages_of(settings: Sequence[Any]) -> list[Stage]:
    """The stages with these settings, in order."""
    text, first, stages = config.dump_stages(settings), 0, []
    for number, own in enumerate(settings, 1):
        if len(settings) > 1 and own.checkpoint.trainable_only:
            raise config.ConfigError(
                f"stage {number}: checkpoint.trainable_only is true; expected false in a run with stages: the next "
                "stage takes all weights from a checkpoint"
            )
        stages.append(Stage(own, text, number, len(settings), first))
        first += own.train.steps
    return stages


def chosen(stages: Sequence[Stage], number: str) -> list[Stage]:
    """All stages, or the one that `--stage` names."""
    if not number:
        return list(stages)
    if not number.isdecimal() or not 1 <= int(number) <= len(stages):
        raise config.ConfigError(f"--stage {number}: expected a number from 1 to {len(stages)}")
    return [stages[int(number) - 1]]


def remaining(stages: Sequence[Stage], wanted: Sequence[Stage], world: World) -> list[Stage]:
    """Those of `wanted` that are not done, from what lies in run.out; only the first obeys checkpoint.resume.

    The last stage of a run always remains: its loop says when it is done. ValueError where the stage before the first
    wanted one is not complete.
    """
    problem, begin = None, 0
    if world.main:  # ranks may see a shared folder differently for a while
        try:
            begin = _next_number(stages)
            if wanted[0].number > begin:
                raise ValueError(f"{wanted[0].title}: {_not_complete(stages[begin - 1])}")
        except (OSError, ValueError) as error:
            problem = str(error)
    raise_together(problem)
    begin = int(sum_over_ranks([begin])[0])
    left = [stage for stage in wanted if stage.number >= begin]
    return left[:1] + [_resuming(stage) for stage in left[1:]]


def _next_number(stages: Sequence[Stage]) -> int:
    """The number of the stage that a run goes on with."""
    settings = stages[0].settings
    out, resume = Path(settings.run.out), settings.checkpoint.resume
    newest = max(checkpoint.list_steps(out / "checkpoints"), default=-1)
    if len(stages) == 1 or resume == "never" or (resume == "auto" and newest < 0):
        return 1
    source = checkpoint.step_folder(out / "checkpoints", newest) if resume == "auto" else Path(resume)
    state = checkpoint.peek(source)
    number, _ = place(state)
    if number > len(stages):
        raise ValueError(f"{source}: is of stage {number}; expected at most {len(stages)}, as many as there are")
    stage = stages[number - 1]
    done = state["step"] == stage.last and (resume != "auto" or trained_steps(stage.exported(out)) == stage.last)
    return min(number + done, len(stages))


def trained_steps(exported: Path) -> int:
    """The number of steps behind an exported model, -1 where there is none."""
    try:
        return json.loads((exported / TRAINING).read_text())["trained_steps"]
    except (OSError, ValueError, KeyError):
        return -1


def _not_complete(before: Stage) -> str:
    out, resume = before.settings.run.out, before.settings.checkpoint.resume
    if resume == "never":
        return f"checkpoint.resume is never; expected auto, or the path of the last checkpoint of {before.title}"
    return f"{before.title} is not complete in {out}: expected its {before.last} steps and {before.exported(Path(out))}"


def _resuming(stage: Stage) -> Stage:
    own = stage.settings
    return replace(stage, settings=replace(own, checkpoint=replace(own.checkpoint, resume="auto")))


def take_over(task: Any, init: Init, source: Path, state: Mapping, world: World) -> dict[str, list[list[str]]]:
    """Fill a freshly built task with the weights (and moments) of the last checkpoint of the stage before.

    Returns {optimizer: groups of parameters that count their updates apart}, for `AdamW.count_apart` at a resume.
    ValueError lists every parameter that does not fit and that neither init.new nor init.drop names.
    """
    held = checkpoint.shapes(source, state)
    tensors = checkpoint.module_tensors(task.root, "root")
    try:
        names = matched(tensors.shapes(), held, init, resized(state["identity"], task.identity()))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    apart: dict[str, list[list[str]]] = {}
    for name, optimizer in task.optimizers.items() if init.optimizer else ():
        kept = {p for p in optimizer.parameters if f"root.{p}" in names and f"optim.{name}.{p}.step" in held}
        before = state.get("stage", {}).get("counted_apart", {}).get(name, [])
        groups = [[p for p in group if p in kept] for group in before]
        groups.append([p for p in optimizer.parameters if p not in kept])
        apart[name] = [group for group in groups if group]
        for group in apart[name]:
            optimizer.count_apart(group)
        moments = optimizer.tensors(f"optim.{name}")
        tensors = tensors.joined(moments)
        owner = {t: t.removeprefix(f"optim.{name}.").rpartition(".")[0] for t in moments.shapes()}
        names |= {t: t for t, parameter in owner.items() if parameter in kept}
    checkpoint.load_named(source, tensors, names, world, state)
    return apart


def resized(before: Mapping, now: Mapping) -> dict[str, str]:
    """{range of the vocabulary: what is wrong} of those that have another size now: padded tables may hide it."""
    sizes = dict(before.get("vocabulary", ()))
    return {
        name: f"has {sizes[name]} ids, expected {size}"
        for name, size in now.get("vocabulary", ())
        if sizes.get(name, size) != size
    }


def matched(
    wanted: Mapping[str, Sequence[int]],
    held: Mapping[str, Sequence[int]],
    init: Init,
    other_ranges: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, str]:
    """{tensor of the model: the tensor of the checkpoint that it is filled from}, strictly, but for init.drop and new.

    wanted, held: shapes by name. Patterns are those of train.trainable: without `root.model.`. other_ranges: what
    `resized` has found; tables of these ranges do not fit.
    """
    ours, theirs = ({_parameter(name): name for name in names if name.startswith("root.")} for names in (wanted, held))
    problems = _matching_nothing("init.new", init.new, ours) + _matching_nothing("init.drop", init.drop, theirs)
    new, dropped = _matching(ours, init.new), _matching(theirs, init.drop)
    if init.weights == "ema" and not any(name.startswith("ema.") for name in held):
        problems.append("init.weights is ema; the stage before has no averages (optim.ema)")
    names = {}
    for name, here in ours.items():
        if name in new:
            continue
        found = theirs.get(name) if name not in dropped else None
        if found is None:
            problems.append(f"missing {name}, which is not in init.new")
        elif name.rpartition(".")[2] in other_ranges:
            problems.append(f"{name}, which is not in init.new, {other_ranges[name.rpartition('.')[2]]}")
        elif tuple(held[found]) != tuple(wanted[here]):
            problems.append(f"{name}, which is not in init.new, is {list(held[found])}, expected {list(wanted[here])}")
        else:
            averaged = f"ema.{found.removeprefix('root.')}"
            names[here] = averaged if init.weights == "ema" and averaged in held else found
    problems += [f"unexpected {name}, which is not in init.drop" for name in theirs if name not in {*ours, *dropped}]
    if problems:
        raise ValueError("the weights of the stage before: " + "; ".join(problems))
    return names


def _parameter(name: str) -> str:
    return name.removeprefix("root.").removeprefix("model.")


def _matching(names: Mapping[str, str], patterns: Sequence[str]) -> set[str]:
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


def _matching_nothing(key: str, patterns: Sequence[str], names: Mapping[str, str]) -> list[str]:
    idle = [pattern for pattern in patterns if not _matching(names, [pattern])]
    return [f"{key}: {pattern!r} matches none of {len(names)} parameters" for pattern in idle]
