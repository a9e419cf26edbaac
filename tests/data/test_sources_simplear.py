"""The source simplear: SimpleAR's lists of pictures, patterns and YAML mixes of them, against a plain reading."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vtrain.data.sources import Record, Skipped, open_indexed, open_source
from vtrain.data.sources.record import stable_key
from vtrain.data.sources.simplear import SimpleARImages


def entries(first: int, count: int) -> list[dict]:
    return [{"image_path": f"p/{i}.jpg", "caption": f"caption {i}"} for i in range(first, first + count)]


def write(path: Path, values: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = map(json.dumps, values)
    path.write_text(f"[{', '.join(rows)}]" if path.suffix == ".json" else "\n".join(rows) + "\n")
    return path


def captions(source: SimpleARImages) -> list[int]:
    return [int(record.captions[0].split()[1]) for unit in source.units(7) for record in source.read(unit)]


@pytest.mark.parametrize("name", ["list.json", "list.jsonl"])
def test_records(name, tmp_path):
    values = [
        {"image_path": "./a//1.jpg", "caption": " two\nlines \r\n", "more": 1},
        {"image_path": "2.jpg", "caption": ["first", "", "second", "first"]},
        {"image_path": str(tmp_path / "b" / "." / "x" / ".." / "3.jpg"), "caption": "below"},
        {"image_path": "/elsewhere/4.jpg", "caption": ""},
        {"image_path": "../5.jpg", "caption": "x"},
        {"image_path": "6.jpg"},
        {"image_path": 7, "caption": "x"},
        {"image_path": "8.jpg", "caption": 8},
        [9],
    ]
    source = open_source("simplear", records=write(tmp_path / name, values))
    places = [f"list.json: element {i}" if name.endswith("json") else f"list.jsonl:{i + 1}" for i in range(9)]
    found = [record for unit in source.units(4) for record in source.read(unit)]
    assert found[:4] == [
        Record(stable_key("a/1.jpg"), places[0], (tmp_path / "a/1.jpg",), ("two lines",)),
        Record(stable_key("2.jpg"), places[1], (tmp_path / "2.jpg",), ("first", "second")),
        Record(stable_key("b/3.jpg"), places[2], (tmp_path / "b/x/../3.jpg",), ("below",)),
        Record(stable_key("/elsewhere/4.jpg"), places[3], (Path("/elsewhere/4.jpg"),), ()),
    ]
    assert found[4:] == [
        Skipped(places[4], "path '../5.jpg' leads out of its folder"),
        Skipped(places[5], "caption is null; expected a string or a list of strings"),
        Skipped(places[6], "image is 7; expected a path or a list of paths"),
        Skipped(places[7], "caption is 8; expected a string or a list of strings"),
        Skipped(places[8], "[9]; expected an object"),
    ]


def test_names_of_fields_and_a_root(tmp_path):
    path = write(tmp_path / "lists" / "a.json", [{"file": "1.jpg", "long": "l", "short": "s"}])
    (tmp_path / "images").mkdir()
    source = SimpleARImages(tmp_path / "images", path, image="file", captions=["short", "long"])
    assert source[0] == Record(stable_key("1.jpg"), "a.json: element 0", (tmp_path / "images/1.jpg",), ("s", "l"))


def test_patterns_and_mixes_stay_what_they_are_when_the_tree_moves(tmp_path):
    tree = tmp_path / "tree"
    write(tree / "x" / "a.json", entries(0, 5))
    write(tree / "y" / "a.jsonl", entries(1, 4))
    (tree / "mix.yaml").write_text(
        "datasets:\n- {json_path: 'y/*.jsonl', sampling_strategy: 'end:2'}\n- json_path: x/a.json\n"
    )
    named = [tree / "{x/a.json,y/a.jsonl}", tree, tree / "mix.yaml"]
    expected = [[0, 1, 2, 3, 4, 1, 2, 3, 4]] * 2 + [[3, 4, 0, 1, 2, 3, 4]]
    before = []
    for path, numbers in zip(named, expected):
        source = open_source("simplear", records=str(path))
        assert captions(source) == numbers
        keys = [record.key for record in source]
        assert len(set(keys)) == len(keys)  # two lists may have pictures of the same name, each in its folder
        before.append((source.fingerprint(), keys))
    mixed = open_source("simplear", records=named[2])
    read = [record for unit in mixed.units(3) for record in mixed.read(unit)]
    assert [r.name for r in read[:3]] == ["[0] a.jsonl:3", "[0] a.jsonl:4", "[1] a.json: element 0"]
    assert read[0].images == (tree / "y/p/3.jpg",)
    tree.rename(tmp_path / "moved")
    for path, kept in zip(named, before):
        source = open_source("simplear", records=str(path).replace("/tree", "/moved"))
        assert (source.fingerprint(), [record.key for record in source]) == kept


def test_a_part_of_a_long_list(tmp_path):
    """Ranges that begin between the entries of the index, of which there is one for 1024 records."""
    write(tmp_path / "a.json", entries(0, 3000))
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: a.json, sampling_strategy: 'random:10%'}]")
    source = open_indexed("simplear", records=str(tmp_path / "mix.yaml"))
    numbers = captions(source)
    assert len(numbers) == len(source) == math.ceil(300)
    assert numbers == sorted(set(numbers))
    assert 0.3 < sum(number >= 1500 for number in numbers) / 300 < 0.7
    assert [source[i].captions for i in (0, 150, 299)] == [(f"caption {numbers[i]}",) for i in (0, 150, 299)]
    assert captions(open_source("simplear", records=tmp_path / "mix.yaml")) == numbers


def test_blank_and_broken_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image_path": "1.jpg", "caption": "x"}\n\n{"image_path": \n')
    source = open_indexed("simplear", records=tmp_path / "a.jsonl")
    first, broken = (record for unit in source.units(9) for record in source.read(unit))
    assert first.images == (tmp_path / "1.jpg",)
    assert broken.name == "a.jsonl:3"
    assert broken.reason.startswith("not JSON")
    assert list(source) == [first, Skipped("a.jsonl, record 1", "a blank line"), broken]


def test_a_fingerprint_tells_every_change(tmp_path):
    path = write(tmp_path / "a.json", entries(0, 4))
    mix = tmp_path / "mix.yaml"
    mix.write_text("datasets: [{json_path: a.json, sampling_strategy: 'first:3'}]")
    seen = [open_source("simplear", records=p).fingerprint() for p in (path, mix)]
    seen.append(SimpleARImages(None, path, captions=["other", "caption"]).fingerprint())
    write(path, [*entries(0, 3), *entries(4, 1)])
    seen += [open_source("simplear", records=p).fingerprint() for p in (path, mix)]
    assert len(set(map(json.dumps, seen))) == 5
    assert str(tmp_path) not in json.dumps(seen)


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("[]", {}, r"a\.json: empty; expected a list of \{image_path, caption\}"),
        ("[1, ", {}, r"a\.json: byte 4: not JSON"),
        ("[1]", {"images": "nowhere"}, "nowhere: no such folder of images"),
        ("[1]", {"records": "{a,b}.json"}, r"b\.json: no such file"),
    ],
)
def test_refused(content, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        open_source("simplear", **{"records": "a.json", **options})
