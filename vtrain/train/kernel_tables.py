"""Work lists of kernels, made beside a batch in the loader's thread: no step sorts or searches on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

import vkernels
from vtrain.batch import PackedBatch
from vtrain.vocab import Vocabulary


def kernel_tables(vocab: Vocabulary, *, pinned: bool) -> Callable[[PackedBatch], PackedBatch]:
    """What a `Loader` takes as `prepare`: it gives a batch `attention_tiles` and `embed_order`.

    pinned: in page-locked memory, from which they travel without the step waiting.
    """

    def prepare(batch: PackedBatch) -> PackedBatch:
        found: dict[str, tuple[torch.Tensor, ...]] = {
            "attention_tiles": (vkernels.attention_tiles(batch.cu_seqlens, kv_lo=batch.kv_lo, kv_hi=batch.kv_hi),),
            "embed_order": vkernels.embed_order(batch.ids, vocab.bases, vocab.sizes),
        }
        if pinned:
            found = {name: tuple(t.pin_memory() for t in tables) for name, tables in found.items()}
        return replace(batch, kernel_tables={**batch.kernel_tables, **found})

    return prepare
