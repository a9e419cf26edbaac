"""WindowCache: keys and values of sequences that grow at different speeds, a window of tokens at a time.

Legend: R sequences, N tokens of a window, T rows of a forward, L columns, Hq/Hk query/key heads, D head dim.
The token at position p of a sequence lies in its column p. What a window writes behind the tokens that are kept need
not be taken back: a token sees the columns up to its own, and the next window overwrites before anything reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vkernels import varlen_attention
from vtrain.batch import PackedBatch


class WindowCache:
    """Call `begin_prefill` before the prompts' forward, `begin_window` before each forward of N tokens per sequence.

    Storage ([R, max_len, Hk, D] per layer) takes the dtype of the first keys. Nothing waits for the device, and the
    shapes of all windows are the same.
    """

    def __init__(self, max_len: int, device: torch.device | str) -> None:
        self.max_len, self.device = max_len, device
        self._source: torch.Tensor | None = None  # prefill: token row of each cell, int64[R, columns]
        self._cells: torch.Tensor | None = None  # window: row of the flat storage of each token, int64[R * N]
        self._bounds: tuple[torch.Tensor, torch.Tensor] | None = None  # of the flat storage: sequences, tokens
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def begin_prefill(self, lengths: Sequence[int], prompt_of: Sequence[int]) -> None:
        """The next forward holds packed prompts of these lengths; sequence r continues prompt `prompt_of[r]`."""
        lengths = np.asarray(lengths, dtype=np.int64)
        starts = (np.cumsum(lengths) - lengths)[np.asarray(prompt_of)]
        column = np.arange(lengths.max())
        inside = column < lengths[np.asarray(prompt_of), None]
        source = np.where(inside, starts[:, None] + column, 0)  # cells behind a prompt copy any row: nothing sees them
        self._source = torch.from_numpy(source).to(self.device)

    def begin_window(self, columns: torch.Tensor) -> None:
        """The next forward holds tokens at these columns, int64[R, N] below max_len, ascending in a sequence."""
        sequences = torch.arange(len(columns) + 1, device=columns.device) * self.max_len
        self._source = None
        self._cells = (sequences[:-1, None] + columns).flatten()
        self._bounds = sequences.to(torch.int32), (self._cells + 1).to(torch.int32)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Store k, v [T, Hk, D] of one layer and return the causal attention of q [T, Hq, D] over all that is stored.

        q and k are already rotated. T is the tokens of all prompts in a prefill, R * N in a window.
        """
        if self._source is not None:
            self._keys[layer], self._values[layer] = self._filled(k), self._filled(v)
            return varlen_attention(q, k, v, batch.cu_seqlens, max_seqlen_q=batch.max_seqlen)
        keys, values = (stored[layer].flatten(0, 1) for stored in (self._keys, self._values))
        keys.index_copy_(0, self._cells, k)
        values.index_copy_(0, self._cells, v)
        cu_seqlens_k, kv_hi = self._bounds
        return varlen_attention(
            q, keys, values, batch.cu_seqlens, cu_seqlens_k, batch.max_seqlen, self.max_len, kv_hi=kv_hi
        )

    def _filled(self, rows: torch.Tensor) -> torch.Tensor:
        sequences, columns = self._source.shape
        # Zeros, not empty: a kernel may multiply what it masks by 0, and memory may hold NaN.
        storage = rows.new_zeros(sequences, self.max_len, *rows.shape[1:])
        storage[:, :columns] = rows[self._source]
        return storage
