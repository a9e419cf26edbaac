"""NVIDIA's Cosmos tokenizers with finite scalar quantization: their shapes, and the causal video network (DV8x16x16).

Modules are named so that published weights load by name. Legend: B videos, C channels, T frames of H x W pixels,
t x h x w codes; an image is a video of one frame. The image tokenizer (DI16x16) is `cosmos_fold.CosmosImages`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import vkernels

PATCH = 4  # pixels and frames that two levels of Haar wavelets join, along each axis
LEVELS = (8, 8, 8, 5, 5, 5)  # of the quantizer
VARIANTS = {"DV8x16x16": 16, "DI16x16": 256}  # -> channels of the latents


@dataclass(frozen=True)
class CosmosConfig:
    """variant: DV8x16x16 (video) or DI16x16 (images). The widths are the published ones unless given. ValueError names
    what cannot be. resolution: side of the pictures that it was made for."""

    variant: str
    resolution: int = 1024
    channels: int = 128
    channel_multiplier: tuple[int, ...] = (2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 0  # 0 = the variant's

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; expected one of {', '.join(VARIANTS)}")
        if self.resolution < 1 or self.resolution % self.downscale:
            raise ValueError(f"resolution is {self.resolution}; expected a multiple of {self.downscale}")
        if len(self.channel_multiplier) != 3:
            raise ValueError(f"channel_multiplier is {self.channel_multiplier}; expected 3 levels")
        object.__setattr__(self, "latent_channels", self.latent_channels or VARIANTS[self.variant])

    @property
    def video(self) -> bool:
        return self.variant.startswith("DV")

    @property
    def in_channels(self) -> int:
        return 3

    @property
    def downscale(self) -> int:
        """Pixels along one side of a code."""
        return 16

    @property
    def num_codes(self) -> int:
        return math.prod(LEVELS)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.channels * m for m in self.channel_multiplier)


class CosmosVideo(nn.Module):
    """Videos of 1 + 8k frames <-> 1 + k grids of codes; the first grid is that of the first frame alone."""

    def __init__(self, config: CosmosConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv(config.latent_channels, len(LEVELS))
        self.post_quant_conv = CausalConv(len(LEVELS), config.latent_channels)
        self.decoder = Decoder(config)

    def latents(self, video: torch.Tensor) -> torch.Tensor:
        """[B,3,1+8k,H,W] in [-1,1] -> what is quantized, [B,6,1+k,H/16,W/16]."""
        if (video.shape[2] - 1) % 8:
            raise ValueError(f"a video of {video.shape[2]} frames; expected 1, 9, 17, ...")
        return self.quant_conv(self.encoder(video))

    def encode_video(self, video: torch.Tensor) -> torch.Tensor:
        """[B,3,1+8k,H,W] in [-1,1] -> ids int32 [B,1+k,H/16,W/16]."""
        return vkernels.fsq_quantize(self.latents(video).float().movedim(1, -1).contiguous(), LEVELS)[1]

    def decode_video(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int [B,1+k,h,w] -> [B,3,1+8k,16h,16w]; not clipped to [-1,1]."""
        codes = vkernels.fsq_dequantize(ids, LEVELS).movedim(-1, 1)
        return self.decoder(self.post_quant_conv(codes.to(self.post_quant_conv.conv3d.weight.dtype)))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B,3,H,W] in [-1,1] -> ids int32 [B,H/16,W/16]."""
        return self.encode_video(images[:, :, None])[:, 0]

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int [B,h,w] -> [B,3,16h,16w]; not clipped to [-1,1]."""
        return self.decode_video(ids[:, None])[:, :, 0]


