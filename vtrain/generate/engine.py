"""The generation engine: prompts in, a fixed number of sampled ids out. No files, no tokenizers, no console.

Used by the sample command, by the pictures of a training run and by rollouts. The decoder may be sharded by FSDP: call
its root's `unshard()` first (the layers gather themselves). Without `speculate` the number of forwards depends on the
arguments only, so ranks that pass the same `rounds` and `steps` stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from vtrain.batch import IGNORE, PackedBatch
from vtrain.generate.cache import KVCache
from vtrain.generate.graph import Replay
from vtrain.generate.prefill import prefill
from vtrain.generate.sampler import Sampling, key_rows, sample_token
from vtrain.generate.speculative import jacobi_batch
from vtrain.models.decoder import Decoder

Prompt = Sequence[int]
Progress = Callable[[int], None]
STAND_IN: list[Prompt] = [[0]]  # the prompts of a batch that a rank runs for the others' sake


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
    repetition_penalty: float = 1.0,
    speculate: int = 0,
    seed: int = 0,
    uncond_prompts: Sequence[Prompt] | None = None,
    vocab_range: str | None = "visual",
    batch_size: int = 64,
    rounds: int | None = None,
    progress: Progress | None = None,
    return_logprobs: bool = False,
    graph: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Continue every prompt by `steps` tokens: global ids, int64[N, steps] on the CPU.

    prompts, uncond_prompts: N lists of global ids; the second (the negative prompts of guidance) is needed only where
    cfg is not 1, and both branches of a sample receive the same tokens. keys: N u64 sample keys; a sample is a function
    of (decoder, prompts, seed, key), whatever its place in the batch. cfg, temperature, top_k, top_p,
    repetition_penalty, speculate, seed: see `sampler.Sampling`. vocab_range: only this range is scored, penalised and
    sampled (None = the whole vocabulary).
    rounds: the number of batches to run, at least ceil(N / batch_size); with a sharded decoder all ranks pass the
    largest of theirs and the missing batches run on a stand-in. progress: called with the new tokens of each step.
    return_logprobs: also float32[N, steps], the log-probability of each token in the distribution it was drawn from.
    graph: on a GPU, the steps of a decoder that is not sharded are replayed from a CUDA graph.
    ValueError: a bad prompt, or one too long for the decoder's positions. FloatingPointError: logits are not finite.
    """
    sampling = Sampling(cfg, temperature, top_k, top_p, seed, repetition_penalty, speculate)
    uncond_prompts = uncond_prompts if sampling.guided else None
    _check(decoder, prompts, keys, uncond_prompts, steps, sampling, vocab_range, batch_size)
    needed = -(-len(prompts) // batch_size)
    rounds = needed if rounds is None else rounds
    if rounds < needed:
        raise ValueError(
            f"generate: {len(prompts)} prompts in batches of {batch_size} take {needed} rounds, not {rounds}"
        )
    batches = [slice(first, first + batch_size) for first in range(0, len(prompts), batch_size)]
    away = [None if uncond_prompts is None else uncond_prompts[rows] for rows in batches]
    if speculate:
        _check_speculation(decoder, rounds - needed, return_logprobs)
        settings = steps, sampling, vocab_range, progress, graph and _capturable(decoder)
        parts = [jacobi_batch(decoder, prompts[rows], keys[rows], u, *settings) for rows, u in zip(batches, away)]
        return torch.cat([torch.empty(0, steps, dtype=torch.int64), *parts])
    ids = torch.empty(len(prompts), steps, dtype=torch.int64)
    logprobs = torch.empty(len(prompts), steps)
    longest = max(map(len, [*prompts, *(uncond_prompts or ()), *STAND_IN]))
    engine = _Engine(decoder, longest + steps - 1, steps, sampling, vocab_range, graph)
    for rows, u in zip(batches, away):
        ids[rows], logprobs[rows] = engine.run(prompts[rows], u, keys[rows], progress)
    for _ in range(rounds - needed):
        engine.run(STAND_IN, STAND_IN if sampling.guided else None, [0], None)
    return (ids, logprobs) if return_logprobs else ids


class _Engine:
    """Runs batches one after the other, on the same tensors as long as they are of one size."""

    def __init__(
        self, decoder: Decoder, columns: int, steps: int, sampling: Sampling, vocab_range: str | None, graph: bool
    ) -> None:
        self._settings = decoder, columns, steps, sampling, vocab_range
        self._steps = steps
        self._graph = graph and _capturable(decoder)
        self._samples: Samples | None = None
        self._extend: Callable[[], None] | None = None

    def run(
        self,
        prompts: Sequence[Prompt],
        uncond_prompts: Sequence[Prompt] | None,
        keys: Sequence[int],
        progress: Progress | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64[B, steps], log-probabilities float32[B, steps]) on the CPU."""
        if self._samples is None or self._samples.count != len(prompts):
            self._samples = self._extend = None  # their memory goes before that of the new ones is taken
            self._samples = Samples(len(prompts), *self._settings)
            self._extend = self._samples.extend
            if self._graph:
                self._extend = Replay(self._extend, self._samples.device)
        for step in range(self._steps):
            if step == 0:
                self._samples.begin(prompts, uncond_prompts, keys)
            else:
                self._extend()
            if progress is not None:
                progress(len(prompts))
        return self._samples.result()


class Samples:
    """B samples that grow together: `begin` once, then `extend` by a token each, up to `steps - 1` times, `result`.

    With guidance there are 2B sequences: the conditional ones, then the unconditional ones. What a step reads and
    writes stays in place and is counted on the device, so that it can be replayed; then `begin` may come again.
    """

    def __init__(
        self,
        count: int,
        decoder: Decoder,
        columns: int,
        steps: int,
        sampling: Sampling,
        vocab_range: str | None,
    ) -> None:
        self.count, self.decoder, self.sampling = count, decoder, sampling
        self.device = next(decoder.parameters()).device
        self._ranges = None if vocab_range is None else (vocab_range,)
        part = None if vocab_range is None else decoder.vocab[vocab_range]
        self._base, width = (0, decoder.vocab.size) if part is None else (part.base, part.size)
        self._branches = 2 if sampling.guided else 1
        self._batch = one_token_batch(self._branches * count, self.device)  # ids and positions of the next tokens
        self._cache = KVCache(self._branches * count, columns, self.device)
        self._step = torch.zeros((), dtype=torch.int64, device=self.device)
        self._keys = torch.zeros(count, dtype=torch.int64, device=self.device)
        self._tokens = torch.zeros(steps, count, dtype=torch.int64, device=self.device)
        self._logprobs = torch.zeros(steps, count, device=self.device)
        self._seen = torch.zeros(count, width, dtype=torch.bool, device=self.device) if sampling.penalised else None

    def begin(self, prompts: Sequence[Prompt], uncond_prompts: Sequence[Prompt] | None, keys: Sequence[int]) -> None:
        """Run all prompts, each distinct one once, and draw the first tokens."""
        rows = [*prompts, *(uncond_prompts or ())]
        self._step.zero_()
        self._keys.copy_(key_rows(keys))
        self._batch.positions.copy_(torch.tensor([len(row) for row in rows]))
        self._note_prompts(prompts)
        self._draw(prefill(self.decoder, self._cache, rows))

    def extend(self) -> None:
        """One more token of every sample."""
        self._cache.begin_step()
        hidden, _ = self.decoder(self._batch, cache=self._cache)
        self._batch.positions.add_(1)
        self._draw(hidden)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64[B, steps], log-probabilities float32[B, steps]) on the CPU: the only wait for the device."""
        logprobs = self._logprobs.cpu()
        if not bool(logprobs.isfinite().all()):
            raise FloatingPointError("generate: the decoder's logits are not finite (NaN or infinity)")
        return self._tokens.cpu().T, logprobs.T

    def _draw(self, hidden: torch.Tensor) -> None:
        """Draw a token per sample from the hidden states [branches * B, C] of the newest ones, and store it."""
        logits = self.decoder.logits(hidden, self._ranges).chunk(self._branches)
        drawn, logprob = sample_token(logits[0], logits[-1], self._keys, self._step, self.sampling, self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, drawn[:, None], True)
        tokens = drawn + self._base
        self._batch.ids.view(self._branches, -1).copy_(tokens)
        row = self._step.view(1)
        self._tokens.index_copy_(0, row, tokens[None])
        self._logprobs.index_copy_(0, row, logprob[None])
        self._step.add_(1)

    def _note_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Set `seen` to the ids of the prompts that lie in the sampled range."""
        if self._seen is None:
            return
        width = self._seen.shape[1]
        found = [(b, i - self._base) for b, prompt in enumerate(prompts) for i in prompt]
        inside = torch.tensor([(b, i) for b, i in found if 0 <= i < width], dtype=torch.int64).view(-1, 2)
        row, column = inside.to(self.device).unbind(1)
        self._seen.zero_()[row, column] = True


def one_token_batch(sequences: int, device: torch.device) -> PackedBatch:
    """A batch of documents of one token, with ids and positions to be filled."""
    zeros = torch.zeros(sequences, dtype=torch.int32, device=device)
    return PackedBatch(
        ids=zeros,
        labels=torch.full_like(zeros, IGNORE),
        positions=zeros.clone(),
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32, device=device),
        max_seqlen=1,
        doc_keys=torch.zeros(sequences, dtype=torch.int64, device=device),
        lengths=np.ones(sequences, dtype=np.int64),
        tokens=sequences,
    )


def _capturable(decoder: Decoder) -> bool:
    """Whether its steps can be a CUDA graph: layers of a sharded decoder gather their weights anew for each step."""
    return all(p.is_cuda and not isinstance(p, DTensor) for p in decoder.parameters())


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


def _check_speculation(decoder: Decoder, stand_ins: int, return_logprobs: bool) -> None:
    if return_logprobs:
        raise ValueError("generate: return_logprobs with speculate; expected one of them")
    if stand_ins or any(isinstance(p, DTensor) for p in decoder.parameters()):
        raise ValueError(
            "generate: speculate with a sharded decoder or further rounds; expected a decoder of this rank's own: the "
            "number of forwards depends on what is drawn"
        )
