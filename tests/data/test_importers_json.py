"""JsonRecords against json.loads over the whole file: any range, chunk borders anywhere, broken files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vtrain._host import crc32c
from vtrain.data import json_list
from vtrain.data import json_records as records
from vtrain.data.json_records import Broken, JsonRecords

VALUES = [
    {"path": "a/0.npy", "caption": 'línea \U0001f600 "quoted" ] , ['},
    12345678901234567890,
    [],
    None,
    "  ,]  ",
    {"deep": [[{"x": [1, 2.5e-3, True]}]]},
    -7,
    {"long": "y" * 300},
]


@pytest.fixture(params=[1, 7, 64, 1 << 22])
def small(request, monkeypatch):
    """Chunks of a few bytes, an index entry every third record."""
    for module in (records, json_list):
        monkeypatch.setattr(module, "_CHUNK", request.param)
    monkeypatch.setattr(records, "GRAIN", 3)


def everything(found: JsonRecords) -> list:
    return [value for _, _, value in found.read(0, len(found))]


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list(tmp_path, small, ascii, indent):
    path = tmp_path / "meta.json"
    values = VALUES * 3
    path.write_text("\ufeff \n" + json.dumps(values, ensure_ascii=ascii, indent=indent) + " \n")
    found = JsonRecords(path)
    assert len(found) == len(values)
    assert found.crc == crc32c(path.read_bytes())
    for first, last in ((0, 24), (0, 1), (5, 11), (23, 24), (7, 7), (3, 99)):
        rows = list(found.read(first, last))
        assert [value for _, _, value in rows] == values[first:last]
        assert [number for number, _, _ in rows] == list(range(first, min(last, 24)))
    assert next(iter(found.read(4, 5)))[1] == "meta.json: element 4"


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_lines(tmp_path, small, end):
    path = tmp_path / "train.jsonl"
    lines = ["\ufeff" + json.dumps(VALUES[0], ensure_ascii=False), "", json.dumps(VALUES[7]), "   ", "{broken", "7"]
    path.write_text("\n".join(lines) + end)
    found = JsonRecords(path)
    assert len(found) == 6
    rows = list(found.read(0, 6))
    assert [number for number, _, _ in rows] == [0, 2, 4, 5]
    assert [name for _, name, _ in rows][-1] == "train.jsonl:6"
    assert rows[0][2] == VALUES[0]
    assert rows[1][2] == VALUES[7]
    assert isinstance(rows[2][2], Broken)
    assert rows[2][2].reason.startswith("not JSON")
    assert [value for _, _, value in found.read(4, 6)][1] == 7


@pytest.mark.parametrize("seed", range(3))
def test_random_ranges_of_many_lines(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(records, "_CHUNK", 50)
    monkeypatch.setattr(records, "GRAIN", 7)
    rng = np.random.default_rng(seed)
    values = [int(x) for x in 10 ** rng.integers(0, 18, 200)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f"{value}\n" for value in values))
    found = JsonRecords(path)
    for _ in range(20):
        first, last = sorted(rng.integers(0, 201, 2).tolist())
        assert [value for _, _, value in found.read(first, last)] == values[first:last]


@pytest.mark.parametrize("text", ["", "[]", " [ ] "])
def test_nothing(tmp_path, small, text):
    path = tmp_path / "empty.json"
    path.write_text(text)
    found = JsonRecords(path)
    assert (len(found), everything(found)) == (0, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1}, {"b": ', r"byte 11: not JSON"),
        ('[{"a": 1}', r"byte 9: the end of the file; expected , or \] in the list"),
        ("[1 2]", r"byte 3: '2'; expected , or \]"),
        ("[1] 2", r"byte 4: more after the list"),
        ("[1, oops]", r"byte 4: not JSON"),
        ("[1, ]", r"byte 4: not JSON"),
        ("[1", r"byte 2: the end of the file; expected"),
        ("[" * 100_000, r"byte 1: not JSON"),
    ],
)
def test_a_broken_list_is_refused(tmp_path, text, said):
    path = tmp_path / "meta.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"meta\.json: {said}"):
        JsonRecords(path)


def test_an_element_that_is_not_utf8_is_for_the_caller(tmp_path):
    path = tmp_path / "meta.json"
    path.write_bytes(b'[1, "\xff", 2]')
    values = everything(JsonRecords(path))
    assert (values[0], values[2]) == (1, 2)
    assert isinstance(values[1], Broken)


def test_what_is_no_json_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_CHUNK", 1 << 10)
    monkeypatch.setattr(json_list, "MAX_ELEMENT", 1 << 14)
    path = tmp_path / "meta.json"
    path.write_text('["' + "x" * (1 << 16))
    with pytest.raises(ValueError, match="not JSON"):
        JsonRecords(path)
