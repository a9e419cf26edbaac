"""Reads the files of byte-level BPE tokenizers: rank files, `vocab.json` + `merges.txt`, `tokenizer.json`.

Whatever a file asks for that would change ids and is not carried out here is refused, with its key.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import regex

from vtrain.text.added import AddedToken
from vtrain.text.bpe import GPT2_SPLIT, QWEN2_SPLIT, MergeModel, rank_model

_LLAMA3_RANKS = 128000
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def read_ranks(path: Path, data: bytes) -> tuple[MergeModel, list[AddedToken]]:
    """A tiktoken rank file: one `base64(token) rank` per line, with Llama 3's pattern.

    A file of 128000 ranks is Llama 3's own: its 256 special tokens, which Meta keeps in code, are added.
    """
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split(b" ")
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}:{number}: {_shown(line)}; expected `base64(token) rank`") from None
        if not token or rank < 0:
            raise ValueError(f"{path}:{number}: {_shown(line)}; expected a token of some bytes and a rank >= 0")
        if rank in line_of:
            raise ValueError(f"{path}:{number}: rank {rank} is already given in line {line_of[rank]}")
        if token in ranks:
            raise ValueError(f"{path}:{number}: token {token!r} is already given in line {line_of[ranks[token]]}")
        ranks[token], line_of[rank] = rank, number
    _check_ids(path, line_of)
    _check_bytes(path, ranks)
    return rank_model(ranks), _llama3_specials() if len(ranks) == _LLAMA3_RANKS else []


def _llama3_specials() -> list[AddedToken]:
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    reserved = (f"reserved_special_token_{i}" for i in range(256))
    names = [named[i] if i in named else next(reserved) for i in range(256)]
    return [AddedToken(f"<|{name}|>", _LLAMA3_RANKS + i, special=True) for i, name in enumerate(names)]


def read_vocab_and_merges(folder: Path, files: Mapping[str, bytes]) -> tuple[MergeModel, list[AddedToken]]:
    """`vocab.json` + `merges.txt` with Qwen 2's pattern and NFC; added tokens from the files beside them."""
    path = folder / "merges.txt"
    vocab = _vocab(folder / "vocab.json", load_json(folder / "vocab.json", files["vocab.json"]))
    lines = _text(path, files["merges.txt"]).split("\n")
    numbered = (
        (f"{path}:{number}", line.rstrip("\r").split(" "))
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#version")
    )
    model = _merge_model(folder / "vocab.json", vocab, numbered, QWEN2_SPLIT, forms=("NFC",))
    return model, _added_beside(folder, files, vocab)


def read_tokenizer_json(path: Path, data: bytes) -> tuple[MergeModel, list[AddedToken]]:
    """A `tokenizer.json` with a byte-level BPE, as Qwen and Llama 3 ship it."""
    root = load_json(path, data)
    model = _table(path, root, "model")
    _expect(path, "model.type", model.get("type", "BPE"), ("BPE",))
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _expect(path, f"model.{key}", model.get(key) or None, (None,))
    vocab = _vocab(path, _table(path, model, "vocab"))
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError(f"{path}: model.merges is {_shown(merges)}; expected a list")
    pairs = (
        (f"{path}: model.merges[{i}]", merge.split(" ") if isinstance(merge, str) else merge)
        for i, merge in enumerate(merges)
    )
    built = _merge_model(
        path,
        vocab,
        pairs,
        _split_pattern(path, root.get("pre_tokenizer")),
        forms=_normal_forms(path, root.get("normalizer")),
        ignore_merges=bool(model.get("ignore_merges", False)),
    )
    added = [
        _added_token(path, f"added_tokens[{i}]", entry, entry.get("id") if isinstance(entry, dict) else None)
        for i, entry in enumerate(root.get("added_tokens") or [])
    ]
    return built, _check_added(path, added, vocab)


def load_json(path: Path, data: bytes) -> dict:
    """A JSON object; ValueError with file and line otherwise."""
    try:
        value = json.loads(data)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON {type(value).__name__}; expected an object")
    return value


def _merge_model(
    path: Path, vocab: dict[str, int], merges: Iterable[tuple[str, list]], split: str, **options
) -> MergeModel:
    # Of two tokens with the same bytes the one in byte spelling counts (the last wins): only that one can be matched.
    by_spelling = sorted(vocab.items(), key=lambda item: _is_spelt_in_bytes(item[0]))
    tokens = {i: _token_bytes(token) for token, i in by_spelling}
    _check_bytes(path, set(tokens.values()))
    rows, places = [], {}
    for place, pair in merges:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise ValueError(f"{place}: {_shown(pair)}; expected two tokens")
        for token in (*pair, pair[0] + pair[1]):
            if token not in vocab:
                raise ValueError(f"{place}: {_shown(token)} is not in the vocabulary")
        if (first := places.setdefault(tuple(pair), place)) != place:
            raise ValueError(f"{place}: the merge {_shown(' '.join(pair))} repeats {first}")
        rows.append((vocab[pair[0]], vocab[pair[1]], vocab[pair[0] + pair[1]], len(rows)))
    return MergeModel(tokens, np.array(rows, dtype=np.int32).reshape(-1, 4), split, **options)


def _vocab(path: Path, vocab: dict) -> dict[str, int]:
    by_id: dict[int, str] = {}
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < 2**31:
            raise ValueError(f"{path}: the id of {_shown(token)} is {_shown(i)}; expected an integer 0..2**31-1")
        if (other := by_id.setdefault(i, token)) != token:
            raise ValueError(f"{path}: {_shown(other)} and {_shown(token)} both have the id {i}")
    if not vocab:
        raise ValueError(f"{path}: the vocabulary is empty")
    return vocab


