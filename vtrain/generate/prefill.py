"""The forward of the prompts, before sequences grow in a cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vtrain.batch import Document, PackedBatch
from vtrain.generate.cache import KVCache
from vtrain.generate.window_cache import WindowCache
from vtrain.models.decoder import Decoder


def prefill(decoder: Decoder, cache: KVCache | WindowCache, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Run R prompts, each distinct one once, into a cache of R sequences: [R, C], the hidden states of their ends."""
    rows = [tuple(prompt) for prompt in prompts]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(rows))}
    prompt_of = [numbers[row] for row in rows]
    lengths = [len(prompt) for prompt in numbers]
    documents = [Document(np.array(prompt, dtype=np.int32)) for prompt in numbers]
    cache.begin_prefill(lengths, prompt_of)
    hidden, _ = decoder(PackedBatch.build(documents, decoder.vocab).to(cache.device), cache=cache)
    last = np.cumsum(lengths)[prompt_of] - 1
    return hidden[torch.from_numpy(last).to(cache.device)]
