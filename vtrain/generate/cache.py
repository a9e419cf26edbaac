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

    max_len: columns, enough for the longest prompt and what is appended to it. Storage ([B, max_len, Hk, D] per layer)
    takes the dtype of the first keys and stays where it is, also for the prompts of another prefill: the counters lie
    on the device, so a step is the same work on the same tensors each time and a CUDA graph can replay it.
    """

    def __init__(self, sequences: int, max_len: int, device: torch.device | str) -> None:
        self.sequences, self.max_len, self.device = sequences, max_len, device
        self._source: torch.Tensor | None = None  # prefill: token row of each cell, int64[B, L]
        self._newest = torch.zeros((), dtype=torch.int32, device=device)  # the column of the newest tokens
        self._first = torch.zeros(sequences, dtype=torch.int32, device=device)  # the columns of the first tokens
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def begin_prefill(self, lengths: Sequence[int], prompt_of: Sequence[int]) -> None:
        """The next forward holds U packed prompts of these lengths; sequence b continues prompt `prompt_of[b]`.

        A prompt shared by many sequences is computed once and copied to each of them. What was stored is forgotten.
        """
        lengths, prompt_of = np.asarray(lengths, dtype=np.int64), np.asarray(prompt_of)
        columns = int(lengths.max())
        if len(prompt_of) != self.sequences or columns > self.max_len or lengths.min() < 1:
            raise ValueError(
                f"prefill of {len(prompt_of)} sequences from prompts of {lengths.min()} to {columns} tokens; "
                f"expected {self.sequences} sequences and 1 to {self.max_len} tokens"
            )
        ends = np.cumsum(lengths)[prompt_of]
        blank = columns - lengths[prompt_of]  # columns to the left of the prompt
        column = np.arange(columns)
        source = ends[:, None] - columns + column  # the last column holds the prompt's last token
        source = np.where(column >= blank[:, None], source, 0)  # blank cells copy any row: they have no influence
        self._source = torch.from_numpy(source).to(self.device)
        self._newest.fill_(columns - 1)
        self._first.copy_(torch.from_numpy(blank))

    def begin_step(self) -> None:
        """The next forward holds one new token of every sequence, in order. Past max_len, see `decode_attention`."""
        self._source = None
        self._newest += 1

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Store k, v [T, Hk, D] of one layer and return the causal attention of q [T, Hq, D] over all that is stored.

        q and k are already rotated. T is the tokens of all prompts in a prefill, B in a decode step.
        """
        if self._source is None:
            return decode_attention(q, k, v, self._keys[layer], self._values[layer], self._newest, start=self._first)
        self._fill(self._keys, layer, k)
        self._fill(self._values, layer, v)
        return varlen_attention(q, k, v, batch.cu_seqlens, max_seqlen_q=batch.max_seqlen)

    def _fill(self, store: dict[int, torch.Tensor], layer: int, rows: torch.Tensor) -> None:
        if layer not in store:
            store[layer] = rows.new_empty(self.sequences, self.max_len, *rows.shape[1:])
        store[layer][:, : self._source.shape[1]] = rows[self._source]
