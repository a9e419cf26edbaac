"""The image folder source: what a record is, and how broken caption files are refused."""

from __future__ import annotations

import hashlib
import json

import pytest

from vtrain.data.sources.image_folder import ImageFolder, Record, image_key


def folder(tmp_path, *lines: str | bytes | dict) -> ImageFolder:
    encoded = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
               for line in lines]  # fmt: skip
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join(encoded))
    return ImageFolder(tmp_path, tmp_path / "captions.jsonl")


def test_records_in_file_order(tmp_path):
    source = folder(
        tmp_path,
        b'\xef\xbb\xbf{"image": "b/1.png", "caption": "one", "split": "train", "n": {"x": 1}}',
        "",
        {"image": "./a//2.png", "caption": ["zwei \u00e9", "two"]},
        "  \r",
        {"image": "b/../3.png", "caption": ""},
    )
    assert len(source) == 3
    assert list(source) == [
        Record(image_key("b/1.png"), tmp_path / "b/1.png", "b/1.png", ("one",), 1),
        Record(image_key("a/2.png"), tmp_path / "a/2.png", "a/2.png", ("zwei \u00e9", "two"), 3),
        Record(image_key("3.png"), tmp_path / "3.png", "3.png", ("",), 5),
    ]
    assert source[1:] == list(source)[1:]


def test_keys_are_stable_and_never_zero():
    expected = int.from_bytes(hashlib.blake2b(b"a/2.png", digest_size=8).digest(), "little")
    assert image_key("a/2.png") == expected
    assert len({image_key(f"{i}.png") for i in range(10_000)}) == 10_000
    assert 0 < image_key("\ud800.png") < 2**64


GOOD = {"image": "good.png", "caption": "fine"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"image": "x.png", "caption": ', "not JSON: Expecting value"),
        (b'{"image": "\xff.png", "caption": "x"}', "not JSON: 'utf-8' codec"),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        ("[1, 2]", "[1, 2]; expected an object"),
        ({"caption": "no image"}, "image is null; expected a path"),
        ({"image": 3, "caption": "x"}, "image is 3; expected a path"),
        ({"image": "", "caption": "x"}, 'image is ""; expected a path'),
        ({"image": "x.png"}, "caption is null; expected a string or a list of strings"),
        ({"image": "x.png", "caption": 7}, "caption is 7; expected"),
        ({"image": "x.png", "caption": []}, "caption is []; expected"),
        ({"image": "x.png", "caption": ["a", None]}, 'caption is ["a", null]; expected'),
        ({"image": "x.png", "caption": ["a"] * 257}, "257 captions; expected at most 256"),
        ({"image": "./good.png", "caption": "again"}, "image 'good.png' is already listed in line 1"),
    ],
)
def test_a_broken_line_is_named(line, said, tmp_path):
    with pytest.raises(ValueError) as error:
        folder(tmp_path, GOOD, "", line)
    assert str(error.value).startswith(f"{tmp_path / 'captions.jsonl'}:3: {said}")
    assert "\n" not in str(error.value)


def test_colliding_keys_name_both_images(tmp_path, monkeypatch):
    monkeypatch.setattr("vtrain.data.sources.image_folder.image_key", lambda image: 5)
    with pytest.raises(ValueError, match=r":2: image 'b.png' has the key of 'a.png' in line 1"):
        folder(tmp_path, {"image": "a.png", "caption": "x"}, {"image": "b.png", "caption": "x"})


def test_missing_and_empty_inputs(tmp_path):
    with pytest.raises(ValueError, match=r"captions.jsonl: empty"):
        folder(tmp_path, "", "  ")
    with pytest.raises(ValueError, match=r"nowhere: no such folder of images"):
        ImageFolder(tmp_path / "nowhere", tmp_path / "captions.jsonl")
    with pytest.raises(ValueError, match=r"none.jsonl: no such captions file"):
        ImageFolder(tmp_path, tmp_path / "none.jsonl")
