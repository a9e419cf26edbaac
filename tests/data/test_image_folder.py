"""The image folder source: what a record is, and how broken caption files are refused."""

from __future__ import annotations

import hashlib
import json

import pytest

from vtrain.data.sources.image_folder import ImageFolder
from vtrain.data.sources.record import Record, Skipped, stable_key


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
        Record(stable_key("b/1.png"), "captions.jsonl:1", (tmp_path / "b/1.png",), ("one",)),
        Record(stable_key("a/2.png"), "captions.jsonl:3", (tmp_path / "a/2.png",), ("zwei \u00e9", "two")),
        Record(stable_key("3.png"), "captions.jsonl:5", (tmp_path / "3.png",), ("",)),
    ]


def test_keys_are_stable_and_never_zero():
    expected = int.from_bytes(hashlib.blake2b(b"a/2.png", digest_size=8).digest(), "little")
    assert stable_key("a/2.png") == expected
    assert len({stable_key(f"{i}.png") for i in range(10_000)}) == 10_000
    assert 0 < stable_key("\ud800.png") < 2**64


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
        ({"image": "x.png", "caption": list(map(str, range(257)))}, "257 captions; expected at most 256"),
        ({"image": "./good.png", "caption": "again"}, 'image "good.png" is already listed at captions.jsonl:1'),
    ],
)
def test_a_broken_line_is_named(line, said, tmp_path):
    with pytest.raises(ValueError) as error:
        folder(tmp_path, GOOD, "", line)
    assert str(error.value).startswith(f"{tmp_path / 'captions.jsonl'}:3: {said}")
    assert "\n" not in str(error.value)


def test_several_images_are_one_record_and_paths_outside_are_skipped(tmp_path):
    source = folder(
        tmp_path,
        {"image": ["a.png", "b.png"], "captions": "two"},
        {"image": "../secret.png", "caption": "x"},
        {"image": "/etc/passwd", "caption": "x"},
        {"image": "b/../../c.png", "caption": "x"},
        {"image": "a/../..png", "caption": "not outside"},
    )
    assert source[0].images == (tmp_path / "a.png", tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"captions.jsonl:1: 2 images; expected one"):
        source[0].only_image()
    outside = [record for record in source if isinstance(record, Skipped)]
    assert [record.name for record in outside] == [f"captions.jsonl:{n}" for n in (2, 3, 4)]
    assert outside[0].reason == "path '../secret.png' leads out of its folder"
    assert source[4].only_image() == tmp_path / "..png"


def test_other_field_names(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"file": "a.png", "short": "a", "long": ["b", "a", "c"]}]))
    source = ImageFolder(tmp_path, tmp_path / "list.json", image="file", captions=["short", "long"])
    assert source[0] == Record(stable_key("a.png"), "list.json[0]", (tmp_path / "a.png",), ("a", "b", "c"))
    other = ImageFolder(tmp_path, tmp_path / "list.json", image="file", captions=["short"])
    assert other.fingerprint() != source.fingerprint()


def test_a_folder_alone(tmp_path):
    for name in ("b.PNG", "a/1.jpeg", "a/\u00e9.webp", "a/notes.txt", ".hidden/2.png", "a/.3.png", "png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = ImageFolder(tmp_path)
    assert [record.name for record in source] == ["a/1.jpeg", "a/\u00e9.webp", "b.PNG"]
    assert source[0] == Record(stable_key("a/1.jpeg"), "a/1.jpeg", (tmp_path / "a/1.jpeg",))
    before = source.fingerprint()
    (tmp_path / "c.png").write_bytes(b"")
    assert ImageFolder(tmp_path).fingerprint() != before
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: empty; expected images"):
        ImageFolder(tmp_path / "none")


def test_units_cover_every_record_once(tmp_path):
    source = folder(tmp_path, *({"image": f"{i}.png", "caption": str(i)} for i in range(23)))
    for size in (1, 5, 23, 100):
        units = source.units(size)
        assert len(units) == -(-23 // size)
        assert [record for unit in units for record in source.read(unit)] == list(source)


def test_missing_and_empty_inputs(tmp_path):
    with pytest.raises(ValueError, match=r"captions.jsonl: empty"):
        folder(tmp_path, "", "  ")
    with pytest.raises(ValueError, match=r"nowhere: no such folder of images"):
        ImageFolder(tmp_path / "nowhere", tmp_path / "captions.jsonl")
    with pytest.raises(ValueError, match=r"none.jsonl: no such file of records"):
        ImageFolder(tmp_path, tmp_path / "none.jsonl")
