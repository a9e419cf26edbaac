"""Quantizers of image autoencoders: a codebook that follows the data (VQ) and finite scalar quantization (FSQ).

Both share one face: `forward` for training, `ids` and `lookup` for use, `end_step` once per optimizer step. What a
step gathers depends only on its images, not on how they are spread over micro-batches and ranks.
Legend: B images, h x w codes each, N = B*h*w latents, K codes, D code width, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import vkernels
from vtrain.rng import fold, fold_tensor, key_tensor

_NO_CANDIDATE = torch.iinfo(torch.int64).max  # sorts behind every drawn priority


class Codebook(nn.Module):
    """The code vectors, under the name that published weights have (`embedding.weight`); no gradient moves them."""

    def __init__(self, num_codes: int, dim: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_codes, dim))


class VectorQuantizer(nn.Module):
    """Nearest code of each latent; the codes are moving averages of the latents that chose them.

    A code whose averaged use falls below `dead_threshold` times the fair share (latents per step / K) restarts as a
    latent of the step, drawn by the counter RNG on (seed, step, image key, position). Before the first step all codes
    are dead, so the codebook begins as K latents of the data; until then `forward` hands the latents through (one code
    everywhere would meet norms of zero variance, whose gradients have no bound).
    """

    training_state = ("cluster_size", "embed_sum", "step")

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        decay: float = 0.99,
        dead_threshold: float = 0.1,
        eps: float = 1e-5,
        seed: int = 0,
    ):
        super().__init__()
        self.num_codes = num_codes
        self.decay = decay
        self.dead_threshold = dead_threshold
        self.eps = eps
        self.embedding = Codebook(num_codes, dim)
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("embed_sum", torch.zeros(num_codes, dim))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed_key", key_tensor(fold(seed, "codebook")), persistent=False)
        # What the current step has gathered so far: latents per code, and the K latents of lowest priority.
        self.register_buffer("step_counts", torch.zeros(num_codes), persistent=False)
        self.register_buffer("step_sums", torch.zeros(num_codes, dim), persistent=False)
        self.register_buffer("priorities", torch.full((num_codes,), _NO_CANDIDATE), persistent=False)
        self.register_buffer("candidates", torch.zeros(num_codes, dim), persistent=False)

    def forward(
        self, z: torch.Tensor, keys: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """z [B,D,h,w] -> quantized [B,D,h,w] (gradient passed straight to z), ids int32 [B,h,w], commitment f32 [B].

        commitment: the mean squared distance of an image's latents to their codes. In training mode with keys int64[B]
        the latents of images with weights[B] > 0 (None = all) are gathered for `end_step`.
        """
        B, D, h, w = z.shape
        latents = _rows(z)
        ids = vkernels.vq_nearest(latents.detach(), self.embedding.weight)
        codes = torch.where(self._untouched(), latents.detach(), F.embedding(ids, self.embedding.weight))
        if self.training and keys is not None:
            self._gather(latents.detach(), ids, keys, weights)
        commitment = (latents - codes).square().reshape(B, -1).mean(1)
        quantized = latents + (codes - latents).detach()
        return quantized.to(z.dtype).reshape(B, h, w, D).permute(0, 3, 1, 2), ids.reshape(B, h, w), commitment

    def ids(self, z: torch.Tensor) -> torch.Tensor:
        """z [B,D,h,w] -> int32 [B,h,w]; distances in float32, the lowest of equally near codes."""
        B, _, h, w = z.shape
        return vkernels.vq_nearest(_rows(z), self.embedding.weight).reshape(B, h, w)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> code vectors [...,D]."""
        return F.embedding(ids, self.embedding.weight)

    @torch.no_grad()
    def end_step(self, step: int, group: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor]:
        """Move the codebook by what all ranks gathered since the last call, restart dead codes, and begin `step + 1`.

        Every rank of the group calls it. Returns device scalars: codes_used (in this step), perplexity (exp of the
        entropy of their use), codes_reset.
        """
        counts, sums, candidates, found = self._all_ranks(group)
        untouched = self._untouched()
        vkernels.vq_ema_update(
            self.cluster_size, self.embed_sum, self.embedding.weight, counts, sums, self.decay, self.eps
        )
        fair_share = self.cluster_size.mean()
        dead = (self.cluster_size < self.dead_threshold * fair_share) | untouched
        turn = (dead.cumsum(0) - 1).clamp(min=0)  # the j-th dead code takes the j-th candidate
        reset = dead & found[turn]
        fresh = candidates[turn]
        self.embedding.weight.copy_(torch.where(reset[:, None], fresh, self.embedding.weight))
        self.embed_sum.copy_(torch.where(reset[:, None], fresh * fair_share, self.embed_sum))
        self.cluster_size.copy_(torch.where(reset, fair_share, self.cluster_size))
        usage = {**code_usage(counts), "codes_reset": reset.sum()}
        self.step_counts.zero_()
        self.step_sums.zero_()
        self.priorities.fill_(_NO_CANDIDATE)
        self.step.fill_(step + 1)
        return usage

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the averages but keep the codes: for weights that come without training state."""
        self.cluster_size.fill_(1.0)
        self.embed_sum.copy_(self.embedding.weight)
        self.step.zero_()

    def _untouched(self) -> torch.Tensor:
        """Whether there is no codebook yet, only zeros (a device scalar)."""
        return ~self.embedding.weight.any()

    @torch.no_grad()
    def _gather(
        self, latents: torch.Tensor, ids: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor | None
    ) -> None:
        """Add one micro-batch (latents [N,D], ids [N]; keys, weights [B]) to the step's counts, sums and candidates."""
        positions = torch.arange(len(ids) // len(keys), device=keys.device)
        image_keys = fold_tensor(fold_tensor(self.seed_key, self.step), keys)
        priorities = fold_tensor(image_keys[:, None], positions).flatten()
        if weights is not None:
            real = (weights > 0).repeat_interleave(len(positions), output_size=len(ids))
            priorities = torch.where(real, priorities, _NO_CANDIDATE)
            ids = torch.where(real, ids, -1)
        counts, sums = vkernels.vq_code_sums(latents, ids, self.num_codes)
        self.step_counts += counts
        self.step_sums += sums
        lowest, order = torch.cat([self.priorities, priorities]).topk(self.num_codes, largest=False)
        self.candidates.copy_(torch.cat([self.candidates, latents])[order])
        self.priorities.copy_(lowest)

    def _all_ranks(
        self, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """counts [K], sums [K,D], candidates [K,D] in order of priority and found bool[K], over all ranks."""
        counts, sums, candidates, priorities = self.step_counts, self.step_sums, self.candidates, self.priorities
        world = dist.get_world_size(group) if dist.is_initialized() else 1
        if world > 1:
            K, rank = self.num_codes, dist.get_rank(group)
            everywhere = priorities.new_empty(world * K)
            dist.all_gather_into_tensor(everywhere, priorities, group=group)
            priorities, order = everywhere.topk(K, largest=False)
            # Each winner is known to one rank; the others add zeros, so only [K,D] travels, not [W,K,D].
            own = (order // K == rank)[:, None]
            candidates = torch.where(own, candidates[order % K], 0.0)
            total = torch.cat([counts[:, None], sums, candidates], dim=1)
            dist.all_reduce(total, group=group)
            counts, (sums, candidates) = total[:, 0], total[:, 1:].chunk(2, dim=1)
        return counts, sums, candidates, priorities != _NO_CANDIDATE


class FiniteScalarQuantizer(nn.Module):
    """Each channel rounded to one of its few levels; the code is the mixed-radix number of these levels.

    The same face as `VectorQuantizer`; nothing is learned, the commitment is zero and no code ever dies.
    """

    training_state = ()

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = list(levels)
        self.num_codes = math.prod(self.levels)
        self.register_buffer("step_counts", torch.zeros(self.num_codes), persistent=False)

    def forward(
        self, z: torch.Tensor, keys: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """z [B,D,h,w] -> quantized [B,D,h,w] in [-1,1] (straight-through), ids int32 [B,h,w], zeros float32 [B]."""
        codes, ids = vkernels.fsq_quantize(_channels_last(z), self.levels)
        if self.training and keys is not None:
            ones = torch.ones_like(keys, dtype=torch.float32) if weights is None else (weights > 0).float()
            self.step_counts.index_add_(0, ids.flatten(), ones[:, None, None].expand(ids.shape).flatten())
        return codes.to(z.dtype).permute(0, 3, 1, 2), ids, z.new_zeros(len(z), dtype=torch.float32)

    def ids(self, z: torch.Tensor) -> torch.Tensor:
        """z [B,D,h,w] -> int32 [B,h,w]."""
        return vkernels.fsq_quantize(_channels_last(z), self.levels)[1]

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> codes [...,D]."""
        return vkernels.fsq_dequantize(ids, self.levels)

    @torch.no_grad()
    def end_step(self, step: int, group: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor]:
        """The use of the codes over all ranks since the last call, as `VectorQuantizer.end_step` tells it."""
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(self.step_counts, group=group)
        usage = code_usage(self.step_counts)
        self.step_counts.zero_()
        return {**usage, "codes_reset": torch.zeros_like(usage["codes_used"])}

    def restart(self) -> None:
        """Nothing to forget."""


def code_usage(counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """counts f32[K] -> device scalars codes_used and perplexity, exp(entropy): K when all codes are used alike."""
    shares = counts / counts.sum().clamp(min=1.0)
    return {"codes_used": (counts > 0).sum(), "perplexity": torch.special.entr(shares).sum().exp()}


def _channels_last(z: torch.Tensor) -> torch.Tensor:
    """[B,D,h,w] -> float32 [B,h,w,D]: distances and rounding are too coarse in bfloat16."""
    return z.float().permute(0, 2, 3, 1).contiguous()


def _rows(z: torch.Tensor) -> torch.Tensor:
    """[B,D,h,w] -> float32 [N,D] in raster order."""
    return _channels_last(z).flatten(0, 2)
