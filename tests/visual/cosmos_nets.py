"""Small Cosmos tokenizers with random weights, and their mathematics written once more: frame by frame, as lists."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vkernels
from vtrain.visual.cosmos import LEVELS, CosmosConfig, CosmosVideo
from vtrain.visual.cosmos_fold import network

DV = CosmosConfig("DV8x16x16", channels=8, channel_multiplier=(2, 3, 3), num_res_blocks=1, latent_channels=5)
DI = CosmosConfig("DI16x16", channels=32, channel_multiplier=(2, 1, 1), num_res_blocks=1, latent_channels=7)


def random_tensors(config, seed=0, dtype=torch.float64):
    """Weights with published names. Biases are small and the last weights large, so that many codes occur."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = CosmosVideo(config).state_dict() if config.video else network(config).weights()
    tensors = {}
    for name, meta in shapes.items():
        scale = meta[0].numel() ** -0.5 if meta.ndim > 1 else 0.1
        scale *= 3 if name.startswith("quant_conv") else 1
        tensors[name] = torch.randn(meta.shape, generator=generator, dtype=torch.float64) * scale
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def pictures(*shape, seed=1, dtype=torch.float64):
    """Smooth random images or videos in [-1, 1]: [B,3,...]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7).tanh().to(dtype)


def clear_of_edges(latents):
    """Where rounding errors of 1e-5, ten times those of float32, do not change the code: latents [B,6,h,w] -> bool."""
    rows = latents.float().permute(0, 2, 3, 1)
    below, above = (vkernels.fsq_quantize((rows + d).contiguous(), LEVELS)[1] for d in (-1e-5, 1e-5))
    return below == above


class Reference:
    """Encoder and decoder of DV8x16x16 on lists of frames [B,C,H,W], and of DI16x16, which has one frame."""

    def __init__(self, config, tensors):
        self.config, self.tensors, self.video = config, tensors, config.video

    def latents(self, frames):
        """Frames of pixels -> [B,6,h,w] each, before the quantizer."""
        x = [frames[0]] * 3 + frames if self.video else frames
        for _ in range(2):
            x = self.wavelets(x)
        x = self.pair("encoder.conv_in", x)
        for level in range(3):
            x = self.blocks(f"encoder.down.{level}", x)
            if level < 2:
                x = self.down(f"encoder.down.{level}.downsample", x, over_time=level == 0)
        x = self.swish(self.norm("encoder.norm_out", self.middle("encoder.mid", x)))
        return self.conv("quant_conv", self.pair("encoder.conv_out", x))

    def pixels(self, codes):
        """Codes [B,6,h,w] in [-1,1] of each frame -> frames of pixels."""
        x = self.middle("decoder.mid", self.pair("decoder.conv_in", self.conv("post_quant_conv", codes)))
        for level in (2, 1, 0):
            x = self.blocks(f"decoder.up.{level}", x)
            if level > 0:
                x = self.up(f"decoder.up.{level}.upsample", x, over_time=level == 1)
        x = self.pair("decoder.conv_out", self.swish(self.norm("decoder.norm_out", x)))
        for _ in range(2):
            x = self.inverse_wavelets(x)
        return x[3:] if self.video else x

    def wavelets(self, x):
        """Four spatial bands of each frame; then, of a video, mean and half difference of each two frames."""
        out = []
        for frame in x:
            a, b, c, d = frame[..., 0::2, 0::2], frame[..., 0::2, 1::2], frame[..., 1::2, 0::2], frame[..., 1::2, 1::2]
            low, wide, high, both = a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d
            out.append([band / 4 for band in ((low, wide, high, both) if self.video else (low, high, wide, both))])
        if not self.video:
            return [torch.cat(bands, 1) for bands in out]
        return [
            torch.cat([(p + q) / 2 for p, q in zip(one, two)] + [(p - q) / 2 for p, q in zip(one, two)], 1)
            for one, two in zip(out[0::2], out[1::2])
        ]

    def inverse_wavelets(self, x):
        frames = []
        for frame in x:
            if self.video:
                low, high = frame.chunk(2, 1)
                frames += [low + high, low - high]
            else:
                frames.append(frame)
        out = []
        for frame in frames:
            low, second, third, both = frame.chunk(4, 1)
            wide, high = (second, third) if self.video else (third, second)
            big = low.new_empty(*low.shape[:2], 2 * low.shape[2], 2 * low.shape[3])
            big[..., 0::2, 0::2] = low + wide + high + both
            big[..., 0::2, 1::2] = low - wide + high - both
            big[..., 1::2, 0::2] = low + wide - high - both
            big[..., 1::2, 1::2] = low - wide - high + both
            out.append(big)
        return out

    def weights(self, name):
        name = f"{name}.conv3d" if self.video else name
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def conv(self, name, x, padding=0, stride=1):
        """Within each frame."""
        weight, bias = self.weights(name)
        weight = weight[:, :, 0] if self.video else weight
        return [F.conv2d(frame, weight, bias, stride, padding) for frame in x]

    def over_time(self, name, x, before, stride=1):
        """Three taps; `before` copies of the first frame are put before it."""
        weight, bias = self.weights(name)
        x = [x[0]] * before + x
        return [
            sum(F.conv2d(x[i + tap], weight[:, :, tap]) for tap in range(3)) + bias[:, None, None]
            for i in range(0, len(x) - 2, stride)
        ]

    def pair(self, name, x):
        if not self.video:
            return self.conv(name, x, padding=1)
        return self.over_time(f"{name}.1", self.conv(f"{name}.0", x, padding=1), before=2)

    def norm(self, name, x):
        name, groups = (f"{name}.norm", 1) if self.video else (name, 32)
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return [F.group_norm(frame, groups, weight, bias, eps=1e-6) for frame in x]

    def swish(self, x):
        return [frame * frame.sigmoid() for frame in x]

    def blocks(self, name, x):
        for number in range(self.config.num_res_blocks + name.startswith("decoder")):
            x = self.block(f"{name}.block.{number}", x)
        return x

    def block(self, name, x):
        h = self.pair(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        h = self.pair(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", h)))
        if any(key.startswith(f"{name}.nin_shortcut") for key in self.tensors):
            x = self.conv(f"{name}.nin_shortcut", x)
        return [a + b for a, b in zip(x, h, strict=True)]

    def middle(self, name, x):
        x = self.block(f"{name}.block_1", x)
        for attention in (f"{name}.attn_1.0", f"{name}.attn_1.1") if self.video else (f"{name}.attn_1",):
            normed = self.norm(f"{attention}.norm", x)
            q, k, v = (self.conv(f"{attention}.{part}", normed) for part in "qkv")
            mixed = self.attend_over_time(q, k, v) if attention.endswith(".1") else self.attend(q, k, v)
            x = [a + b for a, b in zip(x, self.conv(f"{attention}.proj_out", mixed), strict=True)]
        return self.block(f"{name}.block_2", x)

    def attend(self, q, k, v):
        out = []
        for frame_q, frame_k, frame_v in zip(q, k, v):
            scores = torch.einsum("bcp,bcs->bps", frame_q.flatten(2), frame_k.flatten(2)) * frame_q.shape[1] ** -0.5
            out.append(torch.einsum("bps,bcs->bcp", scores.softmax(-1), frame_v.flatten(2)).reshape(frame_v.shape))
        return out

    def attend_over_time(self, q, k, v):
        out = []
        for now, frame_q in enumerate(q):
            scores = torch.stack([(frame_q * k[t]).sum(1) * frame_q.shape[1] ** -0.5 for t in range(now + 1)])
            out.append(sum(share[:, None] * v[t] for t, share in enumerate(scores.softmax(0))))
        return out

    def down(self, name, x, over_time):
        x = [F.pad(frame, (0, 1, 0, 1)) for frame in x]
        if not self.video:
            return self.conv(f"{name}.conv", x, stride=2)
        x = [a + F.avg_pool2d(b, 2) for a, b in zip(self.conv(f"{name}.conv1", x, stride=2), x, strict=True)]
        if over_time:
            x = [x[0], *x]
            means = [(a + b) / 2 for a, b in zip(x[0::2], x[1::2], strict=True)]
            x = [a + b for a, b in zip(self.over_time(f"{name}.conv2", x, before=1, stride=2), means, strict=True)]
        return self.conv(f"{name}.conv3", x)

    def up(self, name, x, over_time):
        if over_time and self.video:
            x = [frame for number, frame in enumerate(x) for _ in range(2 if number else 1)]
            x = [a + b for a, b in zip(self.over_time(f"{name}.conv1", x, before=2), x, strict=True)]
        x = [F.interpolate(frame, scale_factor=2, mode="nearest") for frame in x]
        if not self.video:
            return self.conv(f"{name}.conv", x, padding=1)
        x = [a + b for a, b in zip(self.conv(f"{name}.conv2", x, padding=1), x, strict=True)]
        return self.conv(f"{name}.conv3", x)
