"""Weights to and from Hugging Face folders, presets, and config.json; transformers is the oracle."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vtrain.batch import Document, PackedBatch
from vtrain.models import hf
from vtrain.models.decoder import Decoder, DecoderConfig, RopeScaling
from vtrain.models.presets import PRESETS, from_hf_config, preset, to_hf_config
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=61, visual=20)
SCALING = RopeScaling(8.0, 1.0, 4.0, 24)
LLAMA = DecoderConfig(2, 32, 4, 2, 48, rope_theta=2000.0, rope_scaling=SCALING, norm_eps=1e-5, init_std=0.2)
QWEN2 = DecoderConfig(2, 32, 4, 1, 48, rope_theta=1e6, qkv_bias=True, tied=True, init_std=0.2)
QWEN3 = DecoderConfig(2, 32, 4, 2, 48, head_dim=16, rope_theta=1e6, qk_norm=True, max_positions=99, init_std=0.2)
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


def make(config: DecoderConfig, vocab: Vocabulary = VOCAB) -> Decoder:
    """Random weights everywhere, also in norms and biases."""
    decoder = Decoder(config, vocab)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in decoder.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return decoder


def export(decoder: Decoder, folder, **options) -> None:
    hf.export_hf(decoder.named_parameters(), decoder.config, decoder.vocab, folder, **options)


def assert_same_parameters(found: Decoder, expected: Decoder) -> None:
    expected_parameters = dict(expected.named_parameters())
    assert dict(found.named_parameters()).keys() == expected_parameters.keys()
    for name, p in found.named_parameters():
        assert torch.equal(p, expected_parameters[name]), name


def logits(decoder: Decoder, ids: np.ndarray) -> torch.Tensor:
    return decoder.logits(decoder(PackedBatch.build([Document(ids)], decoder.vocab))[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard_bytes", [5e9, 20_000], ids=["single", "sharded"])
def test_export_reloads_in_transformers_and_here(name, shard_bytes, tmp_path):
    decoder = make(CONFIGS[name])
    specials = {"<|soi|>": 58}
    export(decoder, tmp_path / "model", specials=specials, max_shard_bytes=shard_bytes)
    ids = np.random.default_rng(0).integers(0, VOCAB.size, 40)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert model.config.model_type == name
    found = model(torch.from_numpy(ids)[None]).logits[0]
    assert found.shape == (40, VOCAB.size)
    torch.testing.assert_close(found, logits(decoder, ids), rtol=1e-5, atol=1e-5 * float(found.detach().abs().max()))

    loaded = hf.load_decoder(tmp_path / "model")
    assert_same_parameters(loaded, decoder)
    assert (loaded.config, loaded.vocab) == (decoder.config, VOCAB)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert hf.read_specials(tmp_path / "model") == specials
    assert hf.read_vocabulary(tmp_path / "model") == VOCAB
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert (len(files) > 2) == (shard_bytes < 1e6)
    assert all(f.stat().st_size < max(shard_bytes, 100_000) + 10_000 for f in files)


def test_what_transformers_saved_comes_back_after_a_round_trip(tmp_path):
    """Their folder -> ours -> their matrices, bit for bit."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=70, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    decoder = hf.load_decoder(tmp_path / "theirs")
    assert decoder.vocab == Vocabulary.of(text=70)
    export(decoder, tmp_path / "ours")
    expected = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "theirs").state_dict()
    found = load_file(tmp_path / "ours" / hf.WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_export_in_another_dtype(tmp_path):
    decoder = make(LLAMA)
    export(decoder, tmp_path / "model", dtype=torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "model" / hf.WEIGHTS).values())
    loaded = hf.load_decoder(tmp_path / "model", dtype=torch.bfloat16)
    assert_same_parameters(loaded, decoder.to(torch.bfloat16))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_export_replaces_an_older_folder(tmp_path):
    export(make(LLAMA), tmp_path / "model", max_shard_bytes=20_000)
    newer = make(QWEN2)
    export(newer, tmp_path / "model")
    assert_same_parameters(hf.load_decoder(tmp_path / "model"), newer)
    assert not list((tmp_path / "model").glob("*index*"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop("layers.1.out"), t.pop("head.visual")], r"missing layers\.1\.out, head\.visual"),
        (lambda t: t.update({"layers.9.out": torch.zeros(1)}), r"unexpected tensor layers\.9\.out"),
        (lambda t: t.update({"norm": torch.zeros(31)}), r"norm is \[31\], expected \[32\]"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_failed_export_leaves_the_old_folder_alone(change, message, tmp_path):
    decoder = make(LLAMA)
    export(decoder, tmp_path / "model")
    tensors = dict(decoder.named_parameters())
    change(tensors)
    with pytest.raises(ValueError, match=message):
        hf.export_hf(tensors.items(), LLAMA, VOCAB, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_parameters(hf.load_decoder(tmp_path / "model"), decoder)


def text_model(tmp_path, rows: int, **changes) -> Decoder:
    """A model of one text range whose folder looks as if from elsewhere."""
    decoder = make(replace(LLAMA, **changes), Vocabulary.of(text=rows))
    export(decoder, tmp_path / "model")
    (tmp_path / "model" / hf.VOCABULARY).unlink()
    return decoder


@pytest.mark.parametrize("rows", [61, 64, 40])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_old_ones(rows, tied, tmp_path):
    """61 rows fit the range, 64 have padding to cut, 40 leave a part of the text range to be made."""
    source = text_model(tmp_path, rows, tied=tied)
    tensors = dict(hf.import_hf(tmp_path / "model", source.config, VOCAB))
    kept = min(rows, 61)
    for part in ("embed",) if tied else ("embed", "head"):
        old = getattr(source, part).text[:kept]
        mean = old.double().mean(0).float()
        text, visual = tensors[f"{part}.text"], tensors[f"{part}.visual"]
        assert text.shape == visual.shape == (128, 32)
        assert torch.equal(text[:kept], old)
        torch.testing.assert_close(text[kept:61], mean.expand(61 - kept, 32))
        torch.testing.assert_close(visual[:20], mean.expand(20, 32))
        assert not text[61:].any()
        assert not visual[20:].any()
    decoder = Decoder(source.config, VOCAB)
    hf.copy_parameters(decoder, tensors.items())
    ids = np.arange(30)
    torch.testing.assert_close(logits(decoder, ids)[:, :kept], logits(source, ids)[:, :kept])


def qwen2(folder, heads: int, rows: int = 300):
    """A tiny tied Qwen2 as its makers ship it: more rows than its tokenizer has ids."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=rows, hidden_size=heads * 4, intermediate_size=24, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("heads", [14, 12], ids=["7 to 1", "6 to 1"])
def test_a_vocabulary_grows_by_specials_and_codes(heads, tmp_path):
    """290 of 300 rows are used; 7 specials are appended where there was padding, then come 64 codes."""
    theirs = qwen2(tmp_path / "theirs", heads)
    old = theirs.model.embed_tokens.weight.detach()
    config = from_hf_config(hf.read_hf_config(tmp_path / "theirs"))
    vocab = Vocabulary.of(text=297, visual=64)
    decoder = Decoder(config, vocab)
    hf.copy_parameters(decoder, hf.import_hf(tmp_path / "theirs", config, vocab, used_rows=290))
    mean = old[:290].double().mean(0).float()
    tables = torch.cat([decoder.embed.text[:297], decoder.embed.visual[:64]]).detach()
    assert torch.equal(tables[:290], old[:290])
    torch.testing.assert_close(tables[290:], mean.expand(71, -1))
    assert not torch.allclose(old[290:297], mean.expand(7, -1), atol=0.05), "the padding cannot be told from the mean"
    assert config.tied
    assert not any(name.startswith("head") for name, _ in decoder.named_parameters())

    facts = {"image": {"resolution": 512, "downscale": 16}, "text": {"caption_space": True}}
    export(decoder, tmp_path / "ours", specials={"<|t2i|>": 290}, **facts)
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert (grown.config.vocab_size, grown.config.tie_word_embeddings) == (361, True)
    ids = np.random.default_rng(0).integers(0, 361, 40)
    found = grown(torch.from_numpy(ids)[None]).logits[0]
    torch.testing.assert_close(found, logits(decoder, ids), rtol=1e-5, atol=1e-5 * float(found.detach().abs().max()))
    text = np.arange(40)
    expected = theirs(torch.from_numpy(text)[None]).logits[0, :, :290].detach()
    assert torch.allclose(logits(decoder, text)[:, :290], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert_same_parameters(hf.load_decoder(tmp_path / "ours"), decoder)
    assert hf.read_image_facts(tmp_path / "ours") == {"resolution": 512, "downscale": 16}
    assert hf.read_text_facts(tmp_path / "ours") == {"caption_space": True}
    assert hf.read_image_facts(tmp_path / "theirs") == hf.read_text_facts(tmp_path / "theirs") == {}


def test_a_model_from_elsewhere_that_has_the_codes_keeps_them(tmp_path):
    """SimpleAR's released weights: one matrix of text, specials and codes, no vocabulary.json."""
    old = qwen2(tmp_path, 14, rows=361).model.embed_tokens.weight.detach()
    config = from_hf_config(hf.read_hf_config(tmp_path))
    for used_rows in (290, None):
        tensors = dict(hf.import_hf(tmp_path, config, Vocabulary.of(text=297, visual=64), used_rows=used_rows))
        assert torch.equal(tensors["embed.text"][:297], old[:297])
        assert torch.equal(tensors["embed.visual"][:64], old[297:])
    tensors = dict(hf.import_hf(tmp_path, config, Vocabulary.of(text=297, visual=65), used_rows=290))
    assert torch.equal(tensors["embed.text"][:290], old[:290])
    torch.testing.assert_close(tensors["embed.visual"][:65], old[:290].double().mean(0).float().expand(65, -1))


@pytest.mark.parametrize(
    ("rows", "used_rows", "expected"),
    [(100, None, 60), (100, 50, 50), (40, 50, 40), (60, 70, 60), (76, 50, 76), (76, None, 76), (75, 50, 50)],
)
def test_kept_rows(rows, used_rows, expected):
    assert hf.kept_rows(rows, Vocabulary.of(text=60, visual=16), used_rows) == expected


def test_used_rows_change_nothing_in_a_folder_of_ours(tmp_path):
    decoder = make(QWEN2)
    export(decoder, tmp_path / "model")
    assert hf.read_image_facts(tmp_path / "model") == {}
    tensors = dict(hf.import_hf(tmp_path / "model", QWEN2, VOCAB, used_rows=40))
    assert all(torch.equal(tensors[name], p) for name, p in decoder.named_parameters())


def test_new_rows_drawn_at_random(tmp_path):
    config = text_model(tmp_path, 61).config
    vocab = Vocabulary.of(text=61, visual=4000)
    first, again, other = (
        dict(hf.import_hf(tmp_path / "model", config, vocab, new_rows="normal", seed=s)) for s in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.visual"], other["head.visual"])
    assert not torch.equal(first["head.visual"], first["embed.visual"])
    assert float(first["embed.visual"][:4000].std()) == pytest.approx(config.init_std, rel=0.01)
    with pytest.raises(ValueError, match="new_rows: 'zero'"):
        hf.import_hf(tmp_path / "model", config, vocab, new_rows="zero")


def change_weights(folder, change) -> None:
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file({k: t.clone() for k, t in tensors.items()}, folder / hf.WEIGHTS, metadata={"format": "pt"})


def test_all_wrong_keys_are_listed(tmp_path):
    export(make(LLAMA), tmp_path)

    def spoil(tensors):
        del tensors["model.layers.0.self_attn.k_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(1)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 47)

    change_weights(tmp_path, spoil)
    with pytest.raises(ValueError) as error:
        hf.import_hf(tmp_path, LLAMA, VOCAB)
    for part in (
        "missing model.layers.0.self_attn.k_proj.weight; missing model.norm.weight",
        "unmapped model.layers.1.self_attn.q_proj.bias; unmapped model.layers.2.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight in model.safetensors is [32, 47], expected [32, 48]",
    ):
        assert part in str(error.value)


def test_frequencies_that_old_transformers_stored_are_passed_over(tmp_path):
    decoder = make(LLAMA)
    export(decoder, tmp_path)
    change_weights(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert_same_parameters(hf.load_decoder(tmp_path), decoder)


def test_a_tied_head_may_be_stored_again_but_not_differ(tmp_path):
    decoder = make(QWEN2)
    export(decoder, tmp_path)
    change_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert_same_parameters(hf.load_decoder(tmp_path), decoder)
    change_weights(tmp_path, lambda t: t["lm_head.weight"][80, 31].add_(1e-3))
    with pytest.raises(ValueError, match=r"unmapped lm_head\.weight"):
        hf.load_decoder(tmp_path)


def test_a_missing_folder_names_the_download_command(tmp_path):
    with pytest.raises(ValueError, match=r"hf download .* --local-dir .*nowhere"):
        hf.import_hf(tmp_path / "nowhere", LLAMA, VOCAB)
    with pytest.raises(ValueError, match=r"hf download Qwen/Qwen2\.5-0\.5B --local-dir Qwen/"):
        hf.load_decoder("Qwen/Qwen2.5-0.5B")


def test_another_vocabulary_is_refused_with_the_differences(tmp_path):
    export(make(LLAMA), tmp_path)
    for vocab, message in (
        (Vocabulary.of(text=61, visual=24, vbpe=4), "visual 20, expected 24; vbpe absent, expected 4"),
        (Vocabulary.of(visual=20, text=61), "order"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.import_hf(tmp_path, LLAMA, vocab)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / hf.WEIGHTS).unlink(), r"expected model\.safetensors or model\.safetensors\.index\.json"),
        (lambda f: (f / hf.WEIGHTS).write_bytes(b"nothing"), r"model\.safetensors: not a readable safetensors"),
        (lambda f: (f / hf.CONFIG).write_text("{"), r"^[^:]*config\.json: not a readable JSON"),
        (lambda f: (f / hf.CONFIG).write_text("[]"), r"config\.json: list at the top"),
        (lambda f: (f / hf.VOCABULARY).write_text('{"ranges": [["text", 0]]}'), r"vocabulary\.json: no vocabulary"),
        (lambda f: (f / hf.VOCABULARY).write_text("{}"), r"vocabulary\.json: no vocabulary in it: 'ranges'"),
    ],
)
def test_damaged_folders(spoil, message, tmp_path):
    export(make(LLAMA), tmp_path / "m")
    spoil(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        hf.load_decoder(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(x="../elsewhere.safetensors"), "is not the name of a file beside it"),
        (lambda m: m.update(x="model-9.safetensors"), r"model-9\.safetensors is missing"),
        (lambda m: m.update(x=next(iter(m.values()))), "and the index differ in x"),
        (lambda m: m.pop("model.norm.weight"), r"and the index differ in model\.norm\.weight"),
        (lambda m: m.update(x=3), "no weight_map"),
    ],
)
def test_damaged_indices(change, message, tmp_path):
    export(make(LLAMA), tmp_path / "m", max_shard_bytes=20_000)
    path = tmp_path / "m" / hf.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        hf.load_decoder(tmp_path / "m")


def test_copy_parameters_lists_what_does_not_fit():
    decoder = make(LLAMA)
    tensors = {**dict(decoder.named_parameters()), "head.text": torch.zeros(2, 2), "extra": torch.zeros(1)}
    del tensors["norm"]
    with pytest.raises(
        ValueError, match=r"head\.text is \[2, 2\], expected \[128, 32\]; unexpected extra; missing norm"
    ):
        hf.copy_parameters(decoder, tensors.items())


@pytest.mark.parametrize("config", [*CONFIGS.values(), *PRESETS.values()], ids=[*CONFIGS, *PRESETS])
def test_config_round_trip(config):
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config, VOCAB)))) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_5_configs_read_the_same(name, tmp_path):
    """transformers 5 saves rope_parameters where we, like version 4, write rope_theta and rope_scaling."""
    (tmp_path / hf.CONFIG).write_text(json.dumps(to_hf_config(CONFIGS[name], VOCAB)))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    saved = hf.read_hf_config(tmp_path / "again")
    assert "rope_theta" not in saved
    assert from_hf_config(saved) == CONFIGS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral', expected llama, qwen2 or qwen3"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has .'sliding_attention'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling of type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "key 'low_freq_factor' is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_configs_name_the_key(change, message):
    with pytest.raises(ValueError, match=rf"here/config\.json: .*{message}"):
        from_hf_config(to_hf_config(LLAMA, VOCAB) | change, where="here/config.json")