def haar(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """One level along `axes` (negative): [B,C,...] -> [B,C * 2^n,...] of half the sides.

    Of two neighbours low is the mean and high half the difference. The bands lie one behind the other, the last axis
    changing fastest: low low, low high, high low, high high.
    """
    bands = [x]
    for axis in axes:
        pairs = [band.unflatten(axis, (-1, 2)).unbind(axis) for band in bands]
        bands = [half for a, b in pairs for half in ((a + b) / 2, (a - b) / 2)]
    return torch.cat(bands, 1)


def inverse_haar(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """[B,C * 2^n,...] -> [B,C,...] of twice the sides."""
    bands = x.chunk(2 ** len(axes), 1)
    for axis in reversed(axes):
        pairs = zip(bands[::2], bands[1::2])
        bands = [torch.stack((low + high, low - high), axis).flatten(axis - 1, axis) for low, high in pairs]
    return bands[0]


VIDEO_AXES = (-3, -2, -1)  # frames, rows, columns


class Encoder(nn.Module):
    """[B,3,1+8k,H,W] -> [B,latent_channels,1+k,H/16,W/16]."""

    def __init__(self, config: CosmosConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = factorized(3 * PATCH**3, config.channels)
        self.down = nn.ModuleList()
        previous = config.channels
        for level, width in enumerate(widths):
            stage = nn.Module()
            stage.block = residual_blocks(config.num_res_blocks, previous, width)
            if level < len(widths) - 1:
                stage.downsample = Downsample(width, frames=level == 0)
            self.down.append(stage)
            previous = width
        self.mid = Middle(previous)
        self.norm_out = FrameNorm(previous)
        self.conv_out = factorized(previous, config.latent_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[:, :, :1]] * (PATCH - 1) + [x], 2)
        x = self.conv_in(haar(haar(x, VIDEO_AXES), VIDEO_AXES))
        for stage in self.down:
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "downsample"):
                x = stage.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B,latent_channels,1+k,h,w] -> [B,3,1+8k,16h,16w]. `up[0]` is the finest level and runs last."""

    def __init__(self, config: CosmosConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = factorized(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            stage = nn.Module()
            coarser = widths[min(level + 1, len(widths) - 1)]
            stage.block = residual_blocks(config.num_res_blocks + 1, coarser, width)
            if level > 0:
                stage.upsample = Upsample(width, frames=level == 1)
            self.up.append(stage)
        self.norm_out = FrameNorm(widths[0])
        self.conv_out = factorized(widths[0], 3 * PATCH**3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(x))
        for stage in reversed(self.up):
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "upsample"):
                x = stage.upsample(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return inverse_haar(inverse_haar(x, VIDEO_AXES), VIDEO_AXES)[:, :, PATCH - 1 :]


class CausalConv(nn.Module):
    """A convolution over `frames` x `side` x `side`: no frame sees a later one, for the first is repeated before it.

    The picture is padded with zeros to keep its size; with a stride in space nothing is padded.
    """

    def __init__(
        self, in_channels: int, out_channels: int, frames: int = 1, side: int = 1, stride: tuple[int, int] = (1, 1)
    ):
        super().__init__()
        self.before = frames - stride[0]
        self.conv3d = nn.Conv3d(
            in_channels,
            out_channels,
            (frames, side, side),
            stride=(stride[0], stride[1], stride[1]),
            padding=(0, side // 2, side // 2) if stride[1] == 1 else 0,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3d(torch.cat([x[:, :, :1]] * self.before + [x], 2))


def factorized(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 within the frames, then three frames at each position; nothing between the two."""
    within = CausalConv(in_channels, out_channels, side=3)
    return nn.Sequential(within, CausalConv(out_channels, out_channels, frames=3))


class FrameNorm(nn.Module):
    """GroupNorm of one group over each frame by itself. [B,C,T,H,W] -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class ResidualBlock(nn.Module):
    """Twice norm, swish, factorized convolution; a 1x1x1 on the way around where the width changes."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = FrameNorm(in_channels)
        self.conv1 = factorized(in_channels, out_channels)
        self.norm2 = FrameNorm(out_channels)
        self.conv2 = factorized(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = CausalConv(in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def residual_blocks(count: int, in_channels: int, out_channels: int) -> nn.ModuleList:
    widths = [in_channels] + [out_channels] * count
    return nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(widths))


class Attention(nn.Module):
    """One head, with a residual: over the positions of each frame, or at each position over the frames so far."""

    def __init__(self, channels: int, over_frames: bool):
        super().__init__()
        self.over_frames = over_frames
        self.norm = FrameNorm(channels)
        self.q = CausalConv(channels, channels)
        self.k = CausalConv(channels, channels)
        self.v = CausalConv(channels, channels)
        self.proj_out = CausalConv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        # [B,C,T,H,W] -> [B,H,W,T,C] or [B,T,H,W,C], then to [sequences, length, C]
        order, parallel = ((0, 3, 4, 2, 1), 3) if self.over_frames else ((0, 2, 3, 4, 1), 2)
        q, k, v = (conv(normed).permute(order) for conv in (self.q, self.k, self.v))
        rows = [part.flatten(parallel, -2).flatten(0, parallel - 1)[:, None] for part in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*rows, is_causal=self.over_frames)
        back = [order.index(axis) for axis in range(5)]
        return x + self.proj_out(mixed.reshape(q.shape).permute(back))


class Middle(nn.Module):
    """Residual block, attention over positions, attention over frames, residual block, at the coarsest level."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = nn.Sequential(Attention(channels, over_frames=False), Attention(channels, over_frames=True))
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halves the sides, then (`frames`) 1 + 2n frames become 1 + n: each time a convolution beside a mean.

    Without `frames` the weights of conv2 are there, as they are in the published files, but not used.
    """

    def __init__(self, channels: int, frames: bool):
        super().__init__()
        self.frames = frames
        self.conv1 = CausalConv(channels, channels, side=3, stride=(1, 2))
        self.conv2 = CausalConv(channels, channels, frames=3, stride=(2, 1))
        self.conv3 = CausalConv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        x = self.conv1(x) + F.avg_pool2d(x.flatten(1, 2), 2).unflatten(1, x.shape[1:3])
        if self.frames:
            x = torch.cat([x[:, :, :1], x], 2)
            x = self.conv2(x) + (x[:, :, 0::2] + x[:, :, 1::2]) / 2
        return self.conv3(x)


class Upsample(nn.Module):
    """(`frames`) 1 + n frames become 1 + 2n, then the sides double: each time a convolution beside the repeated.

    Without `frames` the weights of conv1 are there, as they are in the published files, but not used.
    """

    def __init__(self, channels: int, frames: bool):
        super().__init__()
        self.frames = frames
        self.conv1 = CausalConv(channels, channels, frames=3)
        self.conv2 = CausalConv(channels, channels, side=3)
        self.conv3 = CausalConv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.frames:
            x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, 2)], 2)
            x = self.conv1(x) + x
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return self.conv3(self.conv2(x) + x)
