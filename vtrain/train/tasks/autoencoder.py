"""Training of image tokenizers: pixels in, reconstruction and commitment out, a codebook that follows the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vtrain._host import crc32c
from vtrain.data.images import ImageBatch, ImageLoader
from vtrain.data.schema import canonical_json
from vtrain.data.sources import IndexedSource, Record, Skipped, open_indexed
from vtrain.dist.comm import sum_over_ranks
from vtrain.dist.fsdp import full, shard
from vtrain.dist.mesh import World
from vtrain.objectives.autoencoder import AutoencoderObjective
from vtrain.settings import AutoencoderSettings, Images
from vtrain.train.loop import Work
from vtrain.train.optim import AdamW
from vtrain.train.tasks.root import Root, compute_dtype
from vtrain.visual.preprocess import load_image, square, to_uint8
from vtrain.visual.sheets import draw_grid, write_png
from vtrain.visual.tokenizer import save_image_tokenizer
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig

SHOWN = 16  # held-out images in the picture of reconstructions


class Plan:
    """What a configuration resolves to: the images and the network's shape."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        self.settings = settings
        self.config = AutoencoderConfig(**asdict(settings.model))
        given, held_out = settings.input, settings.eval
        self.source = open_indexed(**given.options())
        self._check_readable()
        self.eval_source: IndexedSource | None = None
        if held_out.every:
            options = given.options() | {"records": held_out.records, "images": held_out.images}
            self.eval_source = open_indexed(**options)

    def _check_readable(self) -> None:
        """ValueError where not one image can be read: training would go on with nothing. Ends at the first good one."""
        first = ""
        for record in self.source:
            try:
                _load(record)
                return
            except (ValueError, OSError) as error:
                first = first or str(error)
        raise ValueError(f"{self.source.describe()}: not one can be read; the first: {first}")

    def loader(self, records: Sequence[Record | Skipped], rank: int = 0, world: int = 1) -> ImageLoader:
        train, source = self.settings.train, self.settings.input
        return ImageLoader(
            records,
            lambda record: _decode(record, self.config.resolution, source),
            resolution=self.config.resolution,
            images_per_step=train.images_per_step,
            micro_batch=train.micro_batch,
            seed=self.settings.run.seed,
            rank=rank,
            world=world,
            threads=source.threads,
        )

    def describe(self) -> str:
        c, train = self.config, self.settings.train
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Autoencoder(c).parameters())
        side = c.resolution // c.downscale
        return "\n".join(
            [
                f"model: {c.quantizer} autoencoder, {c.resolution}x{c.resolution} pixels -> {side}x{side} codes of "
                f"{c.num_codes}, {parameters / 1e6:.2f} M parameters",
                f"step: {train.images_per_step} images; {train.steps} steps, "
                f"{train.steps * train.images_per_step / len(self.source):.1f} passes over {len(self.source)} images",
                f"held out: {len(self.eval_source or ())} images",
            ]
        )


def _load(record: Record | Skipped) -> Image.Image:
    if isinstance(record, Skipped):
        raise ValueError(f"{record.name}: {record.reason}")
    source = record.only_image()
    return load_image(source, name=record.name if isinstance(source, bytes) else "")


def _decode(record: Record, resolution: int, source: Images) -> np.ndarray:
    return square(_load(record), resolution, source.crop, source.filter)


