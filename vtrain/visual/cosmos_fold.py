"""Cosmos tokenizers for single images: the network of DI16x16, and DV8x16x16 folded into such a one, exactly.

With one frame every convolution over time sees copies of it. So the causal video network equals a plain one: taps are
summed, convolutions with nothing between them composed, attention over one frame is its value, and of the wavelets
over time only the mean lives. 53 convolutions of the encoder become 28, 64 of the decoder 34, all of them 2-D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from vtrain.visual.cosmos import LEVELS, PATCH, CosmosConfig, haar, inverse_haar
from vtrain.visual.quantizer import FiniteScalarQuantizer
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig, residual_blocks

BANDS = PATCH**2  # of the wavelets of an image


class CosmosImages(nn.Module):
    """Images <-> grids of codes: an autoencoder between wavelets.

    tensors: the state of `net`, of any float dtype: of DI16x16 the published one, of DV8x16x16 what `fold` makes.
    """

    def __init__(self, config: CosmosConfig, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.config = config
        # DI16x16 takes columns before rows, DV8x16x16 rows before columns: the middle two of four bands change places.
        self.axes = (-2, -1) if config.video else (-1, -2)
        self.net = network(config)
        self.net.load_state_dict(tensors, assign=True)
        self.net.quantize = FiniteScalarQuantizer(LEVELS)
        self.net.to(memory_format=torch.channels_last)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """[B,3,H,W] in [-1,1] -> what is quantized, [B,6,H/16,W/16]."""
        return self.net.quant_conv(self.net.encoder(self._bands(images)))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[B,3,H,W] in [-1,1] -> ids int32 [B,H/16,W/16]."""
        return self.net.encode(self._bands(images))

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int [B,h,w] -> [B,3,16h,16w]; not clipped to [-1,1]."""
        return inverse_haar(inverse_haar(self.net.decode(ids), self.axes), self.axes)

    def _bands(self, images: torch.Tensor) -> torch.Tensor:
        return haar(haar(images, self.axes), self.axes).contiguous(memory_format=torch.channels_last)


def network(config: CosmosConfig) -> Autoencoder:
    """The autoencoder of wavelet bands, on the meta device; its state without buffers is that of DI16x16."""
    groups = 1 if config.video else 32
    inner = AutoencoderConfig(
        resolution=config.resolution // PATCH,
        in_channels=3 * BANDS,
        base_channels=config.channels,
        channel_multiplier=config.channel_multiplier,
        num_res_blocks=config.num_res_blocks,
        latent_channels=config.latent_channels,
        norm_groups=groups,
        quantizer="fsq",
        fsq_levels=LEVELS,
    )
    with torch.device("meta"):
        net = Autoencoder(inner)
        # The first level's own width begins in its first block, not in conv_in.
        net.encoder.conv_in = nn.Conv2d(3 * BANDS, config.channels, 3, padding=1)
        net.encoder.down[0].block = residual_blocks(config.num_res_blocks, config.channels, config.widths[0], groups)
        if config.video:
            for half in (net.encoder, net.decoder):
                half.mid.attn_1 = nn.Sequential(half.mid.attn_1, FrameAttention(config.widths[-1]))
            # The convolution over time has a bias: behind the zero padding of the next it would not be the same.
            width, stage = config.widths[1], net.decoder.up[1]
            stage.upsample = nn.Sequential(nn.Conv2d(width, width, 1), stage.upsample)
    return net


class FrameAttention(nn.Module):
    """Attention over a single frame: each position sees itself. [B,C,h,w] -> [B,C,h,w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(self.norm(x))


def fold(tensors: Mapping[str, torch.Tensor], config: CosmosConfig) -> dict[str, torch.Tensor]:
    """The state of `CosmosVideo` -> the state of `network`: the same function of one frame, computed in float64."""
    folded = {}
    for name, module in network(config).named_modules():
        if isinstance(module, nn.GroupNorm):
            folded |= {f"{name}.{part}": tensors[f"{name}.norm.{part}"].double() for part in ("weight", "bias")}
        elif isinstance(module, nn.Conv2d):
            folded |= {f"{name}.{part}": value for part, value in _kernel(tensors, name)._asdict().items()}
    return folded


class Kernel(NamedTuple):
    """A convolution within a frame."""

    weight: torch.Tensor  # float64 [out, in, rows, columns]
    bias: torch.Tensor  # float64 [out]

    def then(self, pointwise: Kernel) -> Kernel:
        """This one and a 1x1 behind it."""
        matrix = pointwise.weight[:, :, 0, 0]
        return Kernel(torch.einsum("om,mirc->oirc", matrix, self.weight), matrix @ self.bias + pointwise.bias)

    def beside(self, stencil: list[list[float]]) -> Kernel:
        """This one plus the same stencil [rows][columns] within each channel."""
        each = torch.eye(len(self.bias), dtype=torch.float64)[:, :, None, None]
        return Kernel(self.weight + each * torch.tensor(stencil, dtype=torch.float64), self.bias)


ITSELF = [[1.0]]
CENTER = [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
MEAN_OF_FOUR = [[0.25, 0.25, 0.0], [0.25, 0.25, 0.0], [0.0, 0.0, 0.0]]  # of the block that a stride of 2 begins at


def _kernel(tensors: Mapping[str, torch.Tensor], name: str) -> Kernel:
    """What the convolution `name` of `network` is made of."""

    def conv(source: str) -> Kernel:
        weight, bias = (tensors[f"{source}.conv3d.{part}"].double() for part in ("weight", "bias"))
        return Kernel(weight.sum(2), bias)

    parent = name.rpartition(".")[0]
    if name.endswith("attn_1.1.conv"):
        return conv(f"{parent}.v").then(conv(f"{parent}.proj_out"))
    if name.endswith("downsample.conv"):
        halved = conv(f"{parent}.conv1").beside(MEAN_OF_FOUR)
        if name.startswith("encoder.down.0."):
            halved = halved.then(conv(f"{parent}.conv2").beside(ITSELF))
        return halved.then(conv(f"{parent}.conv3"))
    if name.endswith("upsample.0"):
        return conv(f"{parent}.conv1").beside(ITSELF)
    if ".upsample." in name:
        source = name.partition(".upsample.")[0] + ".upsample"
        return conv(f"{source}.conv2").beside(CENTER).then(conv(f"{source}.conv3"))
    if f"{name}.conv3d.weight" in tensors:
        return conv(name)
    pair = conv(f"{name}.0").then(conv(f"{name}.1"))
    if name == "encoder.conv_in":
        return Kernel(_still_bands(pair.weight), pair.bias)
    if name == "decoder.conv_out":
        return Kernel(*(_last_frame(part) for part in pair))
    return pair


def _still_bands(weight: torch.Tensor) -> torch.Tensor:
    """[out, 192, ...] -> [out, 48, ...]: of each level the four bands that are low in time; the others are zero."""
    return weight.unflatten(1, (2, 4, 2, 4, 3))[:, 0, :, 0].flatten(1, 3)


def _last_frame(bands: torch.Tensor) -> torch.Tensor:
    """[192, ...] -> [48, ...]: the last of four frames is low minus high at each level."""
    levels = bands.unflatten(0, (2, 4, 2, 4, 3))
    outer = levels[0] - levels[1]
    return (outer[:, 0] - outer[:, 1]).flatten(0, 2)
