"""The convolutional autoencoder of discrete image tokenizers: encoder -> quantizer -> decoder.

Structure and weight names are those of the VQGAN family (Chameleon, Being-VL), so that their published weights load
by name. Legend: B images, C channels, H x W pixels, h x w codes, D code width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from vtrain.visual.quantizer import FiniteScalarQuantizer, VectorQuantizer

_LEAST = {
    "resolution": 1,
    "in_channels": 1,
    "base_channels": 1,
    "channel_multiplier": 1,
    "num_res_blocks": 1,
    "latent_channels": 1,
    "norm_groups": 0,
    "embed_dim": 1,
    "num_embeddings": 1,
    "ema_decay": 0,
    "dead_threshold": 0,
    "fsq_levels": 2,
}


@dataclass(frozen=True)
class AutoencoderConfig:
    """One halving of the picture between consecutive entries of `channel_multiplier`.

    quantizer "vq" reads embed_dim, num_embeddings, ema_decay and dead_threshold; "fsq" reads fsq_levels, whose length
    is the code width and whose product the number of codes. norm_groups 0 = min(32, base_channels // 4). ValueError
    names a key that cannot be.
    """

    resolution: int = 512
    in_channels: int = 3
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_channels: int = 256
    attention: bool = True
    norm_groups: int = 0
    quantizer: str = "vq"
    embed_dim: int = 256
    num_embeddings: int = 8192
    ema_decay: float = 0.99
    dead_threshold: float = 0.1
    fsq_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

    def __post_init__(self) -> None:
        for name in ("channel_multiplier", "fsq_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=least - 1) < least:
                raise ValueError(f"autoencoder {name} is {value}; expected at least {least}")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"autoencoder: {self.groups} norm_groups do not divide a level of {width} channels")
        if self.resolution % self.downscale:
            raise ValueError(f"autoencoder resolution {self.resolution} is not a multiple of {self.downscale}")
        if self.quantizer not in ("vq", "fsq"):
            raise ValueError(f"autoencoder quantizer is {self.quantizer!r}; expected 'vq' or 'fsq'")
        if self.ema_decay >= 1:
            raise ValueError(f"autoencoder ema_decay is {self.ema_decay}; expected less than 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * m for m in self.channel_multiplier)

    @property
    def groups(self) -> int:
        """Of every GroupNorm; by default at least 4 channels share one, for the norm of one channel erases its mean."""
        return self.norm_groups or max(1, min(32, self.base_channels // 4))

    @property
    def downscale(self) -> int:
        """Pixels along one side of a code."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def num_codes(self) -> int:
        return math.prod(self.fsq_levels) if self.quantizer == "fsq" else self.num_embeddings

    @property
    def code_dim(self) -> int:
        return len(self.fsq_levels) if self.quantizer == "fsq" else self.embed_dim


class Autoencoder(nn.Module):
    """`forward` trains; `encode` and `decode` are the two halves that remain afterwards."""

    def __init__(self, config: AutoencoderConfig, *, seed: int = 0):
        """seed: of the draws that revive unused codes; the weights follow torch's own generator."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        if config.quantizer == "fsq":
            self.quantize = FiniteScalarQuantizer(config.fsq_levels)
        else:
            self.quantize = VectorQuantizer(
                config.num_embeddings,
                config.embed_dim,
                decay=config.ema_decay,
                dead_threshold=config.dead_threshold,
                seed=seed,
            )
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def forward(
        self, images: torch.Tensor, keys: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images [B,3,H,W] in [-1,1] -> reconstruction [B,3,H,W], ids int32 [B,h,w], commitment float32 [B].

        keys int64[B] (u64 sample keys): with them, in training mode, the quantizer gathers the statistics that
        `end_step` applies; images whose entry of weights[B] is 0 are padding and leave no trace there.
        """
        quantized, ids, commitment = self.quantize(self.quant_conv(self.encoder(images)), keys, weights)
        return self.decoder(self.post_quant_conv(quantized)), ids, commitment

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images [B,3,H,W] in [-1,1] -> ids int32 [B,h,w]."""
        return self.quantize.ids(self.quant_conv(self.encoder(images)))

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int [B,h,w] -> images [B,3,H,W]; not clipped to [-1,1]."""
        codes = self.quantize.lookup(ids).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(codes.permute(0, 3, 1, 2)))

    def end_step(self, step: int, group: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor]:
        """After the last micro-batch of step `step`, on every rank: move the codebook. Returns the use of the codes."""
        return self.quantize.end_step(step, group)

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors of a finished tokenizer: the state without what only training needs."""
        return {name: tensor for name, tensor in self.state_dict().items() if name not in self._training_state()}

    def load_weights(self, tensors: dict[str, torch.Tensor], origin: str = "weights") -> None:
        """The inverse of `weights`. ValueError lists every missing, unexpected and misshapen tensor."""
        if problems := mismatches(tensors, self.weights()):
            raise ValueError(f"{origin} does not fit the autoencoder: {'; '.join(problems)}")
        self.load_state_dict(tensors, strict=False)
        self.quantize.restart()

    def _training_state(self) -> set[str]:
        return {f"quantize.{name}" for name in self.quantize.training_state}


def mismatches(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Every missing, unexpected and misshapen tensor, in words."""
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    return problems + [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]


class Encoder(nn.Module):
    """images [B,3,H,W] -> latents [B,latent_channels,h,w]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        groups, widths = config.groups, config.widths
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        previous = widths[0]
        for level, width in enumerate(widths):
            stage = nn.Module()
            stage.block = residual_blocks(config.num_res_blocks, previous, width, groups)
            if level < len(widths) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
            previous = width
        self.mid = Middle(previous, groups, config.attention)
        self.norm_out = nn.GroupNorm(groups, previous, eps=1e-6)
        self.conv_out = nn.Conv2d(previous, config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x.to(self.conv_in.weight.dtype))
        for stage in self.down:
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "downsample"):
                x = stage.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """latents [B,latent_channels,h,w] -> images [B,3,H,W]. `up[0]` is the finest level and runs last."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        groups, widths = config.groups, config.widths
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups, config.attention)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            stage = nn.Module()
            coarser = widths[min(level + 1, len(widths) - 1)]
            stage.block = residual_blocks(config.num_res_blocks + 1, coarser, width, groups)
            if level > 0:
                stage.upsample = Upsample(width)
            self.up.append(stage)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(x))
        for stage in reversed(self.up):
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "upsample"):
                x = stage.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ResidualBlock(nn.Module):
    """Twice norm, swish, 3x3; a 1x1 on the way around where the width changes. [B,C,H,W] -> [B,out_channels,H,W]."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def residual_blocks(count: int, in_channels: int, out_channels: int, groups: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * count
    return nn.ModuleList(ResidualBlock(a, b, groups) for a, b in itertools.pairwise(widths))


class Attention(nn.Module):
    """One head over all positions, with a residual. [B,C,h,w] -> [B,C,h,w]."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B,1,h*w,C], scaled by 1/sqrt(C)
        return x + self.proj_out(mixed[:, 0].transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """Residual block, attention (optional), residual block, at the coarsest level."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        if attention:
            self.attn_1 = Attention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)


class Downsample(nn.Module):
    """Halves both sides: zeros on the right and below, then a 3x3 of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides: each pixel repeated, then a 3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
