"""SentencePiece models: training small ones, and the same ids as the library and a plain slow encoder."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import sentencepiece
from text.text_samples import SENTENCES, random_text

from vtrain.text import load_text_tokenizer, train_sentencepiece

CAPTIONS = [
    f"{form} {word}"
    for form in ("a handwritten", "the digit", "a drawing of the number")
    for word in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
]


def merged(text: str, processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    """SentencePiece's BPE the slow way: join the neighbours of the best score, characters without a piece as bytes."""
    piece_of = {processor.IdToPiece(i): i for i in range(len(processor)) if not processor.IsByte(i)}
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        joined = ["".join(pair) for pair in pairwise(symbols)]
        scores = [(processor.GetScore(piece_of[j]), -i) for i, j in enumerate(joined) if j in piece_of]
        if not scores:
            break
        at = -max(scores)[1]
        symbols[at : at + 2] = [joined[at]]
    ids = []
    for symbol in symbols:
        byte_ids = [processor.PieceToId(f"<0x{b:02X}>") for b in symbol.encode()]
        ids += [piece_of[symbol]] if symbol in piece_of else byte_ids
    return ids


@pytest.mark.parametrize("size", [32, 64, 100])
def test_small_vocabularies(size, tmp_path):
    path = train_sentencepiece(CAPTIONS, size, tmp_path / "new" / "text.model")
    tokenizer = load_text_tokenizer(path)
    assert tokenizer.vocab_size == size + 256 + 4
    for text in [*CAPTIONS, "Zero!", "  two  spaces ", "\u00e9\n\t\U0001f600", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(CAPTIONS[0])) < len(CAPTIONS[0])


def test_equals_a_slow_encoder_and_the_library(tmp_path):
    path = train_sentencepiece(SENTENCES, 400, tmp_path / "text.model")
    tokenizer = load_text_tokenizer(path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    rng = random.Random(3)
    texts = [*SENTENCES, *(random_text(rng).replace("\u2581", "") for _ in range(500))]
    for text in filter(None, texts):
        ids = tokenizer.encode(text)
        assert ids == processor.EncodeAsIds(text)
        if "\x00" not in text:
            assert ids == merged(text, processor), repr(text)
            assert tokenizer.decode(ids) == text


def test_training_is_reproducible(tmp_path):
    first = train_sentencepiece(CAPTIONS, 64, tmp_path / "a.model").read_bytes()
    assert train_sentencepiece(iter(CAPTIONS), 64, tmp_path / "other" / "b.model").read_bytes() == first
    assert train_sentencepiece(CAPTIONS[1:], 64, tmp_path / "c.model").read_bytes() != first


def test_lone_surrogates_are_learned_as_what_they_are_encoded_as(tmp_path):
    broken = train_sentencepiece([*CAPTIONS, "a \ud800"], 64, tmp_path / "broken.model").read_bytes()
    assert broken == train_sentencepiece([*CAPTIONS, "a \ufffd"], 64, tmp_path / "whole.model").read_bytes()


def test_without_byte_fallback(tmp_path):
    tokenizer = load_text_tokenizer(train_sentencepiece(CAPTIONS, 64, tmp_path / "t.model", byte_fallback=False))
    assert tokenizer.vocab_size == 64 + 4
    assert tokenizer.special_id("<|t2i|>") == 64
    assert 0 in tokenizer.encode("Q")


def test_sizes_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"t.model: the texts carry at most (\d+) pieces, vocab_size is 5000") as error:
        train_sentencepiece(CAPTIONS, 5000, tmp_path / "t.model")
    most = int(str(error.value).rsplit("take ", 1)[1].split()[0])
    train_sentencepiece(CAPTIONS, most, tmp_path / "most.model")
    with pytest.raises(ValueError, match=r"vocab_size is 10; the texts' characters alone need more than \d+ pieces"):
        train_sentencepiece(CAPTIONS, 10, tmp_path / "t.model")
    with pytest.raises(ValueError, match=r"t.model: SentencePiece training failed: .*as int"):
        train_sentencepiece(CAPTIONS, 10**19, tmp_path / "t.model")
    with pytest.raises(ValueError, match="no text to train"):
        train_sentencepiece(["", "  "], 64, tmp_path / "t.model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["most.model"]


def test_specials_divide_the_text(tmp_path):
    tokenizer = load_text_tokenizer(train_sentencepiece(CAPTIONS, 64, tmp_path / "t.model"))
    t2i, soi = tokenizer.special_id("<|t2i|>"), tokenizer.special_id("<|soi|>")
    ids = tokenizer.encode("<|t2i|>the digit one<|soi|>", allow_specials=True)
    assert ids == [t2i, *tokenizer.encode("the digit one"), soi]
    assert tokenizer.decode(ids) == "<|t2i|>the digit one<|soi|>"
    plain = tokenizer.encode("<|t2i|>the digit one<|soi|>")
    assert max(plain) < t2i
    assert tokenizer.decode(plain) == "<|t2i|>the digit one<|soi|>"


def test_a_broken_model(tmp_path):
    data = train_sentencepiece(CAPTIONS, 64, tmp_path / "t.model").read_bytes()
    (tmp_path / "cut.model").write_bytes(data[: len(data) // 2 + 1])
    (tmp_path / "other.model").write_bytes(b"\n\xff\xff\xff")
    for name in ("cut.model", "other.model"):
        with pytest.raises(ValueError, match=rf"{name}: not a SentencePiece model") as error:
            load_text_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)
