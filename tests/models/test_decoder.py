"""The decoder against transformers, and packed against one document at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import fully_shard

import vkernels
from vtrain.batch import Document, PackedBatch
from vtrain.models import hf
from vtrain.models.decoder import Decoder, DecoderConfig, RopeScaling, fill_normal_rows, local_rows, rope_tables
from vtrain.models.presets import from_hf_config
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=61, visual=20)
SMALL = DecoderConfig(layers=3, hidden=32, heads=4, kv_heads=2, ffn=48, init_std=0.2)
SHAPE = {"vocab_size": VOCAB.size, "hidden_size": 56, "intermediate_size": 72, "num_hidden_layers": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,  # short, so that every kind of frequency meets 40 positions
}
ORACLES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=4),
    "llama_scaled_gqa7": lambda: transformers.LlamaConfig(
        **SHAPE, num_attention_heads=7, num_key_value_heads=1, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True
    ),
    "qwen2_gqa6_tied": lambda: transformers.Qwen2Config(
        **SHAPE | {"hidden_size": 96}, num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "qwen2_gqa7": lambda: transformers.Qwen2Config(**SHAPE, num_attention_heads=14, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(
        **SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5
    ),
}


def oracle(name: str):
    """A transformers model with weights large enough that every part of it shows in the logits."""
    config = ORACLES[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    return model


def ours(model, folder) -> Decoder:
    """The same weights in a Decoder, carried over by a saved folder."""
    model.save_pretrained(folder)
    config = from_hf_config(hf.read_hf_config(folder))
    decoder = Decoder(config, VOCAB)
    hf.copy_parameters(decoder, cut(hf.import_hf(folder, config, Vocabulary.of(all=VOCAB.size))))
    return decoder


def cut(tensors):
    """Tables of one range of all ids -> tables of VOCAB's ranges."""
    for name, tensor in tensors:
        if not name.endswith(".all"):
            yield name, tensor
            continue
        for r in VOCAB.ranges:
            yield name.replace(".all", f".{r.name}"), F.pad(tensor[r.base : r.end], (0, 0, 0, r.rows - r.size))


def documents(*lengths: int) -> list[Document]:
    draw = np.random.default_rng(0)
    return [Document(draw.integers(0, VOCAB.size, n, dtype=np.int32), key=i + 1) for i, n in enumerate(lengths)]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("name", ORACLES)
def test_logits_equal_transformers(name, tmp_path):
    model = oracle(name)
    decoder = ours(model, tmp_path)
    docs = documents(40, 1, 17, 23)
    hidden, _ = decoder(PackedBatch.build(docs, VOCAB, pack_tokens=96, max_documents=8))
    logits = decoder.logits(hidden)
    start = 0
    for doc in docs:
        expected = model(torch.from_numpy(doc.ids).long()[None]).logits[0]
        assert relative_error(logits[start : start + len(doc)], expected) < 1e-5
        start += len(doc)


@pytest.mark.parametrize("name", ["llama_scaled_gqa7", "qwen2_gqa7", "qwen3"])
def test_gradients_equal_transformers(name, tmp_path):
    model = oracle(name)
    decoder = ours(model, tmp_path / "weights")
    docs = documents(19, 8)
    for doc in docs:
        ids = torch.from_numpy(doc.ids).long()[None]
        F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    batch = PackedBatch.build(docs, VOCAB, pack_tokens=32)
    hidden, _ = decoder(batch)
    loss, _ = vkernels.linear_cross_entropy(hidden, *decoder.head()[:2], batch.labels, sizes=VOCAB.sizes)
    loss.sum().backward()
    with torch.no_grad():  # transformers' gradients travel the way of its weights
        for p in model.parameters():
            p.copy_(p.grad)
    expected = dict(ours(model, tmp_path / "gradients").named_parameters())
    for key, parameter in decoder.named_parameters():
        assert relative_error(parameter.grad, expected[key]) < 2e-5, key


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "kv_heads": 1}, {"qkv_bias": True, "tied": True}], ids=str)
def test_packed_equals_one_document_at_a_time(changes):
    decoder = Decoder(replace(SMALL, **changes), VOCAB)
    docs = documents(5, 1, 31, 2, 12)
    hidden, taps = decoder(PackedBatch.build(docs, VOCAB, pack_tokens=70, max_documents=9), taps=(0, 2))
    start = 0
    for doc in docs:
        alone, alone_taps = decoder(PackedBatch.build([doc], VOCAB))
        stop = start + len(doc)
        torch.testing.assert_close(hidden[start:stop], alone, rtol=1e-5, atol=1e-5)
        assert not alone_taps
        start = stop
    torch.testing.assert_close(vkernels.rms_norm(taps[2], decoder.norm, SMALL.norm_eps), hidden)
    assert taps.keys() == {0, 2}
    assert taps[0].shape == hidden.shape


