"""KVCache: keys and values of B growing sequences, so that a decode step costs one token per sequence.

Legend: B sequences, U distinct prompts, T tokens of the prefill, L columns in use, Hq/Hk query/key heads, D head dim.
Sequences are aligned at the right: every prompt ends in the same column, so a decode step writes one column for all.
A sequence sees the columns from its own first one to that; what lies left of short prompts has no influence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vkernels import decode_attention, varlen_attention
from vtrain.batch import PackedBatch


class KVCache:
    """Call `begin_prefill` before the prompts' forward, `begin_step` before each one-token forward after it.

    `max_len` is the longest prompt plus the number of decode steps. Storage ([B, max_len, Hk, D] per layer) takes the
    dtype and device of the first keys. All bookkeeping is on the host; no call waits for the device.
    """

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.used = 0  # columns that hold a token, the same for all sequences
        self._source: torch.Tensor | None = None  # prefill: token row of each cell, int64[B, L]
        self._newest: torch.Tensor | None = None  # the column of the newest tokens, int32 scalar on the device
        self._first: torch.Tensor | None = None  # the columns of the first tokens, int32[B], None = 0 for all
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def begin_prefill(self, lengths: Sequence[int], prompt_of: Sequence[int], device: torch.device | str) -> None:
        """The next forward holds U packed prompts of these lengths; sequence b continues prompt `prompt_of[b]`.

        A prompt shared by many sequences is computed once and copied to each of them.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        columns = int(lengths.max())
        if self.used or columns > self.max_len or lengths.min() < 1:
            raise ValueError(
                f"prefill of {lengths.min()} to {columns} tokens into a cache with {self.used} of {self.max_len} "
                "columns used; expected an empty cache, non-empty prompts and enough columns"
            )
        ends = np.cumsum(lengths)[np.asarray(prompt_of)]
        blank = columns - lengths[np.asarray(prompt_of)]  # columns to the left of the prompt
        column = np.arange(columns)
        source = ends[:, None] - columns + column  # the last column holds the prompt's last token
        source = np.where(column >= blank[:, None], source, 0)  # blank cells copy any row: they have no influence
        self._source = torch.from_numpy(source).to(device)
        self._newest = torch.full((), columns - 1, dtype=torch.int32, device=device)
        if blank.any():
            self._first = torch.from_numpy(blank.astype(np.int32)).to(device)
        self.used = columns

    def begin_step(self) -> None:
        """The next forward holds one new token of every sequence, in order."""
        if self.used >= self.max_len:
            raise ValueError(f"the KV cache is full: {self.max_len} columns")
        self._source = None
        self._newest += 1
        self.used += 1

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Store k, v [T, Hk, D] of one layer and return the causal attention of q [T, Hq, D] over all that is stored.

        q and k are already rotated. T is the tokens of all prompts in a prefill, B in a decode step.
        """
        if self._source is None:
            return decode_attention(q, k, v, self._keys[layer], self._values[layer], self._newest, start=self._first)
        self._keys[layer] = self._filled(k)
        self._values[layer] = self._filled(v)
        return varlen_attention(q, k, v, batch.cu_seqlens, max_seqlen_q=batch.max_seqlen)

    def _filled(self, rows: torch.Tensor) -> torch.Tensor:
        sequences, columns = self._source.shape
        storage = rows.new_empty(sequences, self.max_len, *rows.shape[1:])
        storage[:, :columns] = rows[self._source]
        return storage
