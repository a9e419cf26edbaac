"""The packed decoder: a Llama-shaped transformer over one flat stream of tokens, with tables per vocabulary range.

Legend: T tokens of the batch, C hidden size, F ffn size, Hq/Hk query/key heads, D head size, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import vkernels
from vtrain import rng
from vtrain.batch import PackedBatch
from vtrain.models.few_rows import linear
from vtrain.vocab import Vocabulary

_DRAW_ROWS = 128  # rows that share one random stream: a shard draws only the blocks it holds


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary wavelengths; positions below `original_max_positions` were trained first."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"rope_scaling: factor {self.factor}, low_freq_factor {self.low_freq_factor}, high_freq_factor "
                f"{self.high_freq_factor}; expected factor >= 1 and 0 < low < high"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; the vocabulary is given apart. `head_dim` 0 means hidden / heads."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    max_positions: int = 32768
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "max_positions", "rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"decoder {name}: {getattr(self, name)}, expected more than 0")
        if self.init_std < 0:
            raise ValueError(f"decoder init_std: {self.init_std}, expected 0 or more")
        if self.head_dim == 0:
            if self.hidden % self.heads:
                raise ValueError(f"decoder heads: {self.heads} does not divide hidden {self.hidden}; give head_dim")
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.head_dim < 0 or self.head_dim % 2:
            raise ValueError(f"decoder head_dim: {self.head_dim}, expected an even number (rotary pairs)")
        if self.heads % self.kv_heads:
            raise ValueError(f"decoder kv_heads: {self.kv_heads} does not divide heads {self.heads}")
        if self.qkv_bias and self.qk_norm:
            raise ValueError("decoder qk_norm: true together with qkv_bias; no Hugging Face architecture has both")


class DecoderLayer(nn.Module):
    """One pre-norm block, x[T,C] -> x[T,C]: attention over the packed documents, then SwiGLU. The unit FSDP wraps."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        C, D, Hq, Hk, ffn = config.hidden, config.head_dim, config.heads, config.kv_heads, config.ffn
        self.attn_norm = _parameter(C)
        self.qkv = _parameter((Hq + 2 * Hk) * D, C)
        self.qkv_bias = _parameter((Hq + 2 * Hk) * D) if config.qkv_bias else None
        self.q_norm = _parameter(D) if config.qk_norm else None
        self.k_norm = _parameter(D) if config.qk_norm else None
        self.out = _parameter(C, Hq * D)
        self.ffn_norm = _parameter(C)
        self.gate_up = _parameter(2 * ffn, C)
        self.down = _parameter(C, ffn)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: PackedBatch,
        cache=None,
        index: int = 0,
    ) -> torch.Tensor:
        """cos, sin float32[T, D/2]. With a cache, `cache.attend(index, q, k, v, batch)` does the attention."""
        update = self._attention(x, cos, sin, batch, cache, index)
        normed, x = vkernels.add_rms_norm(update, x, self.ffn_norm, self.config.norm_eps)
        return x + linear(vkernels.swiglu(linear(normed, self.gate_up)), self.down)

    def _attention(self, x, cos, sin, batch, cache, index) -> torch.Tensor:
        config = self.config
        Hq, Hk = config.heads, config.kv_heads
        qkv = linear(vkernels.rms_norm(x, self.attn_norm, config.norm_eps), self.qkv, self.qkv_bias)
        q, k, v = qkv.view(-1, Hq + 2 * Hk, config.head_dim).split((Hq, Hk, Hk), dim=1)
        if config.qk_norm:
            q, k = vkernels.qk_norm_rope(q, k, self.q_norm, self.k_norm, cos, sin, config.norm_eps)
        else:
            q, k = vkernels.rope(q, k, cos, sin)
        if cache is not None:
            o = cache.attend(index, q, k, v, batch)
        else:
            [tiles] = batch.kernel_tables.get("attention_tiles", (None,))
            o = vkernels.varlen_attention(
                q,
                k,
                v,
                batch.cu_seqlens,
                max_seqlen_q=batch.max_seqlen,
                kv_lo=batch.kv_lo,
                kv_hi=batch.kv_hi,
                tiles=tiles,
            )
        return linear(o.flatten(1), self.out)


class Tables(nn.Module):
    """One table per vocabulary range, [rows, C], registered under the range's name; called, it lists them."""

    def __init__(self, vocab: Vocabulary, width: int):
        super().__init__()
        self._vocab = vocab
        for r in vocab.ranges:
            self.register_parameter(r.name, _parameter(r.rows, width))

    def forward(self) -> tuple[list[torch.Tensor], list[int], list[int]]:
        """(tables, bases, sizes) in the order of the ranges, as the ops of vkernels take them."""
        return [getattr(self, name) for name in self._vocab.names], self._vocab.bases, self._vocab.sizes


