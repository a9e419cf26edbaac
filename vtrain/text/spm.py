"""SentencePiece: reading a `.model` file and training a small one."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from vtrain.files import write_durably

BYTE_PIECES = 256


class SentencePieceModel:
    """A SentencePiece model without added tokens: text to ids and back. Its own normaliser lives in the file."""

    normalize = None

    def __init__(self, data: bytes, name: str) -> None:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(data)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: not a SentencePiece model ({_one_line(error)})") from None
        self._processor = processor
        self.size = processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.DecodeIds(ids)

    def token_id(self, content: str) -> int | None:
        """The id of the piece that is exactly `content`, None if there is none."""
        piece = self._processor.PieceToId(content)
        return piece if self._processor.IdToPiece(piece) == content else None


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, out_path: str | os.PathLike, *, byte_fallback: bool = True
) -> Path:
    """Train a BPE SentencePiece model and write it to `out_path`; returns the path.

    `vocab_size` counts `<unk>`, characters and learned pieces; byte fallback adds 256 byte pieces to them, so that any
    text can be encoded. There is no BOS or EOS, white space is kept as it is (a decoded text equals the encoded one),
    and the same texts give the same bytes: one thread, no timestamps. ValueError if the texts are empty or do not
    carry as many pieces, or if the characters alone are more than that; the message says how many would work.
    """
    texts = [without_surrogates(text) for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{out_path}: no text to train a tokenizer on")
    extra = BYTE_PIECES if byte_fallback else 0
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size + extra,
            byte_fallback=byte_fallback,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,  # bytes; longer texts would be left out without a word
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(_training_error(str(error), vocab_size, extra, out_path)) from None
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out_path, model.getvalue())
    return out_path


def without_surrogates(text: str) -> str:
    """The text with lone surrogates as U+FFFD: what can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _training_error(message: str, vocab_size: int, extra: int, out_path: str | os.PathLike) -> str:
    if found := re.search(r"value <= (\d+)", message):
        most = int(found[1]) - extra
        return f"{out_path}: the texts carry at most {most} pieces, vocab_size is {vocab_size}; take {most} or less"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        least = int(found[1]) - extra
        return f"{out_path}: vocab_size is {vocab_size}; the texts' characters alone need more than {least} pieces"
    return f"{out_path}: SentencePiece training failed: {_one_line(message)}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
