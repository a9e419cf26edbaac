"""Folders with Cosmos tokenizers: as NVIDIA publishes them, and as we save them."""

import itertools
import json
import shutil
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from cosmos_nets import DI, DV, clear_of_edges, pictures, random_tensors
from torch import nn

import vkernels
from vtrain.visual import load_image_tokenizer
from vtrain.visual.cosmos import LEVELS, CosmosVideo
from vtrain.visual.cosmos_fold import CosmosImages
from vtrain.visual.tokenizer import ImageTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


class Quantizer(nn.Module):
    """What the published files hold at this place: constants beside the weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("_levels", torch.tensor(LEVELS, dtype=torch.int32))
        self.register_buffer("_basis", torch.ones(6, dtype=torch.int32))
        self.register_buffer("implicit_codebook", torch.zeros(3, 6))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + 0 * self.implicit_codebook.sum()


class InverseQuantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.quantizer = Quantizer()

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.quantizer(codes)


class Patcher(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("wavelets", torch.full((2,), 0.5**0.5))
        self.register_buffer("_arange", torch.arange(2))
        self.register_buffer("patch_size_buffer", torch.tensor([4], dtype=torch.int32))


def tensors_of(config, dtype=torch.float32):
    return random_tensors(config, dtype=dtype)


def video_network(tensors):
    with torch.device("meta"):
        model = CosmosVideo(DV)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def publish(folder, dtype):
    """encoder.jit and decoder.jit of a small DV with random weights, made as NVIDIA's are."""
    model = video_network(tensors_of(DV, dtype))
    model.encoder.patcher3d, model.decoder.unpatcher3d = Patcher(), Patcher()
    encoder = nn.Sequential(OrderedDict(encoder=model.encoder, quant_conv=model.quant_conv, quantizer=Quantizer()))
    decoder = nn.Sequential(
        OrderedDict(inv_quant=InverseQuantizer(), post_quant_conv=model.post_quant_conv, decoder=model.decoder)
    )
    inputs = torch.zeros(1, 3, 1, 32, 32, dtype=dtype), torch.zeros(1, 6, 1, 2, 2, dtype=dtype)
    for name, module, example in zip(("encoder", "decoder"), (encoder, decoder), inputs):
        torch.jit.trace(module, example, check_trace=False).save(str(folder / f"{name}.jit"))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def published(request, tmp_path_factory):
    """(folder, dtype of its weights)"""
    folder = tmp_path_factory.mktemp("nvidia")
    publish(folder, request.param)
    return folder, request.param


def test_published_files(published):
    folder, dtype = published
    unfolded, folded = load_image_tokenizer(folder, fold=False), load_image_tokenizer(folder)
    for tokenizer in (unfolded, folded):
        assert (tokenizer.resolution, tokenizer.downscale, tokenizer.num_codes) == (1024, 16, 64000)
    assert isinstance(unfolded.model, CosmosVideo)
    assert isinstance(folded.model, CosmosImages)
    images = pictures(2, 3, 32, 48, dtype=torch.float32)
    model = video_network({name: tensor.float() for name, tensor in tensors_of(DV, dtype).items()})
    ids = unfolded.encode(images)
    assert ids.shape == (2, 2, 3)
    assert torch.equal(ids, model.encode(images).long())
    sure = clear_of_edges(model.latents(images[:, :, None])[:, :, 0])
    assert sure.sum() >= 11, "of 12"
    assert torch.equal(folded.encode(images)[sure], ids[sure])
    decoded = unfolded.decode(ids)
    raw = model.decode(ids)
    assert torch.equal(decoded, raw.clamp(-1, 1))
    torch.testing.assert_close(folded.decode(ids), decoded, rtol=0, atol=1e-5 * raw.abs().max().item())
    assert folded.sha256 == unfolded.sha256


