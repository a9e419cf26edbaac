"""A pickle in the place of any file that is read is refused and never run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from toys import VOCAB, pretrain_settings, write_dataset

from vtrain.data.reader import Dataset
from vtrain.data.verify import verify
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.models.hf import export_hf, load_decoder
from vtrain.pretrain import main
from vtrain.text import load_text_tokenizer
from vtrain.train.checkpoint import write_manifest
from vtrain.visual import load_image_tokenizer
from vtrain.visual.tokenizer import ImageTokenizer
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig


class Malicious:
    """Unpickled, it makes the file `witness`."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.fixture
def poison(tmp_path):
    """A function that puts the pickle in the place of a file; afterwards the pickle must not have run."""
    witness = tmp_path / "witness"
    content = pickle.dumps({"weight": Malicious(witness)})

    def put(path: Path) -> Path:
        assert path.is_file(), f"{path} is not read in the first place"
        path.write_bytes(content)
        return path

    yield put
    assert not witness.exists(), "the pickle was run"
    pickle.loads(content)
    assert witness.exists(), "the pickle of this test does nothing"


def test_model_weights(tmp_path, poison):
    model = Decoder(DecoderConfig(1, 16, 2, 2, 24), VOCAB)
    export_hf(model.named_parameters(), model.config, VOCAB, tmp_path / "model")
    poison(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_decoder(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json"])
def test_model_json(tmp_path, poison, name):
    model = Decoder(DecoderConfig(1, 16, 2, 2, 24), VOCAB)
    export_hf(model.named_parameters(), model.config, VOCAB, tmp_path / "model")
    poison(tmp_path / "model" / name)
    with pytest.raises(ValueError, match=name):
        load_decoder(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_image_tokenizer(tmp_path, poison, name):
    config = AutoencoderConfig(
        resolution=8, base_channels=8, channel_multiplier=(1, 2), num_res_blocks=1, latent_channels=8, num_embeddings=16
    )
    ImageTokenizer(Autoencoder(config)).save(tmp_path / "image")
    poison(tmp_path / "image" / name)
    with pytest.raises(ValueError, match=name):
        load_image_tokenizer(tmp_path / "image")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "vocab.json"])
def test_text_tokenizer(tmp_path, poison, name):
    (tmp_path / name).touch()
    (tmp_path / "merges.txt").touch()
    poison(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        load_text_tokenizer(tmp_path / name)


def test_shards_and_manifests(tmp_path, poison):
    for victim in ("*.vts", "manifest-*.json"):
        folder = write_dataset(tmp_path / victim.strip("*-.").replace("*", ""), 10)
        poison(next(folder.glob(victim)))
        assert verify(folder)
        with pytest.raises(ValueError):
            Dataset(folder)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.json", "state.json", "manifest.json"])
def test_checkpoints_even_with_a_matching_manifest(tmp_path, poison, name):
    data = write_dataset(tmp_path / "data", 40)
    out = tmp_path / "out"
    main(pretrain_settings(out, data, train={"steps": 2, "tokens_per_step": 256}))
    folder = out / "checkpoints" / "step-00000002"
    poison(folder / name)
    if name != "manifest.json":
        write_manifest(folder)
        assert name in json.loads((folder / "manifest.json").read_text())["files"]
    with pytest.raises(ValueError, match=name):
        main(pretrain_settings(out, data, train={"steps": 4, "tokens_per_step": 256}))
