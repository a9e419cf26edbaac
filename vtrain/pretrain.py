"""Train a decoder on token shards.

    torchrun --nproc-per-node 8 -m vtrain.pretrain --cfg my.toml
    python -m vtrain.pretrain --cfg quickstart/ar --dry-run

Writes run.out/metrics.jsonl, loss.png, checkpoints/ and final/ (a Hugging Face style folder with the tokenizers).
Started again, it goes on from the newest checkpoint.
"""

from __future__ import annotations

from vtrain.config import run_command
from vtrain.describe import describe_batch
from vtrain.dist.mesh import set_threads, world
from vtrain.settings import PretrainSettings
from vtrain.train.loop import run
from vtrain.train.tasks.pretrain import Plan, PretrainTask


def main(settings: PretrainSettings, dry_run: bool = False) -> None:
    set_threads(settings.run.threads)
    plan = Plan(settings)
    if dry_run:
        print(plan.describe())
        print(describe_plan_batch(plan))
        return
    with world(settings.run.device) as here:
        if here.main:
            print(plan.describe(), flush=True)
        run(PretrainTask(settings, here, plan), settings, here)


def describe_plan_batch(plan: Plan) -> str:
    """The first packed batch of a run as the model sees it."""
    step = next(iter(plan.loader()))
    return describe_batch(step.batches[0], plan.sources[0].dataset, [s.name for s in plan.sources])


if __name__ == "__main__":
    run_command(PretrainSettings, main)
