import pytest
import torch
from cosmos_nets import DV, clear_of_edges, pictures, random_tensors
from torch import nn

from vtrain.visual.cosmos import CosmosConfig, CosmosVideo
from vtrain.visual.cosmos_fold import CosmosImages, fold


def both(config, seed=0):
    """The video network and what it is folded into, in float64."""
    tensors = random_tensors(config, seed)
    with torch.device("meta"):
        video = CosmosVideo(config)
    video.load_state_dict(tensors, assign=True)
    images = CosmosImages(config, fold(tensors, config))
    return video.eval().requires_grad_(False), images.eval().requires_grad_(False)


def agree(config, images, seed=0):
    """All codes equal, and pixels up to 1e-5 of their scale (float64 leaves 1e-13)."""
    video, folded = both(config, seed)
    ids = video.encode(images)
    assert ids.unique().numel() > ids.numel() / 2, "codes that are alike show nothing"
    assert torch.equal(folded.encode(images), ids)
    latents = video.latents(images[:, :, None])[:, :, 0]
    assert (folded.latents(images) - latents).abs().max() < 1e-10 * latents.abs().max()
    decoded = video.decode(ids)
    assert (folded.decode(ids) - decoded).abs().max() < 1e-5 * decoded.abs().max()
    return folded


@pytest.mark.parametrize("size", [(16, 16), (64, 96), (48, 32)])
def test_folded_equals_the_video_network(size):
    agree(DV, pictures(2, 3, *size), seed=sum(size))


@pytest.mark.slow
def test_folded_equals_the_video_network_at_its_real_widths():
    folded = agree(CosmosConfig("DV8x16x16"), pictures(1, 3, 64, 96))
    encoder, decoder = (
        sum(isinstance(m, nn.Conv2d) for m in half.modules()) + 1  # and the quantizer's side
        for half in (folded.net.encoder, folded.net.decoder)
    )
    assert (encoder, decoder) == (28, 34)


def test_every_weight_that_is_used_matters():
    """The folded network depends on all tensors but those of time that one frame does not use."""
    tensors = {name: tensor.requires_grad_() for name, tensor in random_tensors(DV).items()}
    sum((t * torch.randn_like(t)).sum() for t in fold(tensors, DV).values()).backward()
    idle = [name for name, tensor in tensors.items() if tensor.grad is None or not tensor.grad.any()]
    single_frame = [f"{half}.mid.attn_1.1.{part}" for half in ("encoder", "decoder") for part in "qk"]
    unused = ["encoder.down.1.downsample.conv2", "decoder.up.2.upsample.conv1", *single_frame]
    assert sorted(idle) == sorted(f"{name}.conv3d.{part}" for name in unused for part in ("weight", "bias"))


def test_many_at_once_equal_one_by_one():
    """float32 sums in another order err by 1e-6 of the latents; ids may differ only where rounding is that close."""
    tensors = {name: tensor.float() for name, tensor in fold(random_tensors(DV), DV).items()}
    model = CosmosImages(DV, tensors).eval().requires_grad_(False)
    images = pictures(5, 3, 48, 64, dtype=torch.float32)
    single = torch.cat([model.latents(image[None]) for image in images])
    torch.testing.assert_close(model.latents(images), single, rtol=0, atol=1e-5 * single.abs().max())
    ids, alone = model.encode(images), torch.cat([model.encode(image[None]) for image in images])
    sure = clear_of_edges(single)
    assert sure.float().mean() > 0.99
    assert torch.equal(ids[sure], alone[sure])
    decoded = torch.cat([model.decode(one[None]) for one in alone])
    torch.testing.assert_close(model.decode(alone), decoded, rtol=0, atol=1e-5 * decoded.abs().max())


def test_bfloat16_differs_by_its_own_rounding():
    """The same latents up to bf16's 8 bits through some 30 layers, beside float32 computing."""
    folded = fold(random_tensors(DV), DV)
    narrow, wide = (
        CosmosImages(DV, {n: t.to(dtype) for n, t in folded.items()}).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    images = pictures(2, 3, 48, 64, dtype=torch.float32)
    with torch.no_grad():
        a, b = narrow.latents(images.bfloat16()).float(), wide.latents(images)
    assert 0 < (a - b).norm() / b.norm() < 0.05
