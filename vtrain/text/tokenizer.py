"""TextTokenizer: one face over SentencePiece, tiktoken and byte-level BPE files, with appended special tokens."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from vtrain.files import write_durably
from vtrain.text.added import AddedToken, AddedTokens
from vtrain.text.bpe_files import read_ranks, read_tokenizer_json, read_vocab_and_merges
from vtrain.text.spm import SentencePieceModel, without_surrogates

DEFAULT_SPECIALS = ("<|t2i|>", "<|soi|>", "<|eoi|>", "<|pad|>")

_SPECIALS_FILE = "specials.json"  # written by `save`, so that a saved folder loads to the same ids
_BESIDE_VOCAB = ("tokenizer_config.json", "added_tokens.json")


class Model(Protocol):
    """A tokenizer without added tokens: ids 0..size-1."""

    size: int

    @property
    def normalize(self) -> Callable[[str], str] | None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_id(self, content: str) -> int | None: ...


class TextTokenizer:
    """Ids 0..vocab_size-1: the file's own tokens, then the appended specials that the file does not have itself.

    Nothing is put before or after a text (no BOS, no EOS, no template).
    """

    def __init__(
        self, model: Model, added: Sequence[AddedToken], specials: Sequence[str], files: Mapping[str, bytes]
    ) -> None:
        self._model = model
        self._files = dict(files)
        self.specials = tuple(specials)
        self._added, self.vocab_size = _append_specials(model, added, self.specials)

    def encode(self, text: str, allow_specials: bool = False) -> list[int]:
        """Ids of a text. Special tokens in it are found only with `allow_specials`, otherwise they are plain text.

        Lone surrogates become U+FFFD.
        """
        ids: list[int] = []
        for part in self._added.split(without_surrogates(text), allow_specials):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            else:
                ids += self._model.encode(part)
        return ids

    def encode_joined(self, parts: Sequence[str]) -> list[list[int]]:
        """The ids of the parts joined to one text, cut where the parts meet; no special tokens in them.

        The BPE of a joined text is not the join of the parts' BPEs: a token that lies in two parts goes to the one in
        which it ends (the " a" of "ASSISTANT: " + "a" is what the model has to say). ValueError where the tokenizer
        does not keep the text (then nothing says where it was cut).
        """
        if not parts:
            return []
        text = "".join(parts)
        ids = self.encode(text)
        if self.decode(ids) != text:
            raise ValueError(
                f"{text[:80]!r}: the tokenizer changes this text; its parts cannot be told apart in the ids"
            )
        cuts, stop = [0], 0
        for part in parts[:-1]:
            stop += len(part)
            more = bisect_right(range(len(ids) + 1), stop, lo=cuts[-1], key=lambda k: self._touched(text, ids[:k]))
            cuts.append(more - 1)
        return [ids[a:b] for a, b in pairwise([*cuts, len(ids)])]

    def _touched(self, text: str, ids: Sequence[int]) -> int:
        """How many characters of `text` these first ids of it lie in; one of which bytes are missing counts."""
        decoded = self.decode(ids)
        return len(decoded) if text.startswith(decoded) else len(decoded.rstrip("\ufffd")) + 1

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        parts: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the tokenizer's 0..{self.vocab_size - 1}")
            token = self._added.by_id.get(i)
            if token is None:
                run.append(i)
                continue
            parts += [self._model.decode(run), token.content] if run else [token.content]
            run = []
        return "".join([*parts, self._model.decode(run)] if run else parts)

    def special_id(self, name: str) -> int:
        """The id of a special (or other added) token by its text; KeyError names those there are."""
        token = self._added.by_content.get(name)
        if token is None:
            known = ", ".join(t.content for t in self._added.tokens if t.special)
            raise KeyError(f"the text tokenizer has no special token {name!r}; it has {known}")
        return token.id

    @property
    def sha256(self) -> str:
        """Names what ids mean: a hash over the files and the appended specials."""
        digest = hashlib.sha256()
        for name, data in sorted(self._contents().items()):
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Copy the files (bytes unchanged) and the list of specials; `load_text_tokenizer(folder)` restores all ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._contents().items():
            write_durably(folder / name, data)

    def _contents(self) -> dict[str, bytes]:
        return self._files | {_SPECIALS_FILE: json.dumps(self.specials).encode()}


def load_text_tokenizer(path: str | os.PathLike, specials: Sequence[str] | None = None) -> TextTokenizer:
    """Load a tokenizer from a file or a folder.

    A SentencePiece `.model`; a `.model` of Llama 3's kind (tiktoken ranks); `tokenizer.json`; `vocab.json` with
    `merges.txt` beside it; or a folder with one of these (looked for as `tokenizer.model`, `tokenizer.json`,
    `vocab.json`). `specials` are appended after the file's last id, except those that it has already; None takes the
    list that `save` left in the folder, else DEFAULT_SPECIALS. FileNotFoundError or ValueError, one line, where that
    cannot be done.
    """
    path = Path(path)
    main = _main_file(path) if path.is_dir() else path
    if not main.is_file():
        raise FileNotFoundError(f"{main}: no such text tokenizer file")
    data = main.read_bytes()
    if main.suffix == ".json":
        model, added, files = _load_json_family(main, data)
    elif data[:1] == b"\n":  # a protobuf starts with its first field's tag: pieces, length-delimited
        model, added = SentencePieceModel(data, str(main)), []
        files = {"tokenizer.model": data}
    elif main.suffix == ".model":
        (model, added), files = read_ranks(main, data), {"tokenizer.model": data}
    else:
        raise ValueError(f"{main}: unknown text tokenizer; expected a .model or .json file")
    if specials is None:
        specials = _saved_specials(main.with_name(_SPECIALS_FILE)) if path.is_dir() else None
    return TextTokenizer(model, added, DEFAULT_SPECIALS if specials is None else specials, files)


def _main_file(folder: Path) -> Path:
    for name in ("tokenizer.model", "tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: no tokenizer.model, tokenizer.json or vocab.json in it")


def _load_json_family(main: Path, data: bytes) -> tuple[Model, list[AddedToken], dict[str, bytes]]:
    if main.name != "vocab.json":
        model, added = read_tokenizer_json(main, data)
        return model, added, {"tokenizer.json": data}
    merges = main.with_name("merges.txt")
    if not merges.is_file():
        raise FileNotFoundError(f"{merges}: no such file; vocab.json needs it")
    files = {"vocab.json": data, "merges.txt": merges.read_bytes()}
    files |= {name: main.with_name(name).read_bytes() for name in _BESIDE_VOCAB if main.with_name(name).is_file()}
    model, added = read_vocab_and_merges(main.parent, files)
    return model, added, files


def _saved_specials(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    try:
        specials = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(specials, list) or not all(isinstance(name, str) for name in specials):
        raise ValueError(f"{path}: expected a list of strings")
    return specials


def _append_specials(model: Model, added: Sequence[AddedToken], specials: Sequence[str]) -> tuple[AddedTokens, int]:
    """The added tokens with the specials among them, and the number of ids."""
    if len(set(specials)) != len(specials) or not all(isinstance(s, str) and s for s in specials):
        raise ValueError(f"text tokenizer specials {list(specials)}: expected different, non-empty strings")
    tokens = {t.content: t for t in added}
    size = max([model.size, *(t.id + 1 for t in added)])
    for name in specials:
        if name in tokens:
            tokens[name] = AddedToken(**{**vars(tokens[name]), "special": True})
            continue
        known = model.token_id(name)
        tokens[name] = AddedToken(name, size if known is None else known, special=True)
        size += known is None
    return AddedTokens(list(tokens.values()), model.normalize), size