@pytest.mark.parametrize(
    ("name", "rows", "parameters"),
    [
        ("llama-3.2-1b", 128256, 1_235_814_400),
        ("llama-3.2-3b", 128256, 3_212_749_824),
        ("llama-3.1-8b", 128256, 8_030_261_248),
        ("qwen2.5-0.5b", 151936, 494_032_768),
        ("qwen2.5-1.5b", 151936, 1_543_714_304),
        ("qwen2.5-7b", 152064, 7_615_616_512),
        ("qwen3-0.6b", 151936, 596_049_920),
        ("qwen3-1.7b", 151936, 1_720_574_976),
        ("qwen3-8b", 151936, 8_190_735_360),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(name, rows, parameters):
    with torch.device("meta"):
        decoder = Decoder(preset(name), Vocabulary.of(text=rows))
    assert sum(p.numel() for p in decoder.parameters()) == parameters


@pytest.mark.parametrize(("size", "parameters"), [("0.5", 551_140_224), ("1.5", 1_641_612_800)])
def test_simplear_has_its_number_of_parameters(size, parameters):
    """151,665 ids of Qwen2.5, 7 specials, 64,000 codes, one table for input and output."""
    vocab = Vocabulary.of(text=151_672, visual=64_000)
    with torch.device("meta"):
        decoder = Decoder(preset(f"qwen2.5-{size}b"), vocab)
    padding = sum(r.rows - r.size for r in vocab.ranges) * decoder.config.hidden
    assert sum(p.numel() for p in decoder.parameters()) - padding == parameters


def test_preset_overrides():
    assert preset("digits") == DecoderConfig(3, 96, 3, 3, 288, max_positions=1024)
    assert preset("digits", hidden=192, tied=True).head_dim == 64
    assert preset("digits", hidden=192, head_dim=16).head_dim == 16
    assert preset("qwen3-0.6b", hidden=512).head_dim == 128
    with pytest.raises(ValueError, match=r"'qwen2.5-0.5' is unknown, the nearest is 'qwen2.5-0.5b'"):
        preset("qwen2.5-0.5")
    with pytest.raises(ValueError, match=r"unknown fields \['depth'\]"):
        preset("digits", depth=4)
