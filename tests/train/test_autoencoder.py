"""The autoencoder job end to end on toy pictures: ranks, resuming, bad images."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file

from vtrain.autoencoder import main
from vtrain.config import build
from vtrain.data.images import ImageLoader
from vtrain.data.sources.image_folder import ImageFolder
from vtrain.settings import AutoencoderSettings
from vtrain.train.tasks.autoencoder import Plan
from vtrain.visual import load_image_tokenizer


def write_pictures(folder: Path, count: int = 50) -> Path:
    """Two-colour gradients of 8 x 8 pixels."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for n in range(count):
        ends, slope = rng.integers(0, 256, (2, 3)), np.linspace(0, 1, 8)[:, None, None]
        pixels = (ends[0] * (1 - slope) + ends[1] * slope) * np.ones((1, 8, 1))
        pixels = np.rot90(pixels, n % 4).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{n}.png")
        lines.append(json.dumps({"image": f"images/{n}.png", "caption": f"picture {n}"}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set")


def settings(out: Path, data: Path, **changes) -> AutoencoderSettings:
    captions = str(data / "captions.jsonl")
    tree = {
        "run": {"out": str(out), "device": "cpu", "seed": 1},
        "input": {"images": str(data), "records": captions, "threads": 1},
        "eval": {"images": str(data), "records": captions, "every": 10},
        "model": {
            "resolution": 8,
            "base_channels": 8,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "latent_channels": 8,
            "attention": False,
            "embed_dim": 4,
            "num_embeddings": 16,
            "fsq_levels": [4, 3],
        },
        "optim": {"lr": 3e-3, "warmup": 2},
        "train": {"steps": 20, "images_per_step": 20, "micro_batch": 4},
        "log": {"every": 1, "sinks": []},
    }
    for section, keys in changes.items():
        tree.setdefault(section, {}).update(keys)
    return build(AutoencoderSettings, tree)


def records(out: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if r["kind"] == kind]


@pytest.fixture(scope="module", params=["vq", "fsq"])
def one_rank(request, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    run_ranks(1, main, settings(out, pictures, model={"quantizer": request.param}))
    return request.param, out


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_with_one(pictures, one_rank, tmp_path, ranks):
    quantizer, one_out = one_rank
    out = tmp_path / "out"
    run_ranks(ranks, main, settings(out, pictures, model={"quantizer": quantizer}))
    mine, one = records(out), records(one_out)
    assert len(mine) == len(one) == 20
    for name in ("loss", "loss/mse", "stat/perplexity", "stat/codes_used"):
        np.testing.assert_allclose([r[name] for r in mine], [r[name] for r in one], rtol=1e-5, atol=1e-5)
    assert [r["images"] for r in mine] == [20.0 * (n + 1) for n in range(20)]
    assert one[-1]["loss"] < 0.7 * one[0]["loss"]


def test_export_and_pictures(one_rank, pictures):
    _, out = one_rank
    tokenizer = load_image_tokenizer(out / "final")
    ids = tokenizer.encode(torch.zeros(2, 3, 8, 8))
    assert ids.shape == (2, 4, 4)
    assert tokenizer.decode(ids).shape == (2, 3, 8, 8)
    assert Image.open(out / "reconstructions.png").width > 200
    assert (out / "loss.png").is_file()


def test_resume_is_bitwise_on_cpu(pictures, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    changes = {"checkpoint": {"every": 4, "keep": 0, "best": False}, "train": {"steps": 8, "images_per_step": 20}}
    run_ranks(1, main, settings(straight, pictures, **changes))
    run_ranks(1, main, settings(resumed, pictures, **changes))
    shutil.rmtree(resumed / "checkpoints" / "step-00000008")
    shutil.rmtree(resumed / "final")
    run_ranks(1, main, settings(resumed, pictures, **changes))
    same = ("step", "loss", "grad_norm", "stat/perplexity", "images")
    assert [{k: r[k] for k in same} for r in records(resumed)] == [{k: r[k] for k in same} for r in records(straight)]
    mine, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (resumed, straight))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_refuses_to_resume_on_other_images(pictures, tmp_path):
    out, more = tmp_path / "out", write_pictures(tmp_path / "more", 51)
    train = {"steps": 2, "images_per_step": 20, "micro_batch": 4}
    main(settings(out, pictures, train=train))
    with pytest.raises(ValueError, match=r"input is 50 images, crc32c \w+ in the checkpoint and 51 images"):
        main(settings(out, more, train=train | {"steps": 3}))
    with pytest.raises(ValueError, match=r"run.seed is 1 .*and 2 here; train.images_per_step is 20 .*and 24 here"):
        main(settings(out, pictures, run={"out": str(out), "device": "cpu", "seed": 2},
                      train=train | {"steps": 3, "images_per_step": 24}))  # fmt: skip


def test_no_held_out_image_can_be_read(pictures, tmp_path):
    broken = shutil.copytree(pictures, tmp_path / "set")
    for path in (broken / "images").iterdir():
        path.write_bytes(b"broken")
    held_out = {"images": str(broken), "records": str(broken / "captions.jsonl"), "every": 1}
    with pytest.raises(ValueError, match="not one held-out image could be read"):
        main(settings(tmp_path / "out", pictures, eval=held_out))


def decode(record) -> np.ndarray:
    return np.array(Image.open(record.only_image()).convert("RGB"))


def test_resume_on_other_ranks(pictures, one_rank, tmp_path):
    quantizer, straight = one_rank
    out = tmp_path / "out"
    changes = {"checkpoint": {"every": 8, "keep": 0, "best": False}, "model": {"quantizer": quantizer}}
    run_ranks(3, main, settings(out, pictures, **changes))
    for folder in ("checkpoints/step-00000016", "checkpoints/step-00000020", "final"):
        shutil.rmtree(out / folder)
    run_ranks(2, main, settings(out, pictures, **changes))
    mine, one = records(out), records(straight)
    assert [r["step"] for r in mine] == list(range(1, 21))
    for name in ("loss", "stat/perplexity"):
        np.testing.assert_allclose([r[name] for r in mine], [r[name] for r in one], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [0, 4, 7])
def test_steps_hold_the_same_images_on_any_ranks(pictures, micro_batch):
    records = ImageFolder(pictures, pictures / "captions.jsonl")

    def keys(rank: int, world: int) -> list[list[int]]:
        loader = ImageLoader(
            records, decode, resolution=8, images_per_step=20, micro_batch=micro_batch, rank=rank, world=world
        )
        steps = loader.steps()
        found = []
        for _ in range(5):
            batches = next(steps)
            assert sum(b.count for b in batches) == sum(int(b.weights.sum()) for b in batches)
            found.append([k for b in batches for k in b.keys[: b.count].tolist()])
        steps.close()
        return found

    one = keys(0, 1)
    assert len({k for step in one for k in step}) == 50  # two passes, so every image
    assert all(len(step) == 20 for step in one)
    for world in (2, 3):
        per_rank = [keys(r, world) for r in range(world)]
        for number, step in enumerate(one):
            assert sorted(k for rank in per_rank for k in rank[number]) == sorted(step)


def test_an_unreadable_image_is_left_out_and_named(pictures, tmp_path, caplog):
    data = shutil.copytree(pictures, tmp_path / "set")
    (data / "images" / "3.png").write_bytes(b"\x89PNG broken")
    (data / "images" / "4.png").unlink()
    records = ImageFolder(data, data / "captions.jsonl")
    loader = ImageLoader(records, decode, resolution=8, images_per_step=50)
    batches = next(loader.steps())
    assert sum(b.count for b in batches) == 48
    assert set(loader.skipped) == {"captions.jsonl:4", "captions.jsonl:5"}
    assert "3.png" in caplog.text
    keys = [k for b in batches for k in b.keys[: b.count].tolist()]
    assert len(set(keys)) == 48
    assert all(b.weights.tolist() == [1.0] * b.count + [0.0] * (len(b.weights) - b.count) for b in batches)
    assert all((b.images[b.count :] == -1.0).all() and (b.keys[b.count :] == 0).all() for b in batches)


def test_dry_run(pictures, tmp_path, capsys):
    main(settings(tmp_path / "out", pictures), dry_run=True)
    said = capsys.readouterr().out
    assert "8.0 passes over 50 images" in said
    assert "held out: 50 images" in said
    assert not (tmp_path / "out").exists()


def test_records_of_other_kinds(pictures, tmp_path):
    lines = [json.loads(line) for line in (pictures / "captions.jsonl").read_text().splitlines()]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for line in lines:
            tar.add(pictures / line["image"], line["image"])
    talk = [{"from": "human", "value": "<image>"}]
    (tmp_path / "chat.json").write_text(json.dumps([{**line, "conversations": talk} for line in lines]))

    def images(**given) -> torch.Tensor:
        plan = Plan(settings(tmp_path / "out", pictures, input={"threads": 1, **given}, eval={"every": 0}))
        batches = plan.loader(plan.source).sequential()
        return torch.cat([batch.images[: batch.count] for batch in batches])

    expected = images(images=str(pictures), records=str(pictures / "captions.jsonl"))
    assert len(expected) == 50
    assert torch.equal(images(kind="webdataset", records=str(tmp_path / "a.tar")), expected)
    assert torch.equal(images(kind="llava", images=str(pictures), records=str(tmp_path / "chat.json")), expected)
    pyarrow.parquet.write_table(pyarrow.table({"image": ["0.png"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"input\.kind is parquet, which is read in order only"):
        images(kind="parquet", records=str(tmp_path / "a.parquet"))


def test_no_image_that_can_be_read(pictures, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    given = {"images": str(tmp_path / "elsewhere"), "records": str(pictures / "captions.jsonl"), "threads": 1}
    with pytest.raises(
        ValueError, match=r"50 images of .*: not one can be read; the first: .*0\.png: no such image file"
    ):
        main(settings(tmp_path / "out", pictures, input=given))
    assert not (tmp_path / "out").exists()


def test_no_image_at_all(tmp_path):
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"captions.jsonl: empty"):
        main(settings(tmp_path / "out", tmp_path))