class Decoder(nn.Module):
    """Tables per vocabulary range (`embed.<range>`, `head.<range>` unless tied), blocks, a final norm.

    Built on a real device it is initialised with seed 0. Built under `torch.device("meta")` it costs nothing: shard it,
    call `to_empty(device=...)`, then `init_weights(seed)` or load every parameter. There are no buffers.
    `decoder.head()` gives (tables, bases, sizes) for `vkernels.linear_cross_entropy`, tied or not.
    """

    def __init__(self, config: DecoderConfig, vocab: Vocabulary):
        super().__init__()
        self.config = config
        self.vocab = vocab
        self.embed = Tables(vocab, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = _parameter(config.hidden)
        if config.tied:
            object.__setattr__(self, "head", self.embed)  # not registered again: state_dict names each table once
        else:
            self.head = Tables(vocab, config.hidden)
        if not self.norm.is_meta:
            self.init_weights(0)

    def forward(
        self, batch: PackedBatch, cache=None, taps: Sequence[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """(hidden[T,C] after the final norm, {n: x[T,C] as block n left it, for every n of `taps`}).

        With a cache, block n calls `cache.attend(n, q[T,Hq,D], k[T,Hk,D], v[T,Hk,D], batch) -> o[T,Hq,D]`, q and k
        rotated. ValueError for a tap that is not a layer.
        """
        wrong = [n for n in taps if not 0 <= n < len(self.layers)]
        if wrong:
            raise ValueError(f"taps: no layer {wrong}; the decoder has layers 0..{len(self.layers) - 1}")
        tables, bases, sizes = self.embed()
        x = vkernels.embed(batch.ids, tables, bases, sizes=sizes, order=batch.kernel_tables.get("embed_order"))
        cos, sin = rope_tables(batch.positions, self.config)
        tapped = {}
        for n, layer in enumerate(self.layers):
            x = layer(x, cos, sin, batch, cache, n)
            if n in taps:
                tapped[n] = x
        return vkernels.rms_norm(x, self.norm, self.config.norm_eps), tapped

    def logits(self, hidden: torch.Tensor, ranges: Sequence[str] | None = None) -> torch.Tensor:
        """hidden[T,C] -> [T, V], or side by side only the columns of the named ranges. KeyError for an unknown name."""
        names = self.vocab.names if ranges is None else ranges
        tables = [getattr(self.head, r.name)[: r.size] for r in map(self.vocab.__getitem__, names)]
        logits = [linear(hidden, table) for table in tables]
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter from (seed, its name, its row): equal for any order, device or number of ranks.

        Matrices are normal with std `init_std`, those that write into the residual stream scaled by
        1/sqrt(2 * layers); norms are 1, biases and the padding rows of tables 0.
        """
        for name, parameter in self.named_parameters():
            local, first = local_rows(parameter)
            if parameter.ndim == 1:
                local.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = self.config.init_std
            if name.endswith((".out", ".down")) and name.startswith("layers."):
                std /= math.sqrt(2 * self.config.layers)
            fill_normal_rows(local, rng.fold(seed, name), first, std)
            if name.startswith(("embed.", "head.")):
                size = self.vocab[name.split(".")[1]].size
                local[max(size - first, 0) :] = 0.0


def rope_tables(positions: torch.Tensor, config: DecoderConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin float32[T, D/2], made anew for a batch: no buffer that a meta device or a cast could spoil."""
    scaling = config.rope_scaling
    named = scaling and {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
    return vkernels.rope_tables(positions, config.head_dim, theta=config.rope_theta, scaling=named)


def fill_normal_rows(rows: torch.Tensor, key: int, first: int, std: float) -> None:
    """Fill rows[n, ...] with the rows first .. first+n-1 of an endless normal table that `key` names, in place."""
    width = rows[0].numel() if len(rows) else 0
    for block in range(first // _DRAW_ROWS, -(-(first + len(rows)) // _DRAW_ROWS)):
        start = block * _DRAW_ROWS
        low, high = max(first, start), min(first + len(rows), start + _DRAW_ROWS)
        if low >= high:
            continue
        stream = np.random.Generator(np.random.Philox(key=rng.fold(key, block)))
        drawn = torch.from_numpy(stream.standard_normal((high - start, width), dtype=np.float32)).mul_(std)
        rows[low - first : high - first].copy_(drawn[low - start :].view(-1, *rows.shape[1:]))


def local_rows(parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's rows of a parameter that may be sharded along dimension 0, and the number of the first one."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    first, rows = 0, parameter.shape[0]
    mesh = parameter.device_mesh
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard(0):
            chunk = -(-rows // mesh.size(dim))
            begin = min(mesh.get_local_rank(dim) * chunk, rows)
            first, rows = first + begin, min(chunk, rows - begin)
        elif not placement.is_replicate():
            raise ValueError(f"a parameter placed as {placement}; expected shards of dimension 0 or replicas")
    return parameter.to_local().detach(), first


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))
