"""Records with pictures through the import: conversations as the template has them, pictures byte by byte."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from crashes import tree
from PIL import Image

from vtrain.data import Loader, Source, make_composer
from vtrain.data.importers import Options, import_tokens
from vtrain.data.manifest import publish
from vtrain.data.reader import Dataset
from vtrain.data.schema import Modality, Role
from vtrain.data.twins import FeatureWriter, twin_path
from vtrain.data.verify import verify
from vtrain.text import load_text_tokenizer, train_sentencepiece
from vtrain.text.chat import TEMPLATES

SYSTEM = TEMPLATES["vicuna"].system


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (color, 7, 9)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(["what is this? a cat. two dogs USER ASSISTANT", SYSTEM], 60, folder / "tokenizer.model")
    load_text_tokenizer(folder / "tokenizer.model", specials=("</s>",)).save(folder)
    return folder


CONVERSATIONS = [
    ("a", ["0.png"], [("human", "<image>\nwhat is this?"), ("gpt", "a cat.")]),
    ("b", [], [("human", "what"), ("gpt", "this"), ("human", "is a cat"), ("gpt", "")]),
    ("c", ["1.png", "0.png"], [("system", "dogs"), ("human", "a <image> and <image>?"), ("gpt", "two dogs</s>")]),
    ("missing", ["no.png"], [("human", "<image>"), ("gpt", "a")]),
    ("text", ["text.png"], [("human", "<image>"), ("gpt", "a")]),
    ("marks", ["0.png"], [("human", "what"), ("gpt", "a")]),
    ("d", ["1.png"], [("human", "<image>"), ("gpt", "日本 \U0001f600")]),
]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    (folder / "0.png").write_bytes(png(0))
    (folder / "1.png").write_bytes(png(1))
    (folder / "text.png").write_text("no picture")
    rows = [
        {"id": i, "image": images, "conversations": [{"from": who, "value": said} for who, said in turns]}
        for i, images, turns in CONVERSATIONS
    ]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder: Path, tokenizer: Path, out: Path, *, kind="llava", records="talk.jsonl", part=0, parts=1, **options):
    options = Options(text_tokenizer=str(tokenizer), **({"template": "vicuna"} | options))
    return import_tokens(kind, [folder / records], out, samples_per_shard=2, options=options, part=part, parts=parts)


ROLES = {"human": Role.USER, "gpt": Role.ASSISTANT, "system": Role.SYSTEM}


def expected_pieces(turns) -> list[tuple[int, str | None]]:
    """(role, text or None for a picture) of a conversation, from the template written out by hand."""
    pieces = [] if turns[0][0] == "system" else [(Role.SYSTEM, SYSTEM), (Role.INPUT, " ")]
    for who, said in turns:
        head, tail = {"system": ("", " "), "human": ("USER: ", " "), "gpt": ("ASSISTANT: ", "")}[who]
        pieces.append((Role.INPUT, head))
        for number, part in enumerate(said.split("<image>")):
            pieces += [(Role.INPUT, None)] * (number > 0) + [(ROLES[who], part)]
        pieces += [(Role.ASSISTANT, "</s>")] if who == "gpt" else [(Role.INPUT, tail)]
    joined: list[tuple[int, str | None]] = []
    for role, text in pieces:
        if text is not None and joined and joined[-1][1] is not None and joined[-1][0] == role:
            joined[-1] = (role, joined[-1][1] + text)
        elif text != "":
            joined.append((role, text))
    return joined


def test_conversations_read_back(llava, tokenizer, tmp_path):
    report = run(llava, tokenizer, tmp_path / "out")
    kept = [row for row in CONVERSATIONS if row[0] in "abcd"]
    assert (report.complete, report.samples, report.skipped) == (True, 4, 3)
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert ["No such file" in skipped[0]["reason"], "not a picture" in skipped[1]["reason"]] == [True, True]
    assert "0 <image> marks for 1 images" in skipped[2]["reason"]
    assert [entry["record"] for entry in skipped] == ["talk.jsonl:4", "talk.jsonl:5", "talk.jsonl:6"]
    assert not verify(tmp_path / "out")
    dataset, text = Dataset(tmp_path / "out"), load_text_tokenizer(tmp_path / "out" / "text_tokenizer")
    assert len(np.unique(dataset.keys(np.arange(4)))) == 4
    for i, (_, images, turns) in enumerate(kept):
        ids, _ = dataset.read([i])
        segments, _ = dataset.segments([i])
        found = []
        for s in segments:
            said = text.decode(ids[s["start"] : s["start"] + s["length"]].tolist())
            found.append((Role(s["role"]), None if s["modality"] == Modality.FEATURE else said))
        expected = expected_pieces(turns)
        whole = "".join(said or "" for _, said in expected)
        assert "".join(text.decode(ids.tolist()).split()) == "".join(whole.split())  # runs get spaces
        # a token over two pieces stands in the second: white space moves along with it
        assert [(r, t and t.strip()) for r, t in found] == [(r, t and t.strip()) for r, t in expected if t != " "]
        blobs, _ = dataset.blobs("image").read([i])
        files = [(llava / name).read_bytes() for name in images]
        assert [blob for blob, s in zip(blobs, segments) if s["modality"] == Modality.FEATURE] == files
        assert all(not blob for blob, s in zip(blobs, segments) if s["modality"] != Modality.FEATURE)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_do_not_change_a_byte(llava, tokenizer, tmp_path, parts):
    run(llava, tokenizer, tmp_path / "one")
    for part in range(parts):
        run(llava, tokenizer, tmp_path / "many", part=part, parts=parts)
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_a_unit_with_a_damaged_twin_is_made_again(llava, tokenizer, tmp_path):
    run(llava, tokenizer, tmp_path / "whole")
    run(llava, tokenizer, tmp_path / "out", part=0, parts=2)
    twin = tmp_path / "out" / "shard-00000.image.vtf"
    data = bytearray(twin.read_bytes())
    data[5000] ^= 1
    twin.write_bytes(data)
    for part in (0, 1):
        run(llava, tokenizer, tmp_path / "out", part=part, parts=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_features_added_later_fill_the_slots(llava, tokenizer, tmp_path):
    """The way of an encoder's features: import, encode the blobs, add a twin, train with the chat composer."""
    run(llava, tokenizer, tmp_path / "out")
    before = Dataset(tmp_path / "out")
    files = []
    for shard in before.shards:
        count = shard.footer.sections["SEG"].count
        rows = np.zeros(count, dtype=np.int64)
        segments, _ = shard.segments(np.arange(len(shard)))
        rows[segments["modality"] == Modality.FEATURE] = 3
        with FeatureWriter(twin_path(shard.path, "tower"), shard, "tower", dim=2, dtype="f4", producer="t") as writer:
            writer.append(np.arange(rows.sum() * 2, dtype=np.float32).reshape(-1, 2), rows)
        files.append(vars(writer.info))
    twin = {"kind": "features", "dim": 2, "dtype": "f4", "producer": "t", "files": files}
    publish(before.path, before.schema, before.manifest.shards, skipped=before.manifest.skipped, twins={"tower": twin})
    dataset = Dataset(tmp_path / "out")
    composer = make_composer("chat", features="tower")
    lengths = composer.lengths(dataset, np.arange(4), 0)
    assert (lengths - dataset.lengths(np.arange(4))).tolist() == [3, 0, 6, 3]
    loader = Loader(
        [Source(dataset, max_epochs=1)], composer, dataset.schema.vocab, pack_tokens=2048, bins_per_step=1, caps=(32, 8)
    )
    (step,) = list(loader)
    (batch,) = step.batches
    slots = batch.slots["tower"]
    assert int((slots.index < 2048).sum()) == 12
    assert (batch.ids[slots.index[:12].long()] == -1).all()
    scored = batch.labels[batch.labels >= 0].numpy()
    said = load_text_tokenizer(dataset.path / "text_tokenizer").decode(scored.tolist())
    for answer in ("a cat.</s>", "two dogs</s></s>", "this</s>"):
        assert answer in said
    assert "what" not in said


