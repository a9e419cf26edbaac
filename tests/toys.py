"""Small datasets and settings that several tests train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vtrain.config import build
from vtrain.data.format import SEGMENT, Modality, Role, Schema
from vtrain.data.manifest import publish
from vtrain.data.writer import ShardWriter
from vtrain.settings import PretrainSettings
from vtrain.text import train_sentencepiece
from vtrain.visual import ImageTokenizer
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=30, visual=16)
CAPTIONS = ["a red square", "the second one, blue", "three"]
CODES = 12  # of the image tokenizer of write_images
SPECIALS = {"<|t2i|>": 26, "<|soi|>": 27, "<|eoi|>": 28, "<|pad|>": 29}


def write_dataset(
    folder: Path,
    samples: int,
    *,
    seed: int = 0,
    side: int = 3,
    vocab: Vocabulary = VOCAB,
    per_shard: int = 40,
    **schema,
) -> Path:
    """A text-to-image dataset: two captions of 2..7 tokens and a side x side grid of codes that follows the caption."""
    rng = np.random.default_rng(seed)
    schema = Schema(vocab=vocab, specials=SPECIALS, **schema)
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number, first in enumerate(range(0, samples, per_shard)):
        count = min(per_shard, samples - first)
        with ShardWriter(folder / f"{number:05d}.vts", schema, uuid=bytes([number + seed] * 16)) as writer:
            parts = [_sample(rng, side, vocab) for _ in range(count)]
            ids = np.concatenate([p[0] for p in parts])
            offsets = np.cumsum([0, *(len(p[0]) for p in parts)])
            segments = np.concatenate([p[1] for p in parts])
            keys = rng.integers(1, 2**63, count, dtype=np.uint64)
            writer.append_batch(ids, offsets, segments, np.arange(count + 1) * 3, keys=keys)
            infos.append(writer.close())
    publish(folder, schema, infos)
    return folder


def _sample(rng: np.random.Generator, side: int, vocab: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    kind = int(rng.integers(0, 4))
    captions = [np.append(rng.integers(8, 20, rng.integers(1, 7)), kind) for _ in range(2)]
    codes = vocab["visual"].base + (kind * 4 + rng.integers(0, 2, side * side)) % vocab["visual"].size
    ids = np.concatenate([*captions, codes]).astype(np.int64)
    segments = np.zeros(3, dtype=SEGMENT)
    segments["start"] = [0, len(captions[0]), len(captions[0]) + len(captions[1])]
    segments["modality"] = [Modality.TEXT, Modality.TEXT, Modality.IMAGE]
    segments["role"] = [Role.INPUT, Role.INPUT, Role.TARGET]
    segments["variant"] = [0, 1, 0]
    for name, value in (("t", 1), ("h", side), ("w", side)):
        segments[name][2] = value
    return ids, segments


def write_images(root: Path, count: int) -> Path:
    """What extract needs: pictures of different sizes with 1..3 captions each, and two small tokenizers."""
    rng = np.random.default_rng(0)
    lines = []
    (root / "images").mkdir(parents=True)
    for i in range(count):
        height, width = rng.integers(5, 30, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        captions = CAPTIONS[: i % 3 + 1]
        lines.append({"image": f"{i}.png", "caption": captions[0] if i % 6 == 0 else captions})
    (root / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_sentencepiece(CAPTIONS, 40, root / "text.model")
    config = AutoencoderConfig(
        resolution=16, base_channels=8, channel_multiplier=(1, 1, 1), num_res_blocks=1, latent_channels=4,
        attention=False, embed_dim=4, num_embeddings=CODES,
    )  # fmt: skip
    torch.manual_seed(0)
    autoencoder = Autoencoder(config)
    autoencoder.load_weights({name: torch.randn_like(w) * 0.3 for name, w in autoencoder.weights().items()})
    ImageTokenizer(autoencoder).save(root / "vq")
    return root


def extract_arguments(inputs: Path, out: Path, *overrides: str) -> list[str]:
    """The command line of an extraction of what `write_images` wrote."""
    return [
        f"run.out={out}",
        "run.device=cpu",
        f"input.images={inputs / 'images'}",
        f"input.records={inputs / 'captions.jsonl'}",
        f"tokenizer.image={inputs / 'vq'}",
        f"tokenizer.text={inputs / 'text.model'}",
        "extract.samples_per_shard=5",
        "extract.batch_size=2",
        *overrides,
    ]


def pretrain_arguments(data: Path, out: Path, *overrides: str) -> list[str]:
    """The command line of six steps on `data`/train and `data`/valid that evaluate, save and delete often."""
    return [
        f"run.out={out}",
        "run.device=cpu",
        "run.seed=3",
        "model.preset=digits",
        *(f"model.{key}={value}" for key, value in {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2}.items()),
        "model.ffn=32",
        f'data.sources=[{{path="{data / "train"}"}}]',
        "data.pack_tokens=64",
        "data.prefetch=1",
        f'eval.sources=[{{path="{data / "valid"}"}}]',
        "eval.every=3",
        "optim.lr=0.3",  # too much: the best evaluation is that of step 3, whose weights are exported
        "optim.schedule=constant",
        "optim.warmup=6",
        "optim.grad_clip=0",
        "train.steps=6",
        "train.tokens_per_step=128",
        "checkpoint.every=2",
        "checkpoint.keep=1",
        "log.every=1",
        "log.sinks=[]",
        *overrides,
    ]


def pretrain_settings(out: Path, train_data: Path, valid_data: Path | None = None, **changes) -> PretrainSettings:
    """A run of a two-layer decoder; `changes` are {"section": {"key": value}}."""
    tree = {
        "run": {"out": str(out), "device": "cpu", "seed": 3},
        "model": {"preset": "digits", "layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 48},
        "data": {"sources": [{"path": str(train_data)}], "pack_tokens": 64, "prefetch": 1},
        "optim": {"lr": 1e-2, "warmup": 2},
        "train": {"steps": 6, "tokens_per_step": 256},
        "log": {"every": 1, "sinks": []},
    }
    if valid_data is not None:
        tree["eval"] = {"sources": [{"path": str(valid_data)}], "every": 3}
    for section, keys in changes.items():
        tree.setdefault(section, {}).update(keys)
    return build(PretrainSettings, tree)