def test_the_published_program_gives_the_same(published):
    """The traced files, run by torch.jit in float32, beside the eager network that reads them."""
    folder, _ = published
    tokenizer = load_image_tokenizer(folder, fold=False)
    images = pictures(2, 3, 32, 32, dtype=torch.float32)
    encoder, decoder = (torch.jit.load(str(folder / f"{half}.jit")).float() for half in ("encoder", "decoder"))
    with torch.no_grad():
        codes, ids = vkernels.fsq_quantize(encoder(images[:, :, None]).movedim(1, -1).contiguous(), LEVELS)
        restored = decoder(codes.movedim(-1, 1))[:, :, 0]
    assert torch.equal(tokenizer.encode(images), ids[:, 0].long())
    torch.testing.assert_close(tokenizer.decode(ids[:, 0]), restored.clamp(-1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [DV, DI], ids=lambda c: c.variant)
def test_halves_as_safetensors(tmp_path, config):
    tensors = tensors_of(config)
    encoder = {n: t for n, t in tensors.items() if n.startswith(("encoder.", "quant_conv."))}
    safetensors.torch.save_file(encoder, tmp_path / "encoder.safetensors")
    rest = {n: t for n, t in tensors.items() if n not in encoder}
    safetensors.torch.save_file(rest, tmp_path / "decoder.safetensors")
    tokenizer = load_image_tokenizer(tmp_path)
    found = tokenizer.model.config
    assert (found.variant, found.widths, found.num_res_blocks) == (config.variant, config.widths, 1)
    images = pictures(1, 3, 32, 32, dtype=torch.float32)
    ids = tokenizer.encode(images)
    assert tokenizer.decode(ids).shape == images.shape
    tokenizer.save(tmp_path / "ours")
    again = load_image_tokenizer(tmp_path / "ours")
    assert again.sha256 == tokenizer.sha256
    assert torch.equal(again.encode(images), ids)
    safetensors.torch.save_file({**encoder, "decoder.stray": torch.ones(1)}, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.safetensors: unexpected decoder\.stray; expected the tensors of"):
        load_image_tokenizer(tmp_path)


@pytest.mark.parametrize("fold", [True, False])
def test_a_saved_tokenizer_is_the_same(published, tmp_path, fold):
    folder, dtype = published
    tokenizer = load_image_tokenizer(folder, fold=fold)
    tokenizer.save(tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config == {"type": "cosmos", "variant": "DV8x16x16", "resolution": 1024}
    stored = safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors")
    expected = tensors_of(DV, dtype)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    loaded = load_image_tokenizer(tmp_path / "ours", fold=fold)
    assert loaded.sha256 == tokenizer.sha256
    images = pictures(2, 3, 32, 48, dtype=torch.float32)
    ids = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), ids)
    assert torch.equal(loaded.decode(ids), tokenizer.decode(ids))


def saved(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    values = {"type": "cosmos", "variant": "DV8x16x16", "resolution": 256, **changes}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_stated_resolution(tmp_path):
    tokenizer = load_image_tokenizer(saved(tmp_path, tensors_of(DV)))
    assert tokenizer.resolution == 256
    other = load_image_tokenizer(saved(tmp_path, tensors_of(DV), resolution=512))
    assert other.sha256 != tokenizer.sha256


def test_bfloat16_computes_in_bfloat16_and_saves_what_was_read(tmp_path):
    wide = load_image_tokenizer(saved(tmp_path / "a", tensors_of(DV)))
    narrow = load_image_tokenizer(tmp_path / "a", dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.model.parameters()} == {torch.bfloat16}
    assert narrow.sha256 == wide.sha256
    narrow.save(tmp_path / "b")
    assert load_image_tokenizer(tmp_path / "b").sha256 == wide.sha256
    images = pictures(2, 3, 64, 64, dtype=torch.float32)
    ids = narrow.encode(images)
    assert ids.dtype == torch.int64
    assert narrow.decode(ids).dtype == torch.float32
    digits = [vkernels.fsq_dequantize(found, LEVELS) for found in (ids, wide.encode(images))]
    # A step is 0.25 or 0.5; rounding to 8 bits moves few digits, and those by one step.
    assert (digits[0] - digits[1]).abs().mean() < 0.05
    assert (digits[0] - digits[1]).abs().max() <= 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "DI16x16"}, r"model\.safetensors: tensors of DV8x16x16; expected DI16x16"),
        ({"variant": "DV"}, r"config\.json: variant is 'DV'; expected one of DV8x16x16, DI16x16"),
        ({"resolution": 100}, r"config\.json: resolution is 100; expected a multiple of 16"),
        ({"resolution": 0}, r"config\.json: resolution is 0; expected"),
        ({"fold": True}, r"config\.json: unknown key 'fold'"),
        ({"resolution": "256"}, r"config\.json: resolution is '256'; expected int"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_image_tokenizer(saved(tmp_path, tensors_of(DV), **changes))


@pytest.mark.parametrize("config", [DV, DI], ids=lambda c: c.variant)
def test_wrong_tensors_are_all_listed(tmp_path, config):
    tensors = tensors_of(config)
    mid = "encoder.mid.block_1.norm1.norm" if config.video else "encoder.mid.block_1.norm1"
    del tensors[f"{mid}.bias"]
    tensors["decoder.stray"] = torch.ones(1)
    name = next(n for n in tensors if n.startswith("decoder.conv_out"))
    tensors[name] = tensors[name][1:]
    tensors[f"{mid}.weight"] = tensors[f"{mid}.weight"].int()
    with pytest.raises(ValueError) as caught:
        load_image_tokenizer(saved(tmp_path, tensors, variant=config.variant))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'model.safetensors'} does not fit Cosmos ({config.variant}, channels ")
    for part in (
        f"missing {mid}.bias",
        "unexpected decoder.stray",
        f"{name} has shape",
        f"{mid}.weight is torch.int32",
    ):
        assert part in message


@pytest.mark.parametrize("config", [DV, DI], ids=lambda c: c.variant)
def test_damaged_shapes_end_in_one_error(tmp_path, config):
    """Each weight that the widths are read from, gone or of another shape."""
    tensors = tensors_of(config)
    known = [n for n in tensors if n.endswith("weight") and ("conv_in" in n or "block.0.conv1" in n or n[0] == "q")]
    assert len(known) > 5
    for name, bad in zip(known, itertools.cycle([None, torch.ones(()), torch.ones(0, 0, 0, 0), torch.ones(7, 3)])):
        changed = {n: t for n, t in tensors.items() if n != name}
        if bad is not None:
            changed[name] = bad
        with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
            load_image_tokenizer(saved(tmp_path, changed, variant=config.variant))
        assert "\n" not in str(caught.value)


def test_other_levels_are_refused(tmp_path):
    for half, prefix in (("encoder", "quantizer"), ("decoder", "inv_quant.quantizer")):
        tensors = {f"{prefix}._levels": torch.tensor([8, 8, 8, 6, 5, 5])}
        safetensors.torch.save_file(tensors, tmp_path / f"{half}.safetensors")
    with pytest.raises(
        ValueError, match=r"r\.safetensors: quantizer\._levels is \[8, 8, 8, 6, 5, 5\]; expected \[8, 8"
    ):
        load_image_tokenizer(tmp_path)


def test_half_a_tokenizer_is_none(published, tmp_path):
    shutil.copy(published[0] / "encoder.jit", tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["CosmosTokenizer"]}')
    with pytest.raises(
        ValueError, match=r"model\.safetensors: no such file; .* or Cosmos' encoder\.jit and decoder\.jit"
    ):
        load_image_tokenizer(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path):
    tensors = tensors_of(DI)
    tensors["quant_conv.bias"][2] = float("nan")
    with pytest.raises(ValueError, match=r"model\.safetensors: quant_conv\.bias: NaN or infinity"):
        load_image_tokenizer(saved(tmp_path, tensors, variant="DI16x16"))


@pytest.mark.parametrize("config", [DV, DI], ids=lambda c: c.variant)
def test_sizes_that_do_not_fit_are_refused(tmp_path, config):
    tokenizer = load_image_tokenizer(saved(tmp_path, tensors_of(config), variant=config.variant))
    assert isinstance(tokenizer, ImageTokenizer)
    for shape in ((1, 3, 24, 32), (1, 1, 32, 32), (3, 32, 32), (1, 3, 0, 16)):
        with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\] with H and W multiples of 16"):
            tokenizer.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"code 64000 is outside the codebook 0\.\.63999"):
        tokenizer.decode(torch.tensor([[[64000]]]))
    assert tokenizer.encode(torch.zeros(0, 3, 16, 16)).shape == (0, 1, 1)
