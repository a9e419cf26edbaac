"""The benchmarks' trees as their scorers walk them; those walks are written here from the scorers' sources."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from vtrain.generate.benchmarks import is_whole, layout, metadata, write_sheet

PROMPTS = [
    {"tag": "two_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "counting", "include": [], "prompt": "a photo of nothing", "prefix": "A sketch of "},
    {"tag": "colors", "include": [{"class": "bär", "count": 1}], "prompt": "a photo of a bär"},
]


def smooth(seed: int, side: int = 32) -> np.ndarray:
    """uint8[side, side, 3] without detail, as JPEG keeps it."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC))


def walk_geneval(root) -> list[tuple[str, str, int]]:
    """(folder, prompt, pictures) as evaluate_images.py finds them."""
    found = []
    for folder in sorted(os.listdir(root)):
        if os.path.isdir(root / folder) and folder.isdigit():
            with open(root / folder / "metadata.jsonl") as file:
                entry = json.load(file)
            assert isinstance(entry["tag"], str)
            names = [n for n in os.listdir(root / folder / "samples") if re.match(r"\d+\.png", n)]
            found.append((folder, entry["prompt"], len(names)))
    return found


@pytest.mark.parametrize("bench", ["", "geneval"])
def test_geneval_finds_its_tree(tmp_path, bench):
    for sheet in layout(bench, PROMPTS, 4):
        write_sheet(tmp_path / sheet.path, smooth(0)[None], sheet.side)
    for name, text in metadata(bench, PROMPTS).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "grid.png").touch()
    assert walk_geneval(tmp_path) == [(f"{i:05d}", entry["prompt"], 4) for i, entry in enumerate(PROMPTS)]
    assert sorted(os.listdir(tmp_path / "00002" / "samples")) == [f"{k:05d}.png" for k in range(4)]


def test_every_sample_has_one_place():
    for bench in ("", "geneval", "dpg"):
        sheets = layout(bench, [{**entry, "name": f"n{i}"} for i, entry in enumerate(PROMPTS)], 4)
        assert [sample for sheet in sheets for sample in sheet.samples] == [(i, k) for i in range(3) for k in range(4)]
        assert len({sheet.path for sheet in sheets}) == len(sheets)


def test_dpg_cuts_out_the_four_samples(tmp_path):
    entries = [{"prompt": "a", "name": "COCOval2014000000000042"}, {"prompt": "b", "name": "256"}]
    sheets = layout("dpg", entries, 4)
    assert metadata("dpg", entries) == {}
    for i, sheet in enumerate(sheets):
        write_sheet(tmp_path / sheet.path, np.stack([smooth(10 * i + k) for k in range(4)]), sheet.side)
    names = os.listdir(tmp_path / "images")
    assert {os.path.basename(name).split(".")[0] for name in names} == {"COCOval2014000000000042", "256"}
    side = 32
    crops = [(0, 0, side, side), (side, 0, 2 * side, side), (0, side, side, 2 * side), (side, side, 2 * side, 2 * side)]
    for i, sheet in enumerate(sheets):
        image = Image.open(tmp_path / sheet.path)
        assert image.format == "JPEG"
        assert image.size == (64, 64)
        for k, crop in enumerate(crops):
            difference = np.asarray(image.crop(crop)).astype(int) - smooth(10 * i + k)
            assert np.abs(difference).mean() < 2  # of 256 levels; another sample differs by dozens
            assert np.abs(np.asarray(image.crop(crop)).astype(int) - smooth(10 * i + (k + 1) % 4)).mean() > 10


@pytest.mark.parametrize("per_prompt", [1, 2, 3, 5, 16])
def test_dpg_takes_four_samples(per_prompt):
    with pytest.raises(ValueError, match=rf"sample.per_prompt is {per_prompt}; expected 4, .* as 2 x 2"):
        layout("dpg", [{"prompt": "a", "name": "a"}], per_prompt)


def test_wide_pictures_are_put_row_by_row(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), dtype=np.uint8)
    write_sheet(tmp_path / "x.png", pictures, 2)
    expected = np.block([[[pictures[0]], [pictures[1]]], [[pictures[2]], [pictures[3]]]])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), expected)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_only_a_whole_picture_of_the_right_size_counts(tmp_path, name):
    path = tmp_path / name
    assert not is_whole(path, (32, 32))
    write_sheet(path, smooth(1)[None], 1)
    assert is_whole(path, (32, 32))
    assert not is_whole(path, (32, 64))
    data = path.read_bytes()
    for broken in (b"", b"no picture", data[: len(data) // 2], data[: len(data) * 3 // 4]):
        path.write_bytes(broken)
        assert not is_whole(path, (32, 32))
    path.unlink()
    path.mkdir()
    assert not is_whole(path, (32, 32))
