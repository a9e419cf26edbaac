import hashlib
import json

import pytest
import safetensors.torch
import torch

from vtrain.visual import ImageTokenizer, load_image_tokenizer
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig

TINY = {
    "resolution": 8,
    "base_channels": 8,
    "channel_multiplier": (1, 2),
    "num_res_blocks": 1,
    "latent_channels": 6,
    "embed_dim": 5,
    "num_embeddings": 11,
}


def made(**changes):
    torch.manual_seed(3)
    model = Autoencoder(AutoencoderConfig(**{**TINY, **changes}))
    if model.config.quantizer == "vq":
        model.quantize.embedding.weight.normal_()
    return ImageTokenizer(model)


def pictures(count=4, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("changes", [{}, {"quantizer": "fsq", "fsq_levels": (5, 4, 3)}])
def test_a_saved_tokenizer_is_the_same(tmp_path, changes):
    tokenizer = made(**changes)
    tokenizer.save(tmp_path / "t")
    loaded = load_image_tokenizer(tmp_path / "t")
    assert loaded.model.config == tokenizer.model.config
    assert loaded.resolution == 8
    assert loaded.num_codes == (60 if changes else 11)
    assert loaded.downscale == 2
    ids = tokenizer.encode(pictures())
    assert ids.dtype == torch.int64
    assert ids.shape == (4, 4, 4)
    assert torch.equal(loaded.encode(pictures()), ids)
    decoded = loaded.decode(ids)
    assert torch.equal(decoded, tokenizer.decode(ids))
    assert decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1
    assert not decoded.requires_grad
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("changes", [{}, {"quantizer": "fsq", "fsq_levels": (5, 4, 3)}])
def test_bfloat16_computes_in_bfloat16_and_saves_what_was_read(tmp_path, changes):
    wide = made(**changes)
    wide.save(tmp_path / "a")
    narrow = load_image_tokenizer(tmp_path / "a", dtype=torch.bfloat16)
    assert next(narrow.model.encoder.parameters()).dtype == torch.bfloat16
    assert narrow.sha256 == wide.sha256
    narrow.save(tmp_path / "b")
    assert load_image_tokenizer(tmp_path / "b").sha256 == wide.sha256
    ids = narrow.encode(pictures())
    assert (ids == wide.encode(pictures())).float().mean() > 0.8
    decoded = narrow.decode(ids)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, wide.decode(ids), rtol=0, atol=0.1)


def test_the_hash_is_that_of_the_files(tmp_path):
    tokenizer = made()
    tokenizer.save(tmp_path)
    content = (tmp_path / "config.json").read_bytes() + (tmp_path / "model.safetensors").read_bytes()
    assert tokenizer.sha256 == hashlib.sha256(content).hexdigest()
    assert load_image_tokenizer(tmp_path).sha256 == tokenizer.sha256
    changed = made()
    changed.model.quantize.embedding.weight[0, 0] += 1e-3
    assert changed.sha256 != tokenizer.sha256


def test_only_the_finished_weights_are_saved(tmp_path):
    made().save(tmp_path)
    names = safetensors.torch.load_file(tmp_path / "model.safetensors").keys()
    assert [name for name in names if name.startswith("quantize")] == ["quantize.embedding.weight"]


def test_training_can_go_on_from_a_saved_tokenizer(tmp_path):
    made().save(tmp_path)
    model = load_image_tokenizer(tmp_path).model.train()
    before = model.quantize.embedding.weight.clone()
    model(pictures(), torch.arange(4))
    model.end_step(0)
    assert 0 < (model.quantize.embedding.weight - before).norm() < 0.1 * before.norm()


def test_loading_uses_up_no_random_draws(tmp_path):
    made().save(tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_image_tokenizer(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_wrong_tensors_are_all_listed(tmp_path):
    made().save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["encoder.conv_in.bias"], tensors["decoder.conv_out.weight"]
    tensors["stray"] = torch.zeros(1)
    tensors["quantize.embedding.weight"] = torch.zeros(12, 5)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        load_image_tokenizer(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path} does not fit")
    for part in (
        "missing encoder.conv_in.bias",
        "missing decoder.conv_out.weight",
        "unexpected stray",
        "quantize.embedding.weight has shape [12, 5], expected [11, 5]",
    ):
        assert part in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    made().save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["encoder.conv_in.bias"][1] = value
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: encoder\.conv_in\.bias: NaN or infinity"):
        load_image_tokenizer(tmp_path)


def write_config(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dims": 7}, "unknown key 'embed_dims'; did you mean 'embed_dim'"),
        ({"type": "vae"}, "type is 'vae'; expected 'autoencoder' or 'cosmos'"),
        ({"type": None}, "type is None"),
        ({"resolution": 9}, "resolution 9 is not a multiple of 2"),
        ({"resolution": "8"}, "resolution is '8'; expected int"),
        ({"attention": 1}, "attention is 1; expected bool"),
        ({"channel_multiplier": [1, True]}, "channel_multiplier is [1, True]; expected a list of int"),
        ({"channel_multiplier": 2}, "channel_multiplier is 2; expected a list of int"),
    ],
)
def test_a_wrong_configuration_names_file_and_key(tmp_path, changes, message):
    made().save(tmp_path)
    write_config(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        load_image_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_configuration_that_is_no_json_object(tmp_path, content):
    made().save(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_image_tokenizer(tmp_path)


def test_missing_and_cut_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_image_tokenizer(tmp_path)
    made().save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
            load_image_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        load_image_tokenizer(tmp_path)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 7, 8), (1, 3, 8, 0)])
def test_pictures_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\] with H and W multiples of 2"):
        made().encode(torch.zeros(shape))


def test_codes_outside_the_codebook_are_refused():
    tokenizer = made()
    for bad in (-1, 11):
        with pytest.raises(ValueError, match=rf"code {bad} is outside the codebook 0\.\.10"):
            tokenizer.decode(torch.tensor([[[0, bad]]]))
    with pytest.raises(ValueError, match=r"expected \[B, h, w\]"):
        tokenizer.decode(torch.tensor([0, 1]))


def test_other_sizes_than_the_trained_one_work():
    tokenizer = made()
    ids = tokenizer.encode(pictures(2, 12))
    assert ids.shape == (2, 6, 6)
    assert tokenizer.decode(ids).shape == (2, 3, 12, 12)
