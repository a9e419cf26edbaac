"""Speculative Jacobi decoding: drafts of the next W tokens are checked in one forward, and replaced where they fail.

The samples have exactly the distribution of those drawn token by token (`Drafts` tells why), in fewer forwards.
Legend: B samples, V tokens of the sampled range, W drafts of a sample, N = W + 1 tokens of a window, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vkernels.philox import LOW, philox
from vkernels.sampling import ONE, kept, scaled, scores
from vtrain.batch import IGNORE, PackedBatch
from vtrain.generate.graph import Replay
from vtrain.generate.prefill import prefill
from vtrain.generate.sampler import Sampling, key_rows
from vtrain.generate.window_cache import WindowCache
from vtrain.models.decoder import Decoder

Prompt = Sequence[int]
Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def jacobi_batch(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    keys: Sequence[int],
    uncond_prompts: Sequence[Prompt] | None,
    steps: int,
    sampling: Sampling,
    vocab_range: str | None,
    progress: Callable[[int], None] | None,
    graph: bool = False,
) -> torch.Tensor:
    """Continue B prompts by `steps` tokens: global ids, int64[B, steps] on the CPU.

    sampling.speculate is W; the other arguments are those of `engine.generate`, which checks them. A sample is a
    function of (decoder, prompts, seed, key, W), whatever its place in the batch. The number of forwards depends on
    what is drawn, so the decoder is to be this rank's own. Their shapes are all the same, so with `graph` (on a GPU)
    they are replayed; after each the host reads one number, how many tokens are final. Memory beside the KV cache:
    about 50 bytes * B * N * V. FloatingPointError: logits are not finite.
    """
    samples, branches = len(prompts), 1 if uncond_prompts is None else 2
    ranges = None if vocab_range is None else (vocab_range,)
    base = 0 if vocab_range is None else decoder.vocab[vocab_range].base
    width = min(sampling.speculate, steps - 1) + 1
    windows = Windows(decoder, [*prompts, *(uncond_prompts or ())], steps, width)

    def distributions(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = decoder.logits(hidden, ranges).chunk(branches)
        return distribution(logits[0], logits[-1] if branches == 2 else None, sampling)

    drafts = Drafts(*distributions(windows.prefill()), steps, width, sampling.seed, key_rows(keys, windows.device))

    def check_drafts() -> None:
        hidden = windows.forward(base + drafts.window().repeat(branches, 1), drafts.final.repeat(branches))
        p, finite = distributions(hidden)
        drafts.advance(p.view(samples, width, -1), finite.view(samples, width))

    advance = Replay(check_drafts, windows.device) if graph else check_drafts
    final = 0
    while True:
        before, final = final, int(drafts.final.sum())
        if progress is not None:
            progress(final - before)
        if final == samples * steps:
            break
        advance()
    if not bool(drafts.finite.all()):
        raise FloatingPointError("generate: the decoder's logits are not finite (NaN or infinity)")
    return (base + drafts.tokens[:, :steps]).cpu()


class Drafts:
    """B samples: the tokens that are final, the W drafts behind them, and what these were drawn from.

    The samples are exact. Every position holds a token x and the distribution q that it was drawn from. A forward gives
    p, the distribution of the position after the tokens before it, and `couple` replaces x by a draw from p that is x
    itself as often as can be. Let G be all that has been drawn for the positions before, in this forward too. Given G,
    x is a draw from q, and what replaces it, by numbers never used before, a draw from p: so it goes on from forward to
    forward. A position is final after the first forward in which all tokens before it stayed. G tells when that is, and
    p came after the final tokens then. So given these, the token is a draw from the decoder's own p, whatever the
    drafts were. SJD as published redraws what is behind the first failure with no regard to x: as exact, but here
    drafts settle, and a token that stays is what those behind it were drawn after.

    tokens int64[B, steps + 2W + 1]: `final` int64[B] of a row are final, the next W are drafts, behind them is room.
    finite bool[B]: whether all final tokens came from finite logits. drawn_from int64[B, N, V]: for each draft, and 0
    for the token behind them, which has not been drawn. Shapes and places of all are fixed: a graph can replay it.
    """

    def __init__(
        self, first: torch.Tensor, finite: torch.Tensor, steps: int, width: int, seed: int, keys: torch.Tensor
    ) -> None:
        """first int64[B, V]: the distribution of the first tokens, which the first drafts are drawn from, too."""
        samples, device = len(first), first.device
        self.steps, self.seed = steps, seed
        self.keys = keys[:, None]
        self.place = torch.arange(2 * width - 1, device=device)  # of a window, and of W tokens behind it
        self.round = torch.zeros((), dtype=torch.int64, device=device)
        self.final = torch.ones(samples, dtype=torch.int64, device=device)
        self.finite = finite
        self.tokens = torch.zeros(samples, steps + 2 * width - 1, dtype=torch.int64, device=device)
        self.tokens[:, :width] = draw(first.cumsum(-1), *self._words(self.place[:width].expand(samples, -1))[2:])
        self.drawn_from = first[:, None].repeat(1, width, 1)
        self.drawn_from[:, -1] = 0

    def window(self) -> torch.Tensor:
        """What the decoder is to see: the newest final token and the drafts, int64[B, N]."""
        return self.tokens.gather(1, self.final[:, None] - 1 + self.place[: self.drawn_from.shape[1]])

    def advance(self, p: torch.Tensor, finite: torch.Tensor) -> None:
        """p int64[B, N, V]: the distributions after each token of the window; finite bool[B, N]: those that are."""
        width = p.shape[1]
        self.round += 1
        positions = self.final[:, None] + self.place
        words = self._words(positions)
        x = self.tokens.gather(1, positions[:, :width])
        x, stays = couple(x, self.drawn_from, p, tuple(w[:, :width] for w in words))
        # The window is to move on by up to W + 1 tokens: the drafts it lacks are drawn from the last distribution.
        new = draw(p[:, -1].cumsum(-1), *(w[:, width:] for w in words[2:]))
        self.tokens.scatter_(1, positions, torch.cat([x, new], dim=1))
        moved = stays.long().cumprod(1).sum(1, keepdim=True) + 1  # those that stay, and the first that was replaced
        becomes_final = (self.place[:width] < moved) & (positions[:, :width] < self.steps)
        self.finite &= (finite | ~becomes_final).all(1)
        source = (self.place[:width] + moved).clamp(max=width - 1)
        torch.take_along_dim(p, source[:, :, None], 1, out=self.drawn_from)
        self.drawn_from[:, -1] = 0
        self.final.add_(moved[:, 0]).clamp_(max=self.steps)

    def _words(self, positions: torch.Tensor) -> Words:
        """Four random words for each of positions [B, n]: by seed, sample key, round and position."""
        return philox(self.seed, [positions, self.round, self.keys & LOW, (self.keys >> 32) & LOW])


def couple(x: torch.Tensor, q: torch.Tensor, p: torch.Tensor, words: Words) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from p that are x as often as can be, where x are draws from q: (tokens, bool of those that stay x).

    x stays with probability min(1, p(x) / q(x)), else a token is drawn from max(p - q, 0), normalised.
    x int64[B, n]; q, p int64[B, n, V]; words: four of [B, n]. Where q is 0 there is no x: it is a plain draw from p.
    """
    had, has = (d.gather(-1, x[..., None])[..., 0] for d in (q, p))
    stays = (had > 0) & (scaled(had, *words[:2]) < has)
    rest = (p - q).clamp_(min=0).cumsum(-1)
    stays |= rest[..., -1] == 0  # p is q but for the rounding of one of them
    other = draw(rest, *(w[..., None] for w in words[2:]))[..., 0]
    return torch.where(stays, x, other), stays


