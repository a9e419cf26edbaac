"""The smoke set of scripts/photographs.py, and the shipped SimpleAR commands on it, from pictures to pictures."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from vtrain.data import Dataset
from vtrain.models.hf import read_hf_config

ROOT = Path(__file__).parent.parent
RUNS = "runs/simplear/smoke"
PHOTOS = ("cat", "coins", "rocket")


def load_script():
    spec = importlib.util.spec_from_file_location("photographs", ROOT / "scripts" / "photographs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_set(photographs, out: Path) -> Path:
    """Three photographs at one scale and three scans of every digit."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = {name: photographs.PHOTOGRAPHS[name] for name in PHOTOS}
        patch.setattr(photographs, "PHOTOGRAPHS", chosen)
        patch.setattr(photographs, "SCALES", (0.75,))
        patch.setattr(photographs, "SCANS", 3)
        patch.setattr(photographs, "HELD_OUT", 3)
        photographs.export(out)
    return out


@pytest.fixture(scope="module")
def photographs():
    return load_script()


@pytest.fixture(scope="module")
def exported(photographs, tmp_path_factory) -> Path:
    return small_set(photographs, tmp_path_factory.mktemp("photographs"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_list(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def subject(entry: dict) -> str:
    return Path(entry["image_path"]).stem.rpartition("-")[0]


def test_export_writes_the_same_every_time(photographs, exported, tmp_path):
    assert contents(small_set(photographs, tmp_path)) == contents(exported)


def test_export_is_captioned_square_and_split(photographs, exported):
    train, valid = read_list(exported, "train"), read_list(exported, "valid")
    names = [entry["image_path"] for entry in train + valid]
    assert len(names) == len(set(names)) == len(list((exported / "images").iterdir()))
    assert {subject(e) for e in train} == {subject(e) for e in valid} == {*PHOTOS, *photographs.DIGITS}
    assert {Image.open(exported / name).size for name in names} == {(32, 32)}
    prompts = (exported / "prompts.txt").read_text().splitlines()
    assert len(prompts) == 13
    assert set(prompts) <= {entry["caption"] for entry in train}


def test_every_caption_names_one_subject_and_has_a_short_form(photographs):
    captions = [caption for texts in photographs._captions().values() for caption in texts]
    assert len(captions) == 2 * (14 + 10) == len(set(captions))
    assert all(caption.isascii() and caption.count(".") == 2 and caption.endswith(".") for caption in captions)
    shorts = [caption.partition(".")[0] for caption in captions]
    assert len(set(shorts)) == len(shorts)


def test_neighbouring_crops_are_whole_codes_apart(photographs):
    """At 8 codes a side one stride is one code: what two neighbours share is pixel for pixel the same."""
    rng = np.random.default_rng(0)
    side = 640  # 0.6 of it is 12 x 32 pixels: no rounding
    photograph = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).filter(ImageFilter.BoxBlur(9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photographs, "SCALES", (0.6,))
        crops = [np.asarray(crop).astype(int) for crop in photographs._crops(photograph)]
    assert len(crops) == 25
    shift = photographs.SIDE // 8
    inner = slice(4, 24)  # a resampling filter looks 3 pixels past an edge
    assert abs(crops[0][inner, shift:][:, inner] - crops[1][inner, :-shift][:, inner]).max() <= 1
    assert abs(crops[0][shift:, inner][inner] - crops[5][:-shift, inner][inner]).max() <= 1


def draw(photographs, exported: Path, out: Path, size: int, *, wrong: bool = False) -> Path:
    """A folder as vtrain.sample makes it: noisy held-out pictures, each under its caption or (wrong) another's."""
    rng = np.random.default_rng(size)
    entries = read_list(exported, "valid")
    for number, entry in enumerate(entries):
        others = [other for other in entries if subject(other) != subject(entry)]
        metadata = {"prompt": (others[number % len(others)] if wrong else entry)["caption"], "prefix": "A photo of "}
        folder = out / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        picture = Image.open(exported / entry["image_path"]).resize((size, size), Image.Resampling.BOX)
        noisy = np.asarray(picture) + rng.normal(0, 10, (size, size, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "samples" / "00000.png")
    return out


@pytest.mark.parametrize("size", [16, 32])
def test_score_tells_right_from_wrong_pictures(photographs, exported, tmp_path, size, capsys):
    counts = Counter(map(subject, read_list(exported, "valid")))
    assert photographs.score(exported, draw(photographs, exported, tmp_path / "right", size)) > 0.8
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert {name: lines[name] for name in PHOTOS} == {name: f"{counts[name]} of {counts[name]}" for name in PHOTOS}
    # A digit may look like another one; of the pictures under wrong captions none but such ones are taken for right.
    digits = sum(count for name, count in counts.items() if name not in PHOTOS)
    wrong = photographs.score(exported, draw(photographs, exported, tmp_path / "wrong", size, wrong=True))
    assert wrong <= 0.3 * digits / counts.total()


def call_script(photographs, *arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["photographs.py", *map(str, arguments)])
        try:
            photographs.main()
        except SystemExit as end:
            return end.code
    return 0


def test_the_script_ends_with_1_below_the_required_share(photographs, exported, tmp_path):
    right = draw(photographs, exported, tmp_path / "right", 16)
    wrong = draw(photographs, exported, tmp_path / "wrong", 16, wrong=True)
    assert call_script(photographs, "score", exported, wrong, right) == 0
    assert call_script(photographs, "score", exported, right, "--require", 0.5) == 0
    assert call_script(photographs, "score", exported, right, wrong, "--require", 0.5) == 1


def test_score_refuses_a_folder_without_pictures(photographs, exported, tmp_path):
    assert call_script(photographs, "score", exported, tmp_path) == (
        f"error: {tmp_path}: no sampled pictures (NNNNN/metadata.jsonl and NNNNN/samples/*.png)"
    )


def test_score_refuses_prompts_of_something_else(photographs, exported, tmp_path):
    folder = draw(photographs, exported, tmp_path, 16)
    (folder / "00001" / "metadata.jsonl").write_text('{"prompt": "a dog"}\n')
    assert call_script(photographs, "score", exported, folder) == (
        f"error: {folder}/00001/metadata.jsonl: the prompt is 'a dog'; expected a caption of the smoke set"
    )


def steps_of_script() -> list[list[str]]:
    """Module and arguments of every vtrain command in scripts/simplear.sh, in order."""
    text = (ROOT / "scripts" / "simplear.sh").read_text().replace("$runs", RUNS)
    found = [re.search(r"(?:^|\|\| )(?:run|python -m) (vtrain\..+)$", line) for line in text.splitlines()]
    return [match[1].split() for match in found if match]


# Far too short to learn anything: 16 pixels are 4 x 4 codes, 32 pixels 8 x 8, as in the recipes.
SMALL = {
    "vtrain.autoencoder": ["train.steps=4", "train.images_per_step=8", "optim.warmup=2", "model.base_channels=8"],
    "vtrain.pretrain": ["train.steps=4", "optim.warmup=2", "eval.every=4"],
    "vtrain.sample": ["sample.per_prompt=1"],
}
SHAPE = ["model.layers=2", "model.hidden=32", "model.heads=2", "model.kv_heads=2", "model.ffn=64"]


@pytest.mark.slow
def test_the_whole_way_from_pictures_to_pictures_of_twice_the_resolution(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_set(photographs, Path(RUNS, "data"))
    steps = steps_of_script()
    assert [step[0].removeprefix("vtrain.") for step in steps] == (
        ["text_tokenizer", "autoencoder", *["extract"] * 4, "pretrain", "pretrain", "sample", "sample"]
    )
    for module, *arguments in steps:
        shape = SHAPE if "simplear/smoke/pretrain" in arguments else []
        monkeypatch.setattr(sys, "argv", [module, *arguments, *SMALL.get(module, []), *shape])
        runpy.run_module(module, run_name="__main__")

    low, high = (Dataset(f"{RUNS}/shards{side}/train").schema for side in (16, 32))
    assert (low.image["resolution"], high.image["resolution"]) == (16, 32)
    assert low.image_tokenizer == high.image_tokenizer
    configs = [read_hf_config(Path(RUNS, stage, "final")) for stage in ("pretrain", "sft")]
    assert configs[0]["hidden_size"] == 32
    assert configs[0] == configs[1]
    texts = (Path(RUNS) / "data" / "prompts.txt").read_text().splitlines()
    for side in (16, 32):
        pictures = sorted(Path(RUNS, f"samples{side}").glob("*/samples/*.png"))
        assert len(pictures) == len(texts)
        assert {Image.open(path).size for path in pictures} == {(side, side)}
    photographs.score(Path(RUNS, "data"), Path(RUNS, "samples32"))
