"""Train an image tokenizer (VQ or FSQ autoencoder) on a folder of images.

    torchrun --nproc-per-node 8 -m vtrain.autoencoder --cfg my.toml
    python -m vtrain.autoencoder --cfg quickstart/vq

Writes run.out/metrics.jsonl, loss.png, checkpoints/ and final/ (config.json and model.safetensors, which vtrain.extract
takes as tokenizer.image). Started again, it goes on from the newest checkpoint.
"""

from __future__ import annotations

from vtrain.config import run_command
from vtrain.dist.mesh import set_threads, world
from vtrain.settings import AutoencoderSettings
from vtrain.train.loop import run
from vtrain.train.tasks.autoencoder import AutoencoderTask, Plan


def main(settings: AutoencoderSettings, dry_run: bool = False) -> None:
    set_threads(settings.run.threads)
    plan = Plan(settings)
    if dry_run:
        print(plan.describe())
        batch = next(plan.loader(plan.source).steps())[0]
        print(f"batch: images {list(batch.images.shape)}, {batch.count} real, keys {batch.keys[:4].tolist()} ...")
        return
    with world(settings.run.device, settings.run.timeout_s, settings.run.deterministic) as here:
        if here.main:
            print(plan.describe(), flush=True)
        run(AutoencoderTask(settings, here, plan), settings, here)


if __name__ == "__main__":
    run_command(AutoencoderSettings, main)
