"""The text of a packed batch: every count, document and piece is where the batch has it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from vtrain.batch import Document, PackedBatch
from vtrain.data.format import Schema
from vtrain.describe import describe_batch
from vtrain.text import load_text_tokenizer, train_sentencepiece
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=200, visual=64)
SCHEMA = Schema(VOCAB, {"<|t2i|>": 196, "<|soi|>": 197})
CODE = VOCAB["visual"].base


@pytest.fixture
def dataset(tmp_path):
    return SimpleNamespace(path=tmp_path, schema=SCHEMA)


def build(documents, **shape):
    return PackedBatch.build(documents, VOCAB, **shape)


def test_without_a_text_tokenizer(dataset):
    loss = np.array([0, 0, 0.5, 1], dtype=np.float32)
    documents = [
        Document(np.array([196, 12, 197, CODE + 3]), key=2**64 - 1, loss=loss, source=1),
        Document(np.array([], dtype=np.int32), key=7),
        Document(np.array([-1, 5]), key=0xAB, positions=np.array([40, 41])),
    ]
    batch = build(documents, pack_tokens=8, max_documents=5)
    lines = describe_batch(batch, dataset, ["first", "second"]).splitlines()
    assert lines[0] == (
        "packed batch: 3 documents, 6 tokens of 8 (25.0% padding), max_seqlen 16, cu_seqlens [6], weighted"
    )
    assert lines[1] == "scored: next_token 2.5, text 1.5, visual 1"
    assert lines[2] == "document 0: rows 0..3, key 0xffffffffffffffff, source second"
    header, *rows = [line.split() for line in lines[3:8]]
    assert header == ["position", "id", "piece", "label", "predicts", "weight"]
    assert rows == [
        ["0", "196", "<|t2i|>", "-", "(not", "scored)", "-"],
        ["1", "12", "text[12]", "197", "<|soi|>", "0.5"],
        ["2", "197", "<|soi|>", str(CODE + 3), "visual[3]", "1"],
        ["3", str(CODE + 3), "visual[3]", "-", "(not", "scored)", "-"],
    ]
    assert lines[8] == "document 1: no rows, key 0x0000000000000007, source first"
    assert lines[9] == "document 2: rows 4..5, key 0x00000000000000ab, source first"
    assert [line.split() for line in lines[11:]] == [
        ["40", "-1", "(slot)", "5", "text[5]", "1"],
        ["41", "5", "text[5]", "-", "(not", "scored)", "-"],
    ]


def test_only_the_first_documents_are_shown_piece_by_piece(dataset):
    batch = build([Document(np.array([n, n + 1]), key=n + 1) for n in range(5)])
    lines = describe_batch(batch, dataset, ["only"], documents=2).splitlines()
    assert "all weights 1" in lines[0]
    assert "(0.0% padding)" in lines[0]
    assert sum(line.startswith("document ") for line in lines) == 5
    assert sum(line.startswith("  ") for line in lines) == 2 * (1 + 2)


def test_a_stretch_of_codes_shows_its_ends(dataset):
    """1,024 codes in 8 lines; where one of them differs in weight, label or place, that is seen."""

    def shown(document: Document) -> list[list[str]]:
        lines = describe_batch(build([document]), dataset, ["only"]).splitlines()
        return [line.split() for line in lines[4:]]

    ids = np.array([196, *range(20, 40), 197, *(CODE + np.arange(1024) % 64)])
    rows = shown(Document(ids))
    assert len(rows) == 22 + 4 + 1 + 4 + 1  # the last one is not scored: a stretch of its own
    assert [int(row[0]) for row in rows[:26]] == list(range(26))
    assert rows[26] == ["...", "1015", "more", "rows", "of", "visual"]
    assert [int(row[0]) for row in rows[27:]] == [1041, 1042, 1043, 1044, 1045]
    assert [row[2] for row in rows[22:26]] == [f"visual[{n}]" for n in range(4)]
    loss, positions = np.ones(len(ids), dtype=np.float32), np.arange(len(ids))
    loss[501], positions[800:] = 0.5, positions[800:] + 7
    rows = shown(Document(ids, loss=loss, positions=positions))
    numbers = [row[0] for row in rows if row[0] != "..."]
    assert {"496", "499", "500", "501", "504", "799", "807"} <= set(numbers)
    assert len(numbers) == 22 + 3 * 8 + 2
    nine = shown(Document(np.array([197, *(CODE + np.arange(10))])))
    assert all(row[0] != "..." for row in nine)
    assert len(nine) == 11


def test_a_batch_of_padding(dataset):
    lines = describe_batch(build([], pack_tokens=4), dataset, []).splitlines()
    assert lines[0].startswith("packed batch: 0 documents, 0 tokens of 4 (100.0% padding)")
    assert len(lines) == 2


def test_text_is_decoded_by_the_tokenizer_of_the_dataset(tmp_path):
    specials = ("<|t2i|>", "<|soi|>")
    captions = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("square", "circle")] * 20
    train_sentencepiece(captions, 40, tmp_path / "spm.model", byte_fallback=False)
    tokenizer = load_text_tokenizer(tmp_path / "spm.model", specials=specials)
    tokenizer.save(tmp_path / "text_tokenizer")
    assert tokenizer.vocab_size <= VOCAB["text"].size
    schema = replace(SCHEMA, specials={name: tokenizer.special_id(name) for name in specials})
    ids = [tokenizer.special_id("<|t2i|>"), *tokenizer.encode("a blue circle"), CODE]
    text = describe_batch(build([Document(np.array(ids))]), SimpleNamespace(path=tmp_path, schema=schema), ["only"])
    rows = text.splitlines()[4:]
    assert "<|t2i|>" in rows[0]
    for row, token in zip(rows[1:-1], ids[1:-1]):
        assert f" {tokenizer.decode([token])!r} " in row
    assert " visual[0] " in rows[-1]
