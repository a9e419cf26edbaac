import pytest
import torch
from cosmos_nets import DI, DV, Reference, pictures, random_tensors

import vkernels
from vtrain.visual.cosmos import LEVELS, CosmosConfig, CosmosVideo, haar, inverse_haar
from vtrain.visual.cosmos_fold import CosmosImages, network


def video_model(seed=0):
    model = CosmosVideo(DV).double().requires_grad_(False)
    model.load_state_dict(random_tensors(DV, seed))
    return model.eval()


def counted(tensors):
    """(millions of parameters, tensors) of encoder and decoder, each with its side of the quantizer."""
    encoder = [t.numel() for n, t in tensors.items() if n.startswith(("encoder.", "quant_conv."))]
    decoder = [t.numel() for n, t in tensors.items() if n.startswith(("decoder.", "post_quant_conv."))]
    assert len(encoder) + len(decoder) == len(tensors)
    return [(round(sum(part) / 1e6, 2), len(part)) for part in (encoder, decoder)]


def test_the_published_sizes():
    with torch.device("meta"):
        video = CosmosVideo(CosmosConfig("DV8x16x16")).state_dict()
    assert counted(video) == [(46.32, 144), (66.15, 178)]
    images = counted(network(CosmosConfig("DI16x16")).weights())
    assert [round(millions, 1) for millions, _ in images] == [34.6, 49.1]


def test_names_are_the_published_ones():
    with torch.device("meta"):
        video = CosmosVideo(CosmosConfig("DV8x16x16")).state_dict()
    for name, shape in {
        "encoder.conv_in.0.conv3d.weight": (128, 192, 1, 3, 3),
        "encoder.conv_in.1.conv3d.weight": (128, 128, 3, 1, 1),
        "encoder.down.0.block.0.nin_shortcut.conv3d.weight": (256, 128, 1, 1, 1),
        "encoder.down.1.downsample.conv2.conv3d.weight": (512, 512, 3, 1, 1),
        "encoder.mid.attn_1.1.norm.norm.weight": (512,),
        "encoder.conv_out.0.conv3d.weight": (16, 512, 1, 3, 3),
        "quant_conv.conv3d.weight": (6, 16, 1, 1, 1),
        "decoder.up.2.block.2.conv2.1.conv3d.weight": (512, 512, 3, 1, 1),
        "decoder.up.2.upsample.conv1.conv3d.weight": (512, 512, 3, 1, 1),
        "decoder.conv_out.1.conv3d.weight": (192, 192, 3, 1, 1),
    }.items():
        assert video[name].shape == shape, name
    images = network(CosmosConfig("DI16x16")).weights()
    assert images["encoder.conv_in.weight"].shape == (128, 48, 3, 3)
    assert images["encoder.down.0.block.0.norm1.weight"].shape == (128,)
    assert images["quant_conv.weight"].shape == (6, 256, 1, 1)


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_video_network_equals_the_reference(frames):
    model, video = video_model(), pictures(2, 3, frames, 32, 48)
    reference = Reference(DV, model.state_dict())
    latents = model.latents(video)
    assert latents.shape == (2, 6, 1 + frames // 8, 2, 3)
    torch.testing.assert_close(latents, torch.stack(reference.latents(list(video.unbind(2))), 2), rtol=0, atol=1e-11)
    codes, ids = vkernels.fsq_quantize(latents.float().movedim(1, -1).contiguous(), LEVELS)
    assert torch.equal(model.encode_video(video), ids)
    decoded = model.decode_video(ids)
    assert decoded.shape == video.shape
    frames_of_codes = list(codes.double().movedim(-1, 1).unbind(2))
    torch.testing.assert_close(decoded, torch.stack(reference.pixels(frames_of_codes), 2), rtol=0, atol=1e-10)


def test_image_network_equals_the_reference():
    tensors, images = random_tensors(DI), pictures(2, 3, 32, 48)
    model, reference = CosmosImages(DI, tensors).eval().requires_grad_(False), Reference(DI, tensors)
    latents = model.latents(images)
    torch.testing.assert_close(latents, reference.latents([images])[0], rtol=0, atol=1e-11)
    codes, ids = vkernels.fsq_quantize(latents.float().permute(0, 2, 3, 1).contiguous(), LEVELS)
    assert torch.equal(model.encode(images), ids)
    expected = reference.pixels([codes.double().permute(0, 3, 1, 2)])[0]
    torch.testing.assert_close(model.decode(ids), expected, rtol=0, atol=1e-10)


def test_no_frame_sees_a_later_one():
    model, video = video_model(), pictures(1, 3, 17, 32, 32)
    ids = model.encode_video(video)
    assert ids.unique().numel() > 5
    assert torch.equal(model.encode_video(video[:, :, :9]), ids[:, :2])
    assert torch.equal(model.encode(video[:, :, 0]), ids[:, 0])
    changed = video.clone()
    changed[:, :, 9:] = -changed[:, :, 9:]
    again = model.encode_video(changed)
    assert torch.equal(again[:, :2], ids[:, :2])
    assert not torch.equal(again[:, 2], ids[:, 2])
    decoded = model.decode_video(ids)
    torch.testing.assert_close(model.decode_video(ids[:, :2]), decoded[:, :, :9], rtol=0, atol=1e-11)


@pytest.mark.parametrize("frames", [2, 8, 16])
def test_other_numbers_of_frames_are_refused(frames):
    with pytest.raises(ValueError, match=rf"a video of {frames} frames; expected 1, 9, 17"):
        video_model().encode_video(pictures(1, 3, frames, 16, 16))


@pytest.mark.parametrize("axes", [(-1,), (-2, -1), (-1, -2), (-3, -2, -1)])
def test_wavelets_come_back(axes):
    x = pictures(2, 3, 4, 6, 8)
    bands = haar(x, axes)
    assert bands.shape[1] == 3 * 2 ** len(axes)
    torch.testing.assert_close(inverse_haar(bands, axes), x, rtol=0, atol=1e-14)
    # The first band is the mean of each block.
    mean = x
    for axis in axes:
        mean = mean.unflatten(axis, (-1, 2)).mean(axis)
    torch.testing.assert_close(bands[:, :3], mean, rtol=0, atol=1e-14)


def test_the_order_of_bands():
    """By axes: of (rows, columns) the second band is high along columns."""
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)  # changes along columns only
    assert haar(ramp, (-2, -1))[0, :, 0, 0].tolist() == [0.5, -0.5, 0, 0]
    assert haar(ramp, (-1, -2))[0, :, 0, 0].tolist() == [0.5, 0, -0.5, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "DV4x8x8"}, "variant is 'DV4x8x8'; expected one of DV8x16x16, DI16x16"),
        ({"variant": "DI16x16", "resolution": 24}, "resolution is 24; expected a multiple of 16"),
        ({"variant": "DI16x16", "channel_multiplier": (2, 4)}, r"channel_multiplier is \(2, 4\); expected 3 levels"),
    ],
)
def test_shapes_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CosmosConfig(**values)
