"""Train a decoder on token shards.

    torchrun --nproc-per-node 8 -m vtrain.pretrain --cfg my.toml
    python -m vtrain.pretrain --cfg quickstart/ar --dry-run

Writes run.out/metrics.jsonl, loss.png, checkpoints/ and final/ (a Hugging Face style folder with the tokenizers).
Started again, it goes on from the newest checkpoint.
"""

from __future__ import annotations

from vtrain.config import run_command
from vtrain.dist.mesh import set_threads, world
from vtrain.settings import PretrainSettings
from vtrain.train.loop import run
from vtrain.train.tasks.pretrain import Plan, PretrainTask


def main(settings: PretrainSettings, dry_run: bool = False) -> None:
    set_threads(settings.run.threads)
    plan = Plan(settings)
    if dry_run:
        print(plan.describe())
        print(plan.describe_batch())
        return
    with world(settings.run.device, settings.run.timeout_s, settings.run.deterministic) as here:
        if here.main:
            print(plan.describe(), flush=True)
        run(PretrainTask(settings, here, plan), settings, here)


if __name__ == "__main__":
    run_command(PretrainSettings, main)