def test_the_padding_document_does_not_reach_the_others():
    decoder = Decoder(SMALL, VOCAB)
    docs = documents(9, 4)
    tight, _ = decoder(PackedBatch.build(docs, VOCAB))
    padded, _ = decoder(PackedBatch.build(docs, VOCAB, pack_tokens=200, max_documents=12))
    torch.testing.assert_close(padded[:13], tight)
    assert torch.isfinite(padded).all()


def test_a_tap_is_what_its_block_made():
    decoder = Decoder(SMALL, VOCAB)
    batch = PackedBatch.build(documents(6, 7), VOCAB)
    _, taps = decoder(batch, taps=[1, 0])
    again = decoder.layers[1](taps[0], *rope_tables(batch.positions, SMALL), batch)
    assert torch.equal(again, taps[1])
    with pytest.raises(ValueError, match=r"no layer \[3\].*0\.\.2"):
        decoder(batch, taps=[3])


def test_key_windows_of_the_batch_reach_attention():
    decoder = Decoder(SMALL, VOCAB)
    batch = PackedBatch.build(documents(12), VOCAB)
    rows = torch.arange(12, dtype=torch.int32)
    alone = replace(batch, kv_lo=rows, kv_hi=rows + 1)  # every token sees only itself
    singles = [Document(batch.ids[i : i + 1].numpy(), positions=np.array([i])) for i in range(12)]
    expected, _ = decoder(PackedBatch.build(singles, VOCAB))
    torch.testing.assert_close(decoder(alone)[0], expected)
    assert not torch.allclose(decoder(batch)[0][1:], expected[1:], atol=1e-2)


def test_a_cache_takes_the_place_of_attention():
    class Recorder:
        def __init__(self):
            self.layers = []

        def attend(self, layer, q, k, v, batch):
            self.layers.append(layer)
            assert q.shape == (13, 4, 8)
            assert k.shape == v.shape == (13, 2, 8)
            return vkernels.varlen_attention(q, k, v, batch.cu_seqlens, max_seqlen_q=batch.max_seqlen)

    decoder, cache = Decoder(SMALL, VOCAB), Recorder()
    batch = PackedBatch.build(documents(6, 7), VOCAB)
    torch.testing.assert_close(decoder(batch, cache=cache)[0], decoder(batch)[0])
    assert cache.layers == [0, 1, 2]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_named_ranges_and_the_head(tied):
    decoder = Decoder(replace(SMALL, tied=tied), VOCAB)
    hidden = torch.randn(3, 32)
    full = decoder.logits(hidden)
    assert full.shape == (3, VOCAB.size)
    torch.testing.assert_close(decoder.logits(hidden, ["visual"]), full[:, 61:])
    torch.testing.assert_close(decoder.logits(hidden, ["visual", "text"]), full.roll(20, dims=1))
    with pytest.raises(KeyError, match="no range 'sound'"):
        decoder.logits(hidden, ["sound"])
    weights, bases, sizes = decoder.head()
    assert (bases, sizes) == ([0, 61], [61, 20])
    assert [w.shape for w in weights] == [(128, 32), (128, 32)]
    assert weights[0] is (decoder.embed if tied else decoder.head).text
    names = decoder.state_dict().keys()
    assert {"embed.text", "embed.visual", "norm", "layers.2.down"} <= names
    assert ("head.visual" in names) is not tied


def test_rotary_angles_are_exact_far_out():
    config = replace(SMALL, hidden=64, head_dim=64, rope_theta=5e5)
    positions = torch.tensor([0, 1, 4095, 131071], dtype=torch.int32)
    cos, sin = rope_tables(positions, config)
    assert cos.dtype == sin.dtype == torch.float32
    for row, p in enumerate(positions.tolist()):
        for pair in range(32):
            angle = p * 5e5 ** (-2 * pair / 64)
            assert abs(float(cos[row, pair]) - math.cos(angle)) < 1e-6
            assert abs(float(sin[row, pair]) - math.sin(angle)) < 1e-6


