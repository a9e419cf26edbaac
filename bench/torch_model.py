"""The model that a competent user writes in plain torch: packed tokens, FlexAttention or SDPA, to be compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vtrain.models.decoder import DecoderConfig

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q, k, v [1, H, T, D] -> [1, H, T, D]


def document_attention(lengths: Sequence[int], device: torch.device, flex: bool) -> Attention:
    """Causal inside documents: FlexAttention, for a model that is compiled, with its block mask; or SDPA one by one."""
    if not flex:

        def one_by_one(q, k, v):
            parts = zip(*(x.split(list(lengths), dim=2) for x in (q, k, v)))
            out = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
            return torch.cat(out, dim=2)

        return one_by_one
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def visible(b, h, q, k):
        return (q >= k) & (document[q] == document[k])

    T = len(document)
    mask = torch.compile(create_block_mask)(visible, None, None, T, T, device=str(device))
    return lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, merged projections."""

    def __init__(self, config: DecoderConfig, attention: Attention) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        C, D, Hq, Hk, ffn = config.hidden, config.head_dim, config.heads, config.kv_heads, config.ffn
        self.attn_norm, self.ffn_norm = nn.RMSNorm(C, config.norm_eps), nn.RMSNorm(C, config.norm_eps)
        self.q_norm, self.k_norm = nn.RMSNorm(D, config.norm_eps), nn.RMSNorm(D, config.norm_eps)
        self.qkv, self.out = nn.Linear(C, (Hq + 2 * Hk) * D, bias=False), nn.Linear(Hq * D, C, bias=False)
        self.gate_up, self.down = nn.Linear(C, 2 * ffn, bias=False), nn.Linear(ffn, C, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        c = self.config
        heads = self.qkv(self.attn_norm(x)).view(-1, c.heads + 2 * c.kv_heads, c.head_dim)
        q, k, v = heads.split((c.heads, c.kv_heads, c.kv_heads), dim=1)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(0, 1)[None] for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        x = x + self.out(self.attention(q, k, v.to(q.dtype))[0].transpose(0, 1).flatten(1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class TorchModel(nn.Module):
    """ids[T], positions[T], labels[T] -> the sum of the losses; labels below 0 are ignored."""

    def __init__(self, config: DecoderConfig, vocabulary: int, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)
        self.head = nn.Linear(config.hidden, vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.init_std)

    def forward(self, ids, positions, labels, head_loss) -> torch.Tensor:
        half = torch.arange(0, self.config.head_dim, 2, device=ids.device, dtype=torch.float64) / self.config.head_dim
        angles = positions.double()[:, None] * self.config.rope_theta**-half
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return head_loss(self.norm(x), self.head.weight, labels)


def whole_logits(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, weight).float(), labels, ignore_index=-100, reduction="sum")
