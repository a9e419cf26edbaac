import math
import re

import pytest
import torch
import torch.nn.functional as F

from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig

TINY = {
    "resolution": 16,
    "base_channels": 8,
    "channel_multiplier": (1, 1, 2),
    "num_res_blocks": 2,
    "latent_channels": 6,
    "embed_dim": 5,
    "num_embeddings": 11,
}


def tiny(**changes):
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    if model.config.quantizer == "vq":
        model.quantize.embedding.weight.normal_()
    return model


def numel(tensors):
    return sum(tensor.numel() for tensor in tensors.values())


def test_the_published_size_has_the_published_parameters():
    with torch.device("meta"):
        model = Autoencoder(AutoencoderConfig())
    assert numel(model.encoder.state_dict()) == 27_194_880
    assert numel(model.decoder.state_dict()) == 39_294_851
    assert numel(model.quant_conv.state_dict()) == numel(model.post_quant_conv.state_dict()) == 65_792
    weights = model.weights()
    assert weights["quantize.embedding.weight"].shape == (8192, 256)
    assert numel(weights) == 68_718_467


def test_weight_names_are_those_of_the_family():
    with torch.device("meta"):
        names = {name.rpartition(".")[0] for name in Autoencoder(AutoencoderConfig()).weights()}
    block = ("norm1", "conv1", "norm2", "conv2")
    middle = [f"mid.block_{i}.{part}" for i in (1, 2) for part in block]
    middle += [f"mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")]
    encoder = ["conv_in", "norm_out", "conv_out", *middle]
    encoder += [f"down.{level}.block.{b}.{part}" for level in range(5) for b in range(2) for part in block]
    encoder += [f"down.{level}.downsample.conv" for level in range(4)]
    encoder += ["down.2.block.0.nin_shortcut", "down.4.block.0.nin_shortcut"]
    decoder = ["conv_in", "norm_out", "conv_out", *middle]
    decoder += [f"up.{level}.block.{b}.{part}" for level in range(5) for b in range(3) for part in block]
    decoder += [f"up.{level}.upsample.conv" for level in range(1, 5)]
    decoder += ["up.3.block.0.nin_shortcut", "up.1.block.0.nin_shortcut"]
    expected = {f"encoder.{name}" for name in encoder} | {f"decoder.{name}" for name in decoder}
    assert names == expected | {"quant_conv", "post_quant_conv", "quantize.embedding"}


class Transcription:
    """The network written out from its description, on a dict of float64 weights."""

    def __init__(self, model):
        self.w = {name: tensor.double() for name, tensor in model.weights().items()}
        self.config = model.config

    def conv(self, name, x, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **options)

    def norm(self, name, x):
        B, C, H, W = x.shape
        grouped = x.reshape(B, 2, -1)  # 8 base channels: 2 groups
        mean = grouped.mean(2, keepdim=True)
        variance = ((grouped - mean) ** 2).mean(2, keepdim=True)
        normed = ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(B, C, H, W)
        return normed * self.w[f"{name}.weight"].reshape(-1, 1, 1) + self.w[f"{name}.bias"].reshape(-1, 1, 1)

    def swish(self, x):
        return x / (1 + (-x).exp())

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", h)), padding=1)
        if f"{name}.nin_shortcut.weight" in self.w:
            x = self.conv(f"{name}.nin_shortcut", x)
        return x + h

    def attention(self, name, x):
        B, C, h, w = x.shape
        n = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", n).reshape(B, C, h * w) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(C)
        mixed = torch.einsum("bij,bcj->bci", scores.exp() / scores.exp().sum(2, keepdim=True), v)
        return x + self.conv(f"{name}.proj_out", mixed.reshape(B, C, h, w))

    def middle(self, side, x):
        x = self.block(f"{side}.mid.block_1", x)
        if self.config.attention:
            x = self.attention(f"{side}.mid.attn_1", x)
        return self.block(f"{side}.mid.block_2", x)

    def latents(self, images):
        x = self.conv("encoder.conv_in", images, padding=1)
        for level in range(3):
            for b in range(2):
                x = self.block(f"encoder.down.{level}.block.{b}", x)
            if level < 2:
                x = F.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.down.{level}.downsample.conv", x, stride=2)
        x = self.swish(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))

    def pixels(self, codes):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", codes), padding=1)
        x = self.middle("decoder", x)
        for level in (2, 1, 0):
            for b in range(3):
                x = self.block(f"decoder.up.{level}.block.{b}", x)
            if level > 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out", self.swish(self.norm("decoder.norm_out", x)), padding=1)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_the_networks_equal_a_transcription(attention, size):
    model = tiny(attention=attention)
    slow = Transcription(model)
    images = torch.rand(3, 3, *size, dtype=torch.float64) * 2 - 1
    latents = slow.latents(images)
    torch.testing.assert_close(model.quant_conv(model.encoder(images.float())).double(), latents, rtol=1e-4, atol=1e-4)

    ids = model.encode(images.float())
    assert ids.shape == (3, size[0] // 4, size[1] // 4)
    codebook = slow.w["quantize.embedding.weight"]
    distances = (latents.permute(0, 2, 3, 1)[..., None, :] - codebook).square().sum(-1)
    torch.testing.assert_close(ids.long(), distances.argmin(-1))

    expected = slow.pixels(codebook[ids.long()].permute(0, 3, 1, 2))
    torch.testing.assert_close(model.decode(ids).double(), expected, rtol=1e-4, atol=1e-4)
    reconstruction, forward_ids, _ = model(images.float())
    torch.testing.assert_close(forward_ids, ids)
    torch.testing.assert_close(reconstruction.double(), expected, rtol=1e-4, atol=1e-4)


def test_fsq_shares_the_networks():
    model = tiny(quantizer="fsq", fsq_levels=(5, 4, 3))
    assert "quantize.embedding.weight" not in model.weights()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    reconstruction, ids, commitment = model(images)
    assert int(ids.max()) < 60
    assert commitment.tolist() == [0.0, 0.0]
    torch.testing.assert_close(model.encode(images), ids)
    torch.testing.assert_close(model.decode(ids), reconstruction)
    reconstruction.square().mean().backward()
    assert model.encoder.conv_in.weight.grad.abs().max() > 0


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_bfloat16_weights_with_a_float32_codebook(quantizer):
    """As under mixed precision: parameters are cast, buffers and images are not."""
    model = tiny(quantizer=quantizer)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    reconstruction, ids, commitment = model(images, torch.tensor([1, 2]))
    assert reconstruction.dtype == torch.bfloat16
    assert commitment.dtype == torch.float32
    (reconstruction.float().square().mean() + commitment.mean()).backward()
    assert model.encoder.conv_in.weight.grad.isfinite().all()
    assert model.decode(ids).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 18}, "resolution 18 is not a multiple of 4"),
        ({"quantizer": "lfq"}, "quantizer is 'lfq'; expected 'vq' or 'fsq'"),
        ({"norm_groups": 3}, "3 norm_groups do not divide a level of 8 channels"),
        ({"num_embeddings": 0}, "num_embeddings is 0; expected at least 1"),
        ({"channel_multiplier": ()}, "channel_multiplier is (); expected at least 1"),
        ({"quantizer": "fsq", "fsq_levels": (8, 1)}, "fsq_levels is (8, 1); expected at least 2"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_impossible_configurations_name_the_key(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoencoderConfig(**{**TINY, **changes})
