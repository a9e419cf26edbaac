"""Prompts are encoded as the captions that a model is trained on: in training pictures, and by vtrain.sample."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from toys import CAPTIONS, extract_arguments, pretrain_settings, write_images

from vtrain import extract
from vtrain.config import load
from vtrain.generate.job import Job
from vtrain.generate.prompts import with_prefixes
from vtrain.generate.sampler import Sampling
from vtrain.pretrain import main
from vtrain.sample import load_model
from vtrain.settings import ExtractSettings
from vtrain.text.bpe import QWEN2_SPLIT
from vtrain.train import pictures
from vtrain.train.tasks.pretrain import Plan

SIDE = 4  # of the grid of codes
OPENERS = ["A photo of ", "A sketch of"]
NEGATIVE = "blue"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Pictures, an image tokenizer and, like Qwen's, a text tokenizer whose words take the space before them."""
    root = write_images(tmp_path_factory.mktemp("images"), 6)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"{opener} {caption}" for opener in OPENERS for caption in CAPTIONS], trainer)
    (root / "bpe").mkdir()
    tokenizer.save(str(root / "bpe" / "tokenizer.json"))
    return root


@pytest.mark.parametrize(("space", "prefixes"), [(True, OPENERS), (True, []), (False, [])])
def test_prompts_have_the_ids_of_training_documents(images, tmp_path, monkeypatch, space, prefixes):
    keys = [f"tokenizer.text={images}/bpe", f"extract.caption_space={str(space).lower()}"]
    extract.main(load(ExtractSettings, None, extract_arguments(images, tmp_path / "data", *keys)))
    drawn = {}

    def generate(decoder, prompts, keys, *, steps, uncond_prompts, **options):
        drawn.update(prompts=prompts, uncond=uncond_prompts[0])
        return torch.full((len(prompts), steps), decoder.vocab["visual"].base)

    monkeypatch.setattr(pictures, "generate", generate)
    settings = pretrain_settings(
        tmp_path / "run",
        tmp_path / "data",
        data={"sources": [{"path": str(tmp_path / "data")}], "pack_tokens": 128, "prefetch": 0,
              "prefixes": prefixes, "drop_caption": 0.0},
        train={"steps": 1, "tokens_per_step": 128},
        optim={"warmup": 0},
        sample={"every": 1, "prompts": CAPTIONS, "negative": NEGATIVE},
    )  # fmt: skip
    main(settings)
    trained = trained_texts(Plan(settings))
    assert len(drawn["prompts"]) == len(CAPTIONS)
    assert {tuple(p) for p in drawn["prompts"]} <= trained
    with Image.open(tmp_path / "run/samples/step-00000001.png") as image:
        assert min(image.size) > SIDE

    model = load_model(tmp_path / "run/final")
    entries = with_prefixes([{"prompt": caption} for caption in CAPTIONS], prefixes, settings.run.seed)
    job = Job(model, entries, tmp_path, Sampling(), 1, 1, negative=NEGATIVE)
    assert job.prompts == (drawn["prompts"], drawn["uncond"])
    start, *inside, end = drawn["uncond"]
    assert inside == model.text.encode(f" {NEGATIVE}" if space else NEGATIVE)
    whole = Job(model, [{"prompt": c, "prefix": o} for c in CAPTIONS for o in prefixes or [""]], tmp_path, Sampling(),
                1, 1)  # fmt: skip
    assert {tuple(p) for p in whole.prompts[0]} == trained
    assert whole.prompts[1] == [start, end]  # what training shows without a caption


def trained_texts(plan: Plan) -> set[tuple[int, ...]]:
    """What stands before the codes, of many documents."""
    found = set()
    for _, step in zip(range(12), plan.loader()):
        for batch in step.batches:
            bounds = batch.cu_seqlens.tolist()
            for first, last in pairwise(bounds[: 1 + batch.documents]):
                found.add(tuple(batch.ids[first : last - SIDE**2].tolist()))
    return found