def draw(cumulative: torch.Tensor, r0: torch.Tensor, r1: torch.Tensor) -> torch.Tensor:
    """Tokens int64[..., n] by cumulative weights int64[..., V] and 64 random bits each, r0 and r1 [..., n]."""
    target = scaled(cumulative[..., -1:], r0, r1)
    return torch.searchsorted(cumulative, target, right=True)


def distribution(
    cond: torch.Tensor, uncond: torch.Tensor | None, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `sample_logits` draws from, of logits [n, V]: (int64[n, V] in units of 2^-40, bool[n] whether it is finite).

    Integers, so that what is summed and compared later is not rounded. Temperature 0: all is on the best token. A row
    that is not finite (NaN, +inf or nothing to draw) gives some distribution.
    """
    x = scores(cond, uncond, None, sampling.cfg, 1.0, sampling.temperature)
    peak = x.amax(-1, keepdim=True)  # NaN where any is
    finite = peak.isfinite()
    x = torch.where(finite, x, 0.0)
    if sampling.temperature == 0:
        best = x.argmax(-1, keepdim=True)  # the lowest id among equals, as sample_logits
        p = torch.zeros_like(x, dtype=torch.int64).scatter_(-1, best, ONE)
    else:
        weights = kept(x, sampling.top_k, sampling.top_p)
        p = (weights.double() * (ONE / weights.sum(-1, keepdim=True).double())).round_().long()
    return p, finite[:, 0]


class Windows:
    """R sequences: `prefill` once, then `forward` a window of N tokens of each, from wherever it stands."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], steps: int, width: int) -> None:
        self.decoder = decoder
        self.device = next(decoder.parameters()).device
        self._prompts = prompts
        lengths = [len(p) for p in prompts]
        self._lengths = torch.tensor(lengths, device=self.device)
        self._cache = WindowCache(max(lengths) + steps + width - 1, self.device)
        self._place = torch.arange(width, device=self.device)
        self._cu_seqlens = torch.arange(len(prompts) + 1, dtype=torch.int32, device=self.device) * width

    def prefill(self) -> torch.Tensor:
        """Run all prompts: the hidden states of their last tokens, [R, C]."""
        return prefill(self.decoder, self._cache, self._prompts)

    def forward(self, ids: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
        """Global ids int64[R, N], the first of them token number final[R] - 1 behind the prompt -> hidden [R * N, C].

        What earlier windows left from there on is overwritten.
        """
        positions = (self._lengths + final - 1)[:, None] + self._place
        flat = ids.flatten().to(torch.int32)
        batch = PackedBatch(
            ids=flat,
            labels=torch.full_like(flat, IGNORE),
            positions=positions.flatten().to(torch.int32),
            cu_seqlens=self._cu_seqlens,
            max_seqlen=len(self._place),
            doc_keys=torch.zeros_like(self._lengths),
            tokens=len(flat),
        )
        self._cache.begin_window(positions)
        hidden, _ = self.decoder(batch, cache=self._cache)
        return hidden
