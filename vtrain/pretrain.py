"""Train a decoder on token shards.

    torchrun --nproc-per-node 8 -m vtrain.pretrain --cfg my.toml
    python -m vtrain.pretrain --cfg quickstart/ar --dry-run

Writes run.out/metrics.jsonl, loss.png, checkpoints/ and final/ (a Hugging Face style folder with the tokenizers); of a
file with [[stage]] tables also stage-1/, stage-2/, ..., the models at the ends of the stages before the last.
Started again, it goes on from the newest checkpoint.
"""

from __future__ import annotations

import gc

from vtrain.config import ConfigError, run_command
from vtrain.dist.mesh import World, set_threads, world
from vtrain.settings import Init, PretrainSettings
from vtrain.train.loop import run
from vtrain.train.stage import Stage, chosen, remaining, stages_of
from vtrain.train.tasks.pretrain import Plan, PretrainTask, check_sequence

OPTIONS = {"stage": "run this stage only, counted from 1; the one before it has to be complete"}


def main(*settings: PretrainSettings, dry_run: bool = False, stage: str = "") -> None:
    """settings: of every stage, in order."""
    set_threads(settings[0].run.threads)
    stages = stages_of(settings)
    if len(stages) == 1:
        _check_alone(settings[0])
    wanted = chosen(stages, stage)
    plans = {one.number: Plan(one.settings) for one in wanted}
    if len(wanted) > 1:
        check_sequence(list(plans.values()))
    if dry_run:
        for one in wanted:
            print(describe(one, plans[one.number]))
            print(plans[one.number].describe_batch())
        return
    with world(settings[0].run.device, settings[0].run.timeout_s, settings[0].run.deterministic) as here:
        left = remaining(stages, wanted, here)
        if here.main and not left:
            print(f"{settings[0].run.out}: {wanted[0].title} is already trained; nothing to do", flush=True)
        for one in left:
            if one is not left[0]:
                gc.collect()  # a task is part of cycles: without this the next stage would need its memory, too
            if not train(one, plans[one.number], here):
                break


def _check_alone(settings: PretrainSettings) -> None:
    """ConfigError where a run without stages has keys that only a later stage obeys."""
    given = {"init": settings.init != Init(), "data.restart": settings.data.restart}
    if any(given.values()):
        names = ", ".join(name for name, found in given.items() if found)
        raise ConfigError(f"{names}: for later stages; expected [[stage]] tables, or without them model.init alone")


def train(stage: Stage, plan: Plan, here: World) -> bool:
    """Run one stage; False where the run was asked to stop."""
    if here.main:
        print(describe(stage, plan), flush=True)
    return run(PretrainTask(stage.settings, here, plan), stage.settings, here, stage)


def describe(stage: Stage, plan: Plan) -> str:
    if stage.count == 1:
        return plan.describe()
    before = f"stage {stage.number - 1}" if stage.number > 1 else ""
    return f"{stage.title}, from step {stage.first}\n{plan.describe(before)}"


if __name__ == "__main__":
    run_command(PretrainSettings, main, options=OPTIONS)
