"""FLOPs against torch's own counter and against explicit masks; peaks by device name."""

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

import vkernels
from vtrain.batch import Document, PackedBatch
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.models.flops import matmul_parameters, peak_flops, train_flops
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=128, visual=256)  # whole storage rows: nothing to strip
CONFIG = DecoderConfig(layers=3, hidden=32, heads=4, kv_heads=2, ffn=48, head_dim=16, qkv_bias=True)


def attention_flops(lengths) -> int:
    """Forward, counted pair by pair: a dot product and a weighted sum of head_dim for each visible key."""
    area = sum(int(np.tri(n).sum()) for n in lengths)
    return CONFIG.layers * CONFIG.heads * area * (2 * CONFIG.head_dim + 2 * CONFIG.head_dim)


@pytest.mark.parametrize("lengths", [(37,), (5, 1, 0, 20)])
def test_matrix_products_equal_torchs_count(lengths, monkeypatch):
    monkeypatch.setattr(vkernels, "varlen_attention", lambda q, k, v, *args, **kwargs: q)
    decoder = Decoder(CONFIG, VOCAB)
    batch = PackedBatch.build([Document(np.zeros(n, np.int32)) for n in lengths], VOCAB)
    with FlopCounterMode(display=False) as counter:
        hidden, _ = decoder(batch)
        decoder.logits(hidden)
    expected = 3 * counter.get_total_flops() + 3 * attention_flops(lengths)
    assert train_flops(CONFIG, VOCAB, lengths) == expected


def test_matmul_parameters_are_the_weights_of_the_blocks():
    blocks = Decoder(CONFIG, VOCAB).layers
    assert matmul_parameters(CONFIG) == sum(p.numel() for p in blocks.parameters() if p.ndim == 2)


def test_unscored_tokens_cost_no_head():
    lengths = np.array([30, 12], dtype=np.int32)
    saved = train_flops(CONFIG, VOCAB, lengths) - train_flops(CONFIG, VOCAB, lengths, scored=40)
    assert saved == 6 * 2 * VOCAB.size * CONFIG.hidden
    assert train_flops(CONFIG, VOCAB, []) == 0


def test_long_documents_do_not_overflow():
    lengths = np.full(64, 131072, dtype=np.int32)
    assert train_flops(CONFIG, VOCAB, lengths) == pytest.approx(64 * train_flops(CONFIG, VOCAB, [131072]))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla K80", None),
        ("", None),
    ],
)
def test_peaks_by_device_name(name, peak):
    assert peak_flops(name) == peak


def test_flops_per_token_of_a_published_model():
    """SimpleAR's 0.5B: 3.45 GFLOP a token at 512 pixels (about 1100 tokens), the head a third of it."""
    from vtrain.models.presets import preset

    vocab = Vocabulary.of(text=151672, visual=64000)
    config = preset("qwen2.5-0.5b")
    per_token = train_flops(config, vocab, [1100]) / 1100
    head = per_token - train_flops(config, vocab, [1100], scored=0) / 1100
    assert per_token == pytest.approx(3.45e9, rel=0.01)
    assert head / per_token == pytest.approx(0.34, abs=0.005)