class AutoencoderTask:
    """`vtrain.train.loop.Task` for an image tokenizer."""

    kind = "autoencoder"
    unit = "images"
    peak_flops = None

    def __init__(self, settings: AutoencoderSettings, world: World, plan: Plan | None = None) -> None:
        self.settings, self.world = settings, world
        self.plan = plan or Plan(settings)
        self.dtype = compute_dtype(settings.parallel.dtype, world)
        self.loader = self.plan.loader(self.plan.source, world.rank, world.size)
        self.step = 0
        self.steps: Iterator | None = None
        torch.manual_seed(settings.run.seed)
        model = Autoencoder(self.plan.config, seed=settings.run.seed).to(world.device)
        self.persistent = frozenset(model.state_dict())  # asked for once: with sharded parameters it costs a while
        loss = settings.loss
        self.root = Root(model, AutoencoderObjective(l1=loss.l1, l2=loss.l2, commitment=loss.commitment))
        shard(self.root, (), world, self.dtype)
        o = settings.optim
        adamw = AdamW(self.root.named_parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        self.optimizers = {"adamw": adamw}

    @property
    def model(self) -> Autoencoder:
        return self.root.model

    def next_work(self) -> Work:
        if self.steps is None:
            self.steps = self.loader.steps(self.step)
        batches = [b.to(self.world.device, self.dtype) for b in next(self.steps)]
        self.step += 1
        return Work(
            batches=batches,
            counts=[_counts(b) for b in batches],
            units=sum(b.count for b in batches),
            capacity=sum(len(b.weights) for b in batches),
        )

    def terms(self, optimizer: str, batch: ImageBatch) -> tuple[dict, dict]:
        return self.root(batch.images, batch.keys, batch.weights)

    def end_step(self, step: int, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """Move the codebook by what the step gathered; after a skipped step it stays as it was."""
        codebook = [b for name, b in self.model.named_buffers() if name in self.persistent]
        before = [buffer.clone() for buffer in codebook]
        stats = self.model.end_step(step)
        for buffer, old in zip(codebook, before):
            buffer.copy_(torch.where(kept > 0, buffer, old))
        return stats

    def show(self, step: int, averaged: Callable[[], AbstractContextManager]) -> None:
        """After an evaluation: the first held-out images above what is left of them, `out/reconstructions.png`."""
        every = self.settings.eval.every
        if self.plan.eval_source is None or not every or step % every:
            return
        held_out = self.plan.eval_source
        loader = self.plan.loader([held_out[i] for i in range(min(SHOWN, len(held_out)))], 0, 1)
        batch = next(loader.sequential()).to(self.world.device, self.dtype)
        images = batch.images[: batch.count]
        self.root.eval()
        with torch.no_grad(), averaged():
            self.root.unshard()
            restored = self.model(images)[0]
            self.root.reshard()
        self.root.train()
        if self.world.main:
            rows = [list(to_uint8(images)), list(to_uint8(restored))]
            grid = draw_grid(["held out", f"restored, step {step}"], rows)
            write_png(Path(self.settings.run.out) / "reconstructions.png", grid)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Means over the held-out images: the loss, its terms and the pixel errors."""
        if self.plan.eval_source is None:
            return {}
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for batch in self.plan.loader(self.plan.eval_source, self.world.rank, self.world.size).sequential():
            batch = batch.to(self.world.device, self.dtype)
            terms, stats = self.root(batch.images, batch.keys, batch.weights)
            parts = {"loss": sum(total * weight for total, weight in terms.values()), **stats}
            for name, total in parts.items():
                sums[name] = sums.get(name, 0.0) + float(total)
                counts[name] = counts.get(name, 0.0) + batch.count
        total = sum_over_ranks([*sums.values(), *counts.values()])
        if not total[-1]:
            raise ValueError(f"{self.plan.eval_source.describe()}: not one held-out image could be read")
        return {"held out": {n: s / c for n, s, c in zip(sums, total, total[len(sums) :])}}

    def identity(self) -> dict:
        return {"task": self.kind, "model": asdict(self.plan.config)}

    def state(self) -> dict:
        return {"step": self.step, "data": self._data()}

    def _data(self) -> dict:
        """What decides which images a step holds."""
        source = self.plan.source
        return {
            "run.seed": self.settings.run.seed,
            "train.images_per_step": self.settings.train.images_per_step,
            "input": f"{len(source)} images, crc32c {crc32c(canonical_json(source.fingerprint())):08x}",
        }

    def load_state(self, state: dict) -> None:
        theirs, ours = state["data"], self._data()
        differing = [
            f"{name} is {theirs[name]} in the checkpoint and {ours[name]} here"
            for name in ours
            if theirs[name] != ours[name]
        ]
        if differing:
            raise ValueError(f"the images of a step are others: {'; '.join(differing)}")
        self.step, self.steps = state["step"], None

    def export(self, folder: Path) -> None:
        """An image tokenizer's folder (`vtrain.visual.load_image_tokenizer`)."""
        tensors = {name: full(tensor) for name, tensor in self.model.weights().items()}
        if self.world.main:
            save_image_tokenizer(folder, self.plan.config, tensors)


def _counts(batch: ImageBatch) -> dict[str, float]:
    return dict.fromkeys(("reconstruction", "commitment", "mse", "l1"), float(batch.count))
