"""Pictures drawn while training: a grid of samples for fixed prompts, into `out/samples/step-N.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from vtrain.data.reader import Dataset
from vtrain.dist.mesh import World
from vtrain.generate.engine import generate
from vtrain.generate.pictures import decode_pictures, text_to_image_prompts
from vtrain.generate.prompts import draw_openers
from vtrain.models.decoder import Decoder
from vtrain.rng import fold
from vtrain.settings import TrainingPictures
from vtrain.text import load_text_tokenizer
from vtrain.visual import load_image_tokenizer
from vtrain.visual.sheets import draw_grid, write_png


class PictureDrawer:
    """Samples `sample.prompts` from the model in training, with the tokenizers that a dataset carries.

    They are of the size that the dataset was made at. Each prompt is drawn with one opener of data.prefixes, as the
    captions in training are. Every rank generates the same pictures, because a sharded decoder's forward is a
    collective; the main rank writes. ValueError if the dataset has no tokenizers.
    """

    def __init__(
        self,
        settings: TrainingPictures,
        dataset: Dataset,
        prefixes: Sequence[str],
        out: Path,
        seed: int,
        world: World,
    ) -> None:
        for asset in ("text_tokenizer", "image_tokenizer"):
            if not (dataset.path / asset).is_dir():
                raise ValueError(f"sample.every: {dataset.path} has no {asset}/ to draw pictures with")
        self.settings, self.out, self.seed, self.world = settings, out / "samples", seed, world
        self.image = load_image_tokenizer(dataset.path / "image_tokenizer", world.device)
        resolution = int(dataset.schema.image.get("resolution", self.image.resolution))
        self.side = resolution // self.image.downscale  # of the grid of codes
        self.prompts, self.uncond = text_to_image_prompts(
            settings.prompts,
            load_text_tokenizer(dataset.path / "text_tokenizer"),
            dataset.schema.vocab,
            settings.negative,
            openers=draw_openers(prefixes, len(settings.prompts), seed),
            caption_space=bool(dataset.schema.text.get("caption_space")),
        )

    def draw(self, root: nn.Module, decoder: Decoder, step: int) -> None:
        """`root` is the FSDP root around `decoder`, which has run at least one training step."""
        s = self.settings
        rows = [prompt for prompt in self.prompts for _ in range(s.per_prompt)]
        root.unshard()
        try:
            ids = generate(
                decoder,
                rows,
                [fold(0, n) for n in range(len(rows))],
                steps=self.side**2,
                cfg=s.cfg,
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                repetition_penalty=s.repetition_penalty,
                seed=self.seed,
                uncond_prompts=[self.uncond] * len(rows),
                batch_size=s.batch_size,
            )
        finally:
            root.reshard()
        if self.world.main:
            pictures = decode_pictures(ids, self.image, decoder.vocab, grid=(self.side, self.side))
            grid = draw_grid(s.prompts, [pictures[n : n + s.per_prompt] for n in range(0, len(rows), s.per_prompt)])
            write_png(self.out / f"step-{step:08d}.png", grid)
