"""The generation engine: prompts in, a fixed number of sampled ids out. No files, no tokenizers, no console.

Used by the sample command, by the pictures of a training run and by rollouts. The decoder may be sharded by FSDP: call
its root's `unshard()` first (the layers gather themselves). The number of forwards depends on the arguments only, so
ranks that pass the same `rounds` and `steps` stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from vtrain.batch import IGNORE, Document, PackedBatch
from vtrain.generate.cache import KVCache
from vtrain.generate.sampler import Sampling, key_rows, sample_token
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
    for first in range(0, len(prompts), batch_size):
        rows = slice(first, first + batch_size)
        uncond = uncond_prompts[rows] if sampling.guided else None
        out[rows] = _generate_batch(decoder, prompts[rows], keys[rows], uncond, steps, sampling, vocab_range, progress)
    for _ in range(rounds - needed):
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
    """All steps of one batch. Its sequences are the conditional ones, then with guidance the unconditional ones."""
    branches = 1 if uncond_prompts is None else 2
    sequences = Sequences(decoder, [*prompts, *(uncond_prompts or ())], steps)
    ranges = None if vocab_range is None else (vocab_range,)
    base = 0 if vocab_range is None else decoder.vocab[vocab_range].base
    keys = key_rows(keys, sequences.device)
    tokens = torch.empty(len(prompts), steps, dtype=torch.int64, device=sequences.device)
    finite = torch.ones(len(prompts), dtype=torch.bool, device=sequences.device)
    for step in range(steps):
        hidden = sequences.extend(tokens[:, step - 1].repeat(branches)) if step else sequences.prefill()
        logits = decoder.logits(hidden, ranges).chunk(branches)
        local, logprob = sample_token(logits[0], logits[-1], keys, step, sampling)
        tokens[:, step] = base + local
        finite &= logprob.isfinite()
        if progress is not None:
            progress(len(prompts))
    if not bool(finite.all()):  # the only wait for the device, once per batch
        raise FloatingPointError("generate: the decoder's logits are not finite (NaN or infinity)")
    return tokens.cpu()


class Sequences:
    """B sequences that grow together: `prefill` once, then `extend` by a token each, up to `steps - 1` times.

    Both return the hidden states of the newest tokens, [B, C].
    """

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], steps: int) -> None:
        self.decoder = decoder
        self.device = next(decoder.parameters()).device
        self.prompts = [tuple(p) for p in prompts]
        lengths = np.array([len(p) for p in prompts], dtype=np.int32)
        self._positions = torch.from_numpy(lengths).to(self.device)  # of the next tokens
        self._cache = KVCache(int(lengths.max()) + steps - 1)
        self._step = one_token_batch(len(prompts), self.device)

    def prefill(self) -> torch.Tensor:
        """Run all prompts, each distinct one once."""
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(self.prompts))}
        prompt_of = [numbers[p] for p in self.prompts]
        lengths = [len(p) for p in numbers]
        documents = [Document(np.array(p, dtype=np.int32)) for p in numbers]
        batch = PackedBatch.build(documents, self.decoder.vocab).to(self.device)
        self._cache.begin_prefill(lengths, prompt_of, self.device)
        hidden, _ = self.decoder(batch, cache=self._cache)
        last = np.cumsum(lengths)[prompt_of] - 1
        return hidden[torch.from_numpy(last).to(self.device)]

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Append global ids int64[B]."""
        batch = replace(self._step, ids=ids.to(torch.int32), positions=self._positions)
        self._positions = self._positions + 1
        self._cache.begin_step()
        hidden, _ = self.decoder(batch, cache=self._cache)
        return hidden


def one_token_batch(sequences: int, device: torch.device) -> PackedBatch:
    """A batch of documents of one token; ids and positions are to be replaced."""
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


def check_prompts(decoder: Decoder, prompts: Sequence[Prompt], steps: int, kind: str = "prompt") -> None:
    """ValueError naming the first prompt that is empty, leaves no room for `steps` tokens, or has a foreign id."""
    room = decoder.config.max_positions - steps
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= room:
            raise ValueError(
                f"generate: {kind} {number} has {len(prompt)} ids; expected 1 to {room} "
                f"({decoder.config.max_positions} positions less {steps} steps)"
            )
        if min(prompt) < 0 or max(prompt) >= decoder.vocab.size:
            raise ValueError(f"generate: {kind} {number} has an id outside 0..{decoder.vocab.size - 1}")


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
    check_prompts(decoder, prompts, steps)
    check_prompts(decoder, uncond_prompts or (), steps, "unconditional prompt")
