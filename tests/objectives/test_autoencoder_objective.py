import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vtrain.objectives.autoencoder import AutoencoderObjective
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig

TINY = {
    "resolution": 8,
    "base_channels": 8,
    "channel_multiplier": (1, 2),
    "num_res_blocks": 1,
    "latent_channels": 8,
    "attention": False,
    "embed_dim": 4,
    "num_embeddings": 16,
    "ema_decay": 0.9,
}


def made(**changes):
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(**{**TINY, **changes}))


def smooth_pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 2, 2, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(8, 8), mode="bilinear").repeat(1, 3, 1, 1)


def weighted(terms, images):
    return sum(total * weight / images for total, weight in terms.values())


def test_terms_are_sums_of_image_means():
    model = made()
    images, keys = smooth_pictures(5), torch.arange(5)
    model(images, keys)
    model.end_step(0)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    terms, stats = AutoencoderObjective(l1=0.5, l2=2.0, commitment=0.3)(model, images, keys, weights)
    reconstruction, _, commitment = (part.detach().double().numpy() for part in model.eval()(images))
    real = [0, 1, 3, 4]
    error = reconstruction[real] - images.numpy()[real]
    l1, l2 = abs(error).mean((1, 2, 3)).sum(), (error**2).mean((1, 2, 3)).sum()
    assert terms.keys() == {"reconstruction", "commitment"}
    assert float(terms["reconstruction"][0].detach()) == pytest.approx(0.5 * l1 + 2 * l2, rel=1e-5)
    assert float(terms["commitment"][0].detach()) == pytest.approx(commitment[real].sum(), rel=1e-5)
    assert (terms["reconstruction"][1], terms["commitment"][1]) == (1.0, 0.3)
    assert {name: float(v) for name, v in stats.items()} == pytest.approx({"mse": l2, "l1": l1}, rel=1e-5)
    assert not any(value.requires_grad for value in stats.values())


def train_step(model, step, parts):
    """One step over 8 images and the gradient it leaves. `parts`: the images of each micro-batch, -1 = padding."""
    objective = AutoencoderObjective()
    images, keys = smooth_pictures(8, seed=step), torch.arange(8) + 8 * step
    model.zero_grad()
    for part in parts:
        index = torch.tensor(part)
        real = index >= 0
        batch = torch.where(real[:, None, None, None], images[index], 37.0)
        terms, _ = objective(model, batch, torch.where(real, keys[index], 0), real.float())
        weighted(terms, images=8).backward()
    usage = model.end_step(step)
    return {name: p.grad.clone() for name, p in model.named_parameters()}, usage


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 1, 2], [3, 4, 5], [6, 7, -1]],
        [[-1, -1, 7, 6, 5, 4, 3, 2], [1, 0], [-1, -1]],
    ],
)
def test_micro_batches_and_padding_change_nothing(parts):
    whole, split = made(), made()
    for step in range(3):
        expected, expected_usage = train_step(whole, step, [list(range(8))])
        found, usage = train_step(split, step, parts)
        assert {n: float(v) for n, v in usage.items()} == pytest.approx(
            {n: float(v) for n, v in expected_usage.items()}
        )
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_some_steps_lower_the_error(quantizer):
    model = made(base_channels=16, quantizer=quantizer, fsq_levels=(4, 3, 3))
    objective = AutoencoderObjective()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    images, keys = smooth_pictures(32), torch.arange(32)
    errors = []
    for step in range(45):
        terms, stats = objective(model, images, keys)
        optimizer.zero_grad()
        weighted(terms, images=32).backward()
        optimizer.step()
        usage = model.end_step(step)
        errors.append(float(stats["mse"]) / 32)
    assert sum(errors[-5:]) < 0.25 * sum(errors[:5])
    assert int(usage["codes_used"]) >= 12


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_a_step_reads_nothing_back_to_the_host(quantizer):
    """Fake tensors hold no values: a shape that depends on data, or a copy to the host, raises."""
    with FakeTensorMode():
        model = made(quantizer=quantizer, attention=True)
        images, keys, weights = torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), torch.ones(4)
        terms, _ = AutoencoderObjective()(model, images, keys, weights)
        weighted(terms, images=4).backward()
        usage = model.end_step(0)
    assert model.encoder.conv_in.weight.grad.shape == model.encoder.conv_in.weight.shape
    assert set(usage) == {"codes_used", "perplexity", "codes_reset"}


def test_impossible_weights_are_refused():
    for bad in ({"l1": -1.0}, {"l2": 0.0}, {"commitment": -0.1}):
        with pytest.raises(ValueError, match="autoencoder loss: l1"):
            AutoencoderObjective(**bad)
