"""Sources that are lists of JSON: LLaVA's conversations and VGT's annotations; and what open_source takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtrain.config import load
from vtrain.data import json_list
from vtrain.data.sources import KINDS, Record, Skipped, Turn, open_source
from vtrain.data.sources.json_file import JsonFile
from vtrain.data.sources.llava import Llava
from vtrain.data.sources.record import stable_key
from vtrain.data.sources.vgt import Vgt
from vtrain.settings import ExtractSettings, Records


def talk(*said: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


CHATS = [
    {"id": "1", "image": "a/1.jpg", "conversations": talk("<image>\nWhat?", "A cat\u00e9.", "Sure?", "Yes.")},
    {"id": 1, "image": ["1.jpg", "2.jpg"], "conversations": talk("<image><image> Compare.", "Same.")},
    {"id": "t", "conversations": [{"from": "system", "value": "Be brief."}, *talk("Hi", "Ho")]},
    {"image": "3.jpg", "conversations": talk("no mark", "x")},
    {"image": "", "conversations": talk("<image>", "x")},
    {"image": "../4.jpg", "conversations": talk("<image>", "x")},
    {"image": "5.jpg", "conversations": [{"from": "robot", "value": "<image>"}]},
    {"image": "6.jpg", "conversations": []},
    {"image": "7.jpg"},
    {"image": 8, "conversations": talk("<image>")},
    "text",
]
REASONS = {
    3: "0 <image> marks for 1 images; expected as many",
    4: "1 <image> marks for 0 images; expected as many",
    5: "path '../4.jpg' leads out of its folder",
    6: 'conversations[0] is {"from": "robot", "value": "<image>"}; '
    'expected {"from": human, gpt or system, "value": text}',
    7: "conversations is []; expected a list of turns",
    8: "conversations is null; expected a list of turns",
    9: "image is 8; expected a path or a list of paths",
    10: '"text"; expected an object',
}


def write(path: Path, values: list) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(values))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(v).encode() for v in values))
    return path


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_llava_records(name, tmp_path):
    source = Llava(tmp_path, write(tmp_path / name, CHATS))
    place = "chat.json[{}]" if name.endswith("json") else "chat.jsonl:{}"
    places = [place.format(i if name.endswith("json") else 2 * i + 1) for i in range(len(CHATS))]
    records = list(source)
    assert [r.name for r in records] == places
    assert {i: r.reason for i, r in enumerate(records) if isinstance(r, Skipped)} == REASONS
    one, two, text = records[:3]
    assert one.images == (tmp_path / "a/1.jpg",)
    assert one.captions == ("A cat\u00e9.",)
    assert one.turns[:2] == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat\u00e9."))
    assert two.images == (tmp_path / "1.jpg", tmp_path / "2.jpg")
    assert (text.images, text.turns[0], text.captions) == ((), Turn("system", "Be brief."), ("Ho",))
    assert [r for unit in source.units(4) for r in source.read(unit)] == records


def test_llava_keys_and_captions(tmp_path):
    source = Llava(tmp_path, write(tmp_path / "a.json", CHATS), captions=["human"])
    assert source[0].captions == ("What?",)
    assert len({r.key for r in list(source)[:3]}) == 3
    moved = Llava(tmp_path, write(tmp_path / "b.jsonl", [*reversed(CHATS[:3]), CHATS[0]]))
    assert [r.key for r in moved] == [source[i].key for i in (2, 1, 0, 0)]
    assert source.fingerprint() != Llava(tmp_path, tmp_path / "a.json").fingerprint()


def test_a_broken_line_is_skipped_and_a_broken_list_refused(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_bytes(json.dumps(CHATS[0]).encode() + b'\n{"id": \n' + b"[" * 100_000 + b"\n\xff\n")
    first, *broken = Llava(tmp_path, path)
    assert isinstance(first, Record)
    assert [r.name for r in broken] == ["chat.jsonl:2", "chat.jsonl:3", "chat.jsonl:4"]
    assert all(r.reason.startswith("not JSON: ") for r in broken)
    (tmp_path / "chat.json").write_text("[1, ")
    with pytest.raises(ValueError, match=r"chat.json: byte 4: not JSON: Expecting value"):
        Llava(tmp_path, tmp_path / "chat.json")
    (tmp_path / "chat.json").write_text("[]")
    with pytest.raises(ValueError, match=r"chat.json: empty; expected conversations"):
        Llava(tmp_path, tmp_path / "chat.json")


def test_lines_in_a_file_called_json(tmp_path):
    (tmp_path / "x.json").write_text('\n {"a": 1}\n{"a": 2}')
    file = JsonFile(tmp_path / "x.json")
    assert [file[i] for i in range(len(file))] == [{"a": 1}, {"a": 2}]
    assert file.name(1) == "x.json:3"


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_a_list_is_not_held_in_memory(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_CHUNK", chunk)
    values = [{"a": "\u00e9 ] , ["}, [], None, 17, {"b": [{}]}]
    path = tmp_path / "x.json"
    path.write_text("\ufeff [" + " ,\n".join(json.dumps(v, ensure_ascii=False) for v in values) + "]\n", "utf-8")
    file = JsonFile(path)
    path.write_bytes(path.read_bytes().replace(b"17", b"23"))  # what is asked for is read then
    assert [file[i] for i in reversed(range(len(file)))] == [{"b": [{}]}, 23, *values[2::-1]]
    assert file.name(4) == "x.json[4]"


def vgt(tmp_path: Path, **options) -> Vgt:
    for name, data in {
        "n/1.json": b'{"caption_internlm2_short": "short", "other": ["o", "p"]}',
        "n/2.txt": "\ufeff words \u00e9\n".encode(),
        "n/3.json": b"{",
        "n/4.json": b"[]",
        "n/5.txt": b"\xff\xfe",
        "n/6.json": b'{"caption": 7}',
        "n/7.json": b'{"nothing": "here"}',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    entries = [{"image": f"{i}.png", "annotation": f"{i}.{'txt' if i in (2, 5) else 'json'}"} for i in range(1, 9)]
    entries += [{"image": "9.png", "caption": "inline"}, {"image": "10.png"}, {"annotation": "1.json"}]
    entries += [{"image": "11.png", "annotation": "../n/1.json"}, {"image": "12.png", "annotation": ["1.json"]}]
    (tmp_path / "lists").mkdir()
    write(tmp_path / "lists" / "a.json", entries[:5])
    write(tmp_path / "lists" / "b.jsonl", entries[5:])
    (tmp_path / "lists" / "readme.txt").write_text("no list")
    return Vgt(tmp_path, tmp_path / "lists", annotations=tmp_path / "n", **options)


def test_vgt_records(tmp_path):
    source = vgt(tmp_path)
    assert len(source) == 13
    good = [r for r in source if isinstance(r, Record)]
    assert good == [
        Record(stable_key("1.png"), "a.json[0]", (tmp_path / "1.png",), ("short",)),
        Record(stable_key("2.png"), "a.json[1]", (tmp_path / "2.png",), ("words \u00e9",)),
        Record(stable_key("9.png"), "b.jsonl:7", (tmp_path / "9.png",), ("inline",)),
    ]
    bad = {r.name: r.reason for r in source if isinstance(r, Skipped)}
    assert bad["a.json[2]"].startswith(f"{tmp_path / 'n/3.json'}: not JSON")
    assert bad["a.json[3]"] == f"{tmp_path / 'n/4.json'}: not a JSON object"
    assert "utf-8" in bad["a.json[4]"]
    assert bad["b.jsonl:1"] == "caption is 7; expected a string or a list of strings"
    assert bad["b.jsonl:3"].startswith("no caption; expected one of caption, ")
    assert bad["b.jsonl:5"] == f"{tmp_path / 'n/8.json'}: no such annotation"
    assert bad["b.jsonl:9"].startswith("no caption")
    assert bad["b.jsonl:11"] == "image is null; expected a path or a list of paths"
    assert bad["b.jsonl:13"] == "path '../n/1.json' leads out of its folder"
    assert bad["b.jsonl:15"].startswith("annotation is [")
    assert len(bad) == 10


def test_vgt_captions_by_name(tmp_path):
    assert vgt(tmp_path, captions=["other", "caption_internlm2_short"])[0].captions == ("o", "p", "short")


def test_open_source_takes_what_the_settings_say(tmp_path):
    write(tmp_path / "chat.json", CHATS[:1])
    given = load(
        ExtractSettings,
        None,
        [
            "input.kind=llava",
            f"input.records={tmp_path / 'chat.json'}",
            'input.fields.caption=["human"]',
            "run.out=x",
            "tokenizer.image=x",
            "tokenizer.text=x",
        ],
    ).input
    source = open_source(**given.options())
    assert source[0].images == (tmp_path / "a/1.jpg",)  # relative to the file's folder where none is named
    assert source[0].captions == ("What?",)
    assert tuple(KINDS) == Records.__dataclass_fields__["kind"].metadata["choices"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "lava"}, "input.kind is 'lava'; expected one of image_folder, "),
        *(({"kind": kind}, f"input.records is empty; expected {what}") for kind, what in KINDS.items()),
        ({"kind": "llava", "records": "none.json"}, "none.json: no such file of records"),
        ({"kind": "vgt", "records": "none.json", "images": "nowhere"}, "nowhere: no such folder"),
        ({"kind": "webdataset", "records": "a-{00..03}.tar"}, "a-00.tar: no such file"),
        ({"kind": "parquet", "records": "*.nothing"}, "*.nothing: no such file"),
    ],
)
def test_mistakes_in_naming_a_source(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        open_source(**options)
    assert str(error.value).startswith(said)
