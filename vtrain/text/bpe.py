"""The byte-level BPE engine: Hugging Face's (an explicit list of merges) and tiktoken's (a rank per token)."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import regex

from vtrain._host import MergeTable

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_CACHED_PIECES = 1 << 17
_CACHED_BYTES = 64  # longer pieces hardly ever repeat


def normalizer(forms: Sequence[str]) -> Callable[[str], str] | None:
    """Unicode normal forms ("NFC", ...) applied one after another; None for none."""
    if not forms:
        return None
    return lambda text: reduce(lambda t, form: unicodedata.normalize(form, t), forms, text)


class MergeModel:
    """Byte-level BPE as Hugging Face's `tokenizers` computes it.

    tokens: the bytes of every id of the model, ids in any order. merges: int32[M,4], (left, right, result, rank).
    split: the pre-tokeniser's pattern; text that it does not match stays a piece of its own. ignore_merges: a piece
    that is a token is that token, whatever the merges make of it.
    """

    def __init__(
        self,
        tokens: dict[int, bytes],
        merges: np.ndarray,
        split: str,
        *,
        forms: Sequence[str] = (),
        ignore_merges: bool = False,
    ) -> None:
        self.size = max(tokens) + 1
        self.normalize = normalizer(forms)
        self._tokens = tokens
        self._ids = {token: i for i, token in tokens.items()}
        byte_ids = np.array([self._ids[bytes([b])] for b in range(256)], dtype=np.int32)
        self._merge = MergeTable(byte_ids, *np.ascontiguousarray(merges.T, dtype=np.int32)).encode
        self._whole = self._ids if ignore_merges else {}
        self._split = regex.compile(split)
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        done = 0
        for match in self._split.finditer(text):
            start, stop = match.span()
            if start == stop:
                continue
            if done < start:
                ids += self._piece(text[done:start])
            ids += self._piece(text[start:stop])
            done = stop
        if done < len(text):
            ids += self._piece(text[done:])
        return ids

    def _piece(self, piece: str) -> list[int]:
        ids = self._cache.get(piece)
        if ids is None:
            data = piece.encode()
            whole = self._whole.get(data)
            ids = [whole] if whole is not None else self._merge(data)
            if len(self._cache) < _CACHED_PIECES and len(data) <= _CACHED_BYTES:
                self._cache[piece] = ids
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self._tokens[i] for i in ids).decode("utf-8", "replace")

    def token_id(self, content: str) -> int | None:
        return self._ids.get(content.encode())


def rank_model(ranks: dict[bytes, int], split: str = LLAMA3_SPLIT) -> MergeModel:
    """tiktoken's BPE: a token's id is its rank, and any two neighbours that are a token together may merge into it."""
    merges = np.array(
        [
            (ranks[token[:cut]], ranks[token[cut:]], i, i)
            for token, i in ranks.items()
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        ],
        dtype=np.int32,
    ).reshape(-1, 4)
    return MergeModel({i: token for token, i in ranks.items()}, merges, split, ignore_merges=True)