def test_bfloat16_weights_compute_in_bfloat16():
    decoder = Decoder(SMALL, VOCAB)
    batch = PackedBatch.build(documents(20), VOCAB)
    expected, _ = decoder(batch)
    found, _ = decoder.to(torch.bfloat16)(batch)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), expected) < 0.05


def test_initial_weights_depend_on_seed_and_name_only():
    with torch.device("meta"):
        decoder = Decoder(SMALL, VOCAB)
    assert all(p.is_meta for p in decoder.parameters())
    assert not list(decoder.buffers())
    decoder.to_empty(device="cpu").init_weights(5)
    other = Decoder(SMALL, VOCAB)
    at_construction = {n: p.clone() for n, p in other.named_parameters()}
    other.init_weights(5)
    for (name, p), q in zip(decoder.named_parameters(), other.parameters()):
        assert torch.equal(p, q), name
        assert p.ndim == 1 or not torch.equal(p, at_construction[name]), name
    deeper = Decoder(replace(SMALL, layers=4), Vocabulary.of(text=200, visual=20))
    deeper.init_weights(5)
    assert torch.equal(deeper.layers[2].qkv, decoder.layers[2].qkv)
    assert torch.equal(deeper.embed.text[:61], decoder.embed.text[:61])
    assert not torch.equal(decoder.layers[1].qkv, decoder.layers[2].qkv)


@torch.no_grad()
def test_the_spread_of_initial_weights():
    config = DecoderConfig(8, 128, 4, 4, 256, qkv_bias=True, init_std=0.05)
    decoder = Decoder(config, VOCAB)
    layer = decoder.layers[3]
    for p, std in ((layer.qkv, 0.05), (layer.gate_up, 0.05), (layer.out, 0.0125), (layer.down, 0.0125)):
        assert abs(float(p.std()) / std - 1) < 0.03
        assert abs(float(p.mean())) < 0.03 * std
    assert torch.equal(layer.attn_norm, torch.ones(128))
    assert torch.equal(layer.qkv_bias, torch.zeros(384))
    assert not decoder.head.visual[20:].any()
    assert decoder.head.visual[:20].ne(0).all()


@pytest.mark.parametrize(("first", "rows"), [(0, 300), (1, 5), (127, 2), (128, 128), (250, 0)])
def test_normal_rows_do_not_depend_on_where_a_shard_begins(first, rows):
    whole, part = torch.empty(300, 7), torch.full((rows, 7), math.nan)
    fill_normal_rows(whole, 9, 0, 0.5)
    fill_normal_rows(part, 9, first, 0.5)
    assert torch.equal(part, whole[first : first + rows])


@pytest.mark.parametrize("rank", range(3))
def test_shards_initialise_and_load_as_the_whole(rank):
    """FSDP over a fake group of three: each rank alone gets just its rows of the whole model."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = dict(Decoder(SMALL, VOCAB).named_parameters())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (3,))
        with torch.device("meta"):
            decoder = Decoder(SMALL, VOCAB)
        for module in (*decoder.layers, decoder):
            fully_shard(module, mesh=mesh)
        decoder.to_empty(device="cpu").init_weights(0)
        held = 0
        for name, parameter in decoder.named_parameters():
            local, first = local_rows(parameter)
            assert torch.equal(local, whole[name][first : first + len(local)]), name
            assert first == min(rank * -(-len(whole[name]) // 3), len(whole[name]))
            held += len(local)
        assert held < sum(len(p) for p in whole.values()) / 2
        hf.copy_parameters(decoder, ((n, 2 * p) for n, p in whole.items()))
        for name, parameter in decoder.named_parameters():
            local, first = local_rows(parameter)
            assert torch.equal(local, 2 * whole[name][first : first + len(local)]), name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers: 0"),
        ({"heads": 5, "head_dim": 0}, "heads: 5 does not divide hidden 32"),
        ({"head_dim": 7}, "head_dim: 7"),
        ({"heads": 3}, "kv_heads: 2 does not divide heads 3"),
        ({"qkv_bias": True, "qk_norm": True}, "qk_norm.*qkv_bias"),
        ({"init_std": -1.0}, "init_std: -1"),
        ({"norm_eps": 0.0}, "norm_eps: 0"),
    ],
    ids=str,
)
def test_a_bad_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_bad_rope_scaling_names_the_field():
    with pytest.raises(ValueError, match="rope_scaling: factor"):
        RopeScaling(8.0, 4.0, 1.0, 8192)