def _check_added(path: Path, added: list[AddedToken], vocab: dict[str, int]) -> list[AddedToken]:
    contents: dict[int, str] = {i: token for token, i in vocab.items()}
    for token in added:
        if vocab.get(token.content, token.id) != token.id or contents.get(token.id, token.content) != token.content:
            raise ValueError(
                f"{path}: added token {_shown(token.content)} has the id {token.id}; the vocabulary has "
                f"{_shown(contents.get(token.id))} there and {_shown(token.content)} at {vocab.get(token.content)}"
            )
        contents[token.id] = token.content
    if len({t.content for t in added}) != len(added):
        raise ValueError(f"{path}: an added token is listed twice")
    _check_ids(path, contents)
    return added


def _check_ids(path: Path, ids: Iterable[int]) -> None:
    ids = sorted(ids)
    if not ids:
        raise ValueError(f"{path}: no tokens in it")
    hole = next((i for i, found in enumerate(ids) if i != found), None)
    if hole is not None:
        raise ValueError(f"{path}: no token has the id {hole}; the ids must be 0..{ids[-1]} without holes")


def _check_bytes(path: Path, tokens: Iterable[bytes]) -> None:
    missing = [b for b in range(256) if bytes([b]) not in tokens]
    if missing:
        raise ValueError(f"{path}: {len(missing)} of the 256 bytes are no tokens, the first is 0x{missing[0]:02x}")


def _split_pattern(path: Path, pre: dict | None) -> str:
    """The one splitting pattern of `ByteLevel` or of `Sequence[Split, ByteLevel]`."""
    parts = pre.get("pretokenizers", []) if isinstance(pre, dict) and pre.get("type") == "Sequence" else [pre]
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(f"{path}: pre_tokenizer is {_shown(kinds)}; expected ByteLevel, or one Split and ByteLevel")
    _expect(path, "pre_tokenizer.add_prefix_space", parts[-1].get("add_prefix_space", True), (False,))
    own_pattern = parts[-1].get("use_regex", True)
    if len(parts) == 1:
        return GPT2_SPLIT if own_pattern else r"(?s:.+)"
    _expect(path, "pre_tokenizer.use_regex", own_pattern, (False,))
    _expect(path, "pre_tokenizer.behavior", parts[0].get("behavior"), ("Isolated",))
    _expect(path, "pre_tokenizer.invert", parts[0].get("invert", False), (False,))
    pattern = parts[0].get("pattern")
    if not isinstance(pattern, dict) or not isinstance(pattern.get("Regex"), str):
        raise ValueError(f"{path}: pre_tokenizer.pattern is {_shown(pattern)}; expected a Regex")
    try:
        return regex.compile(pattern["Regex"]).pattern
    except regex.error as error:
        shown = _shown(pattern["Regex"])
        raise ValueError(f"{path}: pre_tokenizer.pattern {shown} is not a regular expression: {error}") from None


def _normal_forms(path: Path, value: dict | None) -> list[str]:
    if value is None:
        return []
    kind = value.get("type") if isinstance(value, dict) else value
    if kind == "Sequence":
        return [form for part in value.get("normalizers", []) for form in _normal_forms(path, part)]
    _expect(path, "normalizer", kind, _NORMAL_FORMS)
    return [kind]


def _added_beside(folder: Path, files: Mapping[str, bytes], vocab: dict[str, int]) -> list[AddedToken]:
    config = load_json(folder / "tokenizer_config.json", files.get("tokenizer_config.json", b"{}"))
    if "added_tokens_decoder" in config:
        path = folder / "tokenizer_config.json"
        entries = _table(path, config, "added_tokens_decoder").items()
        added = [_added_token(path, f"added_tokens_decoder.{key}", entry, _integer(key)) for key, entry in entries]
        return _check_added(path, added, vocab)
    path = folder / "added_tokens.json"
    if "added_tokens.json" not in files:
        return _check_added(folder / "vocab.json", [], vocab)
    special = set(_strings(config))
    added = [
        _added_token(path, content, {"content": content, "special": content in special}, i)
        for content, i in load_json(path, files["added_tokens.json"]).items()
    ]
    return _check_added(path, added, vocab)


def _added_token(path: Path, key: str, entry: object, token_id: object) -> AddedToken:
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(content, str) or not content or type(token_id) is not int or token_id < 0:
        raise ValueError(f"{path}: {key} is {_shown(entry)}; expected an object with content and an id >= 0")
    special = bool(entry.get("special", False))
    flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(content, token_id, special, bool(entry.get("normalized", not special)), **flags)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _integer(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _table(path: Path, value: dict, key: str) -> dict:
    if not isinstance(value.get(key), dict):
        raise ValueError(f"{path}: {key} is {_shown(value.get(key))}; expected an object")
    return value[key]


def _expect(path: Path, key: str, found: object, allowed: tuple) -> None:
    if found not in allowed:
        names = " or ".join(json.dumps(value) for value in allowed)
        raise ValueError(f"{path}: {key} is {_shown(found)}, which is not supported; expected {names}")


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def _shown(value: object) -> str:
    if isinstance(value, bytes):
        value = value.decode("ascii", "backslashreplace")
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_characters()


def _is_spelt_in_bytes(token: str) -> bool:
    return all(character in _BYTE_OF for character in token)


def _token_bytes(token: str) -> bytes:
    """The bytes of a token as vocabularies spell it; a token with other characters stands for its own UTF-8."""
    if _is_spelt_in_bytes(token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode("utf-8", "surrogatepass")
