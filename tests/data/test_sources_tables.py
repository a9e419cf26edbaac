"""Parquet and Arrow tables, and the folders that Hugging Face's save_to_disk writes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vtrain.data.sources import Record, Skipped
from vtrain.data.sources.parquet import Table
from vtrain.data.sources.record import stable_key

ROWS = 10
LONG = bytes(range(256)) * 20  # base64 of it is longer than any path


def table(first: int = 0, count: int = ROWS) -> pa.Table:
    rows = range(first, first + count)
    return pa.table({"image": [b"png%d" % i for i in rows], "caption": [f"row {i}" for i in rows], "width": list(rows)})


def write(path: Path, data: pa.Table, group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(data, path, row_group_size=group)
        return path
    opened = pa.ipc.new_file if path.stem.endswith("file") else pa.ipc.new_stream
    with opened(path, data.schema) as writer:
        writer.write_table(data, max_chunksize=group)
    return path


def everything(source: Table, size: int = 4) -> list[Record | Skipped]:
    return [record for unit in source.units(size) for record in source.read(unit)]


@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 99])
def test_rows(name, size, tmp_path):
    source = Table(write(tmp_path / name, table()))
    assert source.total() == ROWS
    assert len(source.units(size)) == -(-ROWS // size)
    expected = [Record(stable_key(f"{name}:{i}"), f"{name}:{i}", (b"png%d" % i,), (f"row {i}",)) for i in range(ROWS)]
    assert everything(source, size) == expected


def test_a_folder_of_tables(tmp_path):
    for part in range(3):
        write(tmp_path / "all" / f"sub{part % 2}" / f"{part}.parquet", table(10 * part, part))
    source = Table(tmp_path / "all")
    assert [r.name for r in everything(source)] == ["sub0/2.parquet:0", "sub0/2.parquet:1", "sub1/1.parquet:0"]
    assert source.describe().startswith("3 rows of ")
    assert [r.name for r in everything(Table(tmp_path / "all" / "sub{0,1}" / "*.parquet"))] == [
        "sub0/2.parquet:0",
        "sub0/2.parquet:1",
        "sub1/1.parquet:0",
    ]


def test_every_form_of_a_picture(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "b/a.png"}, {"bytes": b"", "path": ""}, None]
    write(tmp_path / "struct.parquet", pa.table({"image": pa.array(cells, struct)}))
    good, path, empty, none = everything(Table(tmp_path / "struct.parquet", tmp_path))
    assert (good.images, path.images, none.images) == ((b"x",), (tmp_path / "b/a.png",), ())
    assert empty == Skipped("struct.parquet:2", 'image is ""; expected bytes or a path')
    encoded = base64.b64encode(LONG).decode()
    paths = ["a.png", "../a.png", encoded, encoded[:-2] + "!!"]
    write(tmp_path / "text.parquet", pa.table({"image": paths}))
    one, outside, data, broken = everything(Table(tmp_path / "text.parquet"))
    assert (one.images, data.images) == ((tmp_path / "a.png",), (LONG,))
    assert outside.reason == "path '../a.png' leads out of its folder"
    assert "not base64" in broken.reason
    write(tmp_path / "list.parquet", pa.table({"pictures": [[b"a", b"b"], []]}))
    several = everything(Table(tmp_path / "list.parquet", image="pictures"))
    assert [record.images for record in several] == [(b"a", b"b"), ()]


def test_captions_without_pictures(tmp_path):
    source = Table(write(tmp_path / "t.parquet", table()))
    (unit,) = source.units(100)
    found = list(source.read(unit, pictures=False))
    assert [(r.images, r.captions) for r in found] == [((), (f"row {i}",)) for i in range(ROWS)]


def test_captions_and_conversations(tmp_path):
    said = [[{"from": "human", "value": "<image> draw"}, {"from": "gpt", "value": " a cat "}], None, [{"from": "x"}]]
    data = pa.table({"image": [b"i"] * 3, "conversations": said, "text": [None, ["a", "b", "a"], None]})
    write(tmp_path / "t.parquet", data)
    talk, listed, bad = everything(Table(tmp_path / "t.parquet"))
    assert (talk.captions, talk.turns[0].role) == (("a cat",), "user")
    assert (listed.captions, listed.turns) == (("a", "b"), ())
    assert bad.reason.startswith("conversations[0] is {")
    human, *_ = everything(Table(tmp_path / "t.parquet", captions=["human"]))
    assert human.captions == ("draw",)
    write(tmp_path / "n.parquet", pa.table({"image": [b"i"], "caption": [7]}))
    (number,) = everything(Table(tmp_path / "n.parquet"))
    assert number.reason == "caption is 7; expected a string or a list of strings"


def save_to_disk(folder: Path, **state) -> Path:
    """As datasets 5.0 lays it out: IPC streams, state.json, dataset_info.json."""
    for part in range(2):
        write(folder / f"data-{part:05d}-of-00002.arrow", table(part * 4, 4))
    write(folder / "cache-0.arrow", table())  # what map() leaves there is no data of the set
    names = [{"filename": f"data-{part:05d}-of-00002.arrow"} for part in (1, 0)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_split": "train", **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_save_to_disk(tmp_path):
    source = Table(save_to_disk(tmp_path / "set" / "train"))
    assert [r.captions[0] for r in everything(source)] == [f"row {i}" for i in (4, 5, 6, 7, 0, 1, 2, 3)]
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"set: a folder of splits; take one of train$"):
        Table(tmp_path / "set")
    save_to_disk(tmp_path / "other", _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(ValueError, match=r"state.json: the rows are chosen by an indices file"):
        Table(tmp_path / "other")
    (tmp_path / "other" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"state.json: not what save_to_disk writes"):
        Table(tmp_path / "other")
    (tmp_path / "other" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(ValueError, match="leads out of its folder"):
        Table(tmp_path / "other")


def test_mistakes(tmp_path):
    write(tmp_path / "t.parquet", table())
    with pytest.raises(ValueError, match=r"t.parquet: no column 'picture' of images among image, caption, width; set "):
        Table(tmp_path / "t.parquet", image="picture")
    with pytest.raises(ValueError, match=r"t.parquet: no column 'words' of captions among caption, image, width"):
        Table(tmp_path / "t.parquet", captions=["caption", "words"])
    for name in ("bad.parquet", "bad.arrow"):
        for data in (b"", b"no table", b"ARROW1 no table", b"PAR1 no table"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(ValueError, match=f"{name}: cannot read the table: ") as error:
                Table(tmp_path / name)
            assert "\n" not in str(error.value)
    write(tmp_path / "none.parquet", table(0, 0))
    with pytest.raises(ValueError, match=r"none.parquet: no rows"):
        Table(tmp_path / "none.parquet")


def test_a_text_that_is_not_utf8_is_no_crash(tmp_path):
    buffers = [None, pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 3, 4))), pa.py_buffer(b"a\xff\xfeb")]
    texts = pa.Array.from_buffers(pa.string(), 3, buffers)
    path = write(tmp_path / "t.parquet", pa.table({"image": [b"x", b"y", b"z"], "caption": texts}))
    *_, last = everything(Table(path))
    assert isinstance(last, Skipped)
    assert "utf-8" in last.reason


@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow"])
def test_damaged_bytes_never_crash(name, tmp_path):
    """Refused, skipped or read as something else: tables carry no checksums that pyarrow asks for."""
    whole = write(tmp_path / name, table()).read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x40
        (tmp_path / name).write_bytes(damaged)
        refused = ""
        try:
            assert len(everything(Table(tmp_path / name))) <= ROWS + 3
        except ValueError as error:
            refused = str(error)
        assert not refused or (name in refused and "\n" not in refused)


def test_the_fingerprint_follows_the_content(tmp_path):
    path = write(tmp_path / "t.parquet", table())
    before = Table(path).fingerprint()
    assert Table(write(tmp_path / "moved" / "t.parquet", table())).fingerprint() == before
    assert Table(path, captions=["caption"]).fingerprint() != before
    write(path, table(1))
    assert Table(path).fingerprint() != before
