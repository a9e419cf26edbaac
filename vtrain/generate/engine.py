"""The generation engine: prompts in, a fixed number of sampled ids out. No files, no tokenizers, no console.

Used by the sample command, by the pictures of a training run and by rollouts. The decoder may be sharded: the number
of forwards depends on the arguments only, so ranks that pass the same `rounds` and `steps` stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from vtrain.batch import IGNORE, Document, PackedBatch
from vtrain.generate.cache import KVCache
from vtrain.generate.sampler import Sampling, noise_keys, sample_token
from vtrain.models.decoder import Decoder

Prompt = Sequence[int]


@torch.no_grad()  # not inference_mode: a decoder under FSDP would keep inference tensors for its next training step
def generate(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    keys: Sequence[int],
    *,
    steps: int,
    cfg: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    uncond_prompts: Sequence[Prompt] | None = None,
    vocab_range: str | None = "visual",
    batch_size: int = 64,
    rounds: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Continue every prompt by `steps` tokens: global ids, int64[N, steps] on the CPU.

    prompts, uncond_prompts: N lists of global ids; the second (the negative prompts of guidance) is needed only where
    cfg is not 1, and both branches of a sample receive the same tokens. keys: N u64 sample keys; a sample is a function
    of (decoder, prompts, seed, key), whatever its place in the batch. cfg, temperature, top_k, top_p, seed: see
    `sampler.Sampling`. vocab_range: only this range is scored and sampled (None = the whole vocabulary).
    rounds: the number of batches to run, at least ceil(N / batch_size); with a sharded decoder all ranks pass the
    largest of theirs and the missing batches run on a stand-in. progress: called with the new tokens of each step.
    ValueError: a bad prompt, or one too long for the decoder's positions. FloatingPointError: logits are not finite.
    """
    sampling = Sampling(cfg, temperature, top_k, top_p, seed)
    uncond_prompts = uncond_prompts if sampling.guided else None
    _check(decoder, prompts, keys, uncond_prompts, steps, sampling, vocab_range, batch_size)
    needed = -(-len(prompts) // batch_size)
    rounds = needed if rounds is None else rounds
    if rounds < needed:
        raise ValueError(
            f"generate: {len(prompts)} prompts in batches of {batch_size} take {needed} rounds, not {rounds}"
        )
    out = torch.empty(len(prompts), steps, dtype=torch.int64)
    for first in range(0, rounds * batch_size, batch_size):
        rows = slice(first, min(first + batch_size, len(prompts)))
        if first < len(prompts):
            uncond = uncond_prompts[rows] if uncond_prompts is not None else None
            out[rows] = _generate_batch(
                decoder, prompts[rows], keys[rows], uncond, steps, sampling, vocab_range, progress
            )
        else:
            stand_in = [[0]]
            uncond = stand_in if sampling.guided else None
            _generate_batch(decoder, stand_in, [0], uncond, steps, sampling, vocab_range, None)
    return out


def _generate_batch(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    keys: Sequence[int],
    uncond_prompts: Sequence[Prompt] | None,
    steps: int,
    sampling: Sampling,
    vocab_range: str | None,
    progress: Callable[[int], None] | None,
) -> torch.Tensor:
    """All steps of one batch; rows of the decoder are the conditional sequences, then the unconditional ones."""
    device = next(decoder.parameters()).device
    ranges = None if vocab_range is None else (vocab_range,)
    base = 0 if vocab_range is None else decoder.vocab[vocab_range].base
    branches = 1 if uncond_prompts is None else 2
    sequences = [tuple(p) for p in prompts] + [tuple(p) for p in uncond_prompts or ()]
    lengths = np.array([len(s) for s in sequences])
    cache = KVCache(int(lengths.max()) + steps - 1)
    step_keys = noise_keys(sampling.seed, keys, steps, device)
    step_batch = one_token_batch(len(sequences), device)
    first_positions = torch.from_numpy(lengths.astype(np.int32)).to(device)
    tokens = torch.empty(len(prompts), steps, dtype=torch.int64, device=device)
    finite = torch.ones(len(prompts), dtype=torch.bool, device=device)

    hidden = _prefill(decoder, cache, sequences, device)
    for step in range(steps):
        logits = decoder.logits(hidden, ranges).chunk(branches)
        tokens[:, step], scores = sample_token(logits[0], logits[-1], step_keys[step], sampling)
        tokens[:, step] += base
        finite &= scores.isfinite()
        if progress is not None:
            progress(len(prompts))
        if step + 1 < steps:
            cache.begin_step()
            ids = tokens[:, step].to(torch.int32).repeat(branches)
            hidden, _ = decoder(replace(step_batch, ids=ids, positions=first_positions + step), cache=cache)
    if not bool(finite.all()):
        raise FloatingPointError("generate: the decoder's logits are not finite (NaN or infinity)")
    return tokens.cpu()


def _prefill(
    decoder: Decoder, cache: KVCache, sequences: Sequence[tuple[int, ...]], device: torch.device
) -> torch.Tensor:
    """Fill the cache with all prompts, each distinct one computed once; hidden state of their last tokens [B, C]."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(sequences))}
    prompt_of = [numbers[s] for s in sequences]
    lengths = [len(p) for p in numbers]
    documents = [Document(np.array(p, dtype=np.int32)) for p in numbers]
    batch = PackedBatch.build(documents, decoder.vocab).to(device)
    cache.begin_prefill(lengths, prompt_of, device)
    hidden, _ = decoder(batch, cache=cache)
    last = np.cumsum(lengths)[prompt_of] - 1
    return hidden[torch.from_numpy(last).to(device)]


def one_token_batch(sequences: int, device: torch.device) -> PackedBatch:
    zeros = torch.zeros(sequences, dtype=torch.int32, device=device)
    return PackedBatch(
        ids=zeros,
        labels=torch.full_like(zeros, IGNORE),
        positions=zeros,
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32, device=device),
        max_seqlen=1,
        doc_keys=torch.zeros(sequences, dtype=torch.int64, device=device),
        lengths=np.ones(sequences, dtype=np.int64),
        tokens=sequences,
    )


def _check(decoder, prompts, keys, uncond_prompts, steps, sampling, vocab_range, batch_size) -> None:
    if steps < 1 or batch_size < 1:
        raise ValueError(f"generate: steps is {steps}, batch_size {batch_size}; expected at least 1")
    if vocab_range is not None and vocab_range not in decoder.vocab:
        raise ValueError(f"generate: no vocabulary range {vocab_range!r}; expected one of {list(decoder.vocab.names)}")
    if len(keys) != len(prompts):
        raise ValueError(f"generate: {len(keys)} keys for {len(prompts)} prompts; expected one each")
    if sampling.guided and (uncond_prompts is None or len(uncond_prompts) != len(prompts)):
        found = "none" if uncond_prompts is None else len(uncond_prompts)
        raise ValueError(
            f"generate: cfg {sampling.cfg} needs one unconditional prompt per prompt ({len(prompts)}), got {found}"
        )
    room = decoder.config.max_positions - steps
    for kind, rows in (("prompt", prompts), ("unconditional prompt", uncond_prompts or ())):
        for number, prompt in enumerate(rows):
            if not 1 <= len(prompt) <= room:
                raise ValueError(
                    f"generate: {kind} {number} has {len(prompt)} ids; expected 1 to {room} "
                    f"({decoder.config.max_positions} positions less {steps} steps)"
                )
            if min(prompt) < 0 or max(prompt) >= decoder.vocab.size:
                raise ValueError(f"generate: {kind} {number} has an id outside 0..{decoder.vocab.size - 1}")