def test_captions_and_pictures_of_tars(tokenizer, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("1.png", png(1)), ("1.txt", b"a cat."), ("2.png", png(2)), ("2.txt", b"two dogs")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for no_pictures, out in ((None, tmp_path / "out"), (True, tmp_path / "bare")):
        run(tmp_path, tokenizer, out, kind="webdataset", records="x.tar", template=None, no_pictures=no_pictures)
        dataset = Dataset(out)
        text = load_text_tokenizer(out / "text_tokenizer")
        assert [text.decode(dataset.read([i])[0].tolist()) for i in range(2)] == ["a cat.", "two dogs"]
        segments, _ = dataset.segments([0, 1])
        assert segments["modality"].tolist() == [Modality.TEXT, Modality.FEATURE] * 2
        assert bool(dataset.manifest.twins) == (no_pictures is None)
    assert Dataset(tmp_path / "out").blobs("image").read([1])[0][1] == png(2)


def test_a_pattern_names_many_tars(tokenizer, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"x-{number:03d}.tar", "w") as tar:
            for name, data in ((f"{number}.png", png(number)), (f"{number}.txt", b"a cat.")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    run(tmp_path, tokenizer, tmp_path / "out", kind="webdataset", records="x-{000..001}.tar", template=None)
    assert len(Dataset(tmp_path / "out")) == 2


def test_what_cannot_be_imported_is_said(llava, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no text tokenizer; expected --text-tokenizer"):
        import_tokens("llava", [llava / "talk.jsonl"], tmp_path / "o", options=Options(text_vocab=9))
    with pytest.raises(ValueError, match="2 inputs; expected one"):
        import_tokens(
            "llava", [llava / "talk.jsonl"] * 2, tmp_path / "o", options=Options(text_tokenizer=str(tokenizer))
        )
    with pytest.raises(ValueError, match="chat template 'x'; expected one of"):
        run(llava, tokenizer, tmp_path / "o", template="x")
    with pytest.raises(ValueError, match=r"7 of 7 records were skipped; .* the first: turns and no --template"):
        run(llava, tokenizer, tmp_path / "none", template=None)
    with pytest.raises(ValueError, match="7 of 7 records were skipped"):  # </s> is there, Qwen's tokens are not
        run(llava, tokenizer, tmp_path / "qwen", template="qwen2")
