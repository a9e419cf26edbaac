"""FLOPs of a training step and the peak of known GPUs, for model FLOPs utilisation (MFU).

Only useful work counts: matrix products with the weights, attention over the pairs that are really visible (a token
sees itself and what came before in its document), no recomputation, no padding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vtrain.models.decoder import DecoderConfig
from vtrain.vocab import Vocabulary

# Dense bf16 FLOP/s with fp32 accumulation, from the vendors' data sheets. The first name found as a word wins.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device as `torch.cuda.get_device_name` calls it, None for an unknown one."""
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE):
            return peak
    return None


def matmul_parameters(config: DecoderConfig) -> int:
    """Weights of the blocks that take part in matrix products: those of the head and the tables do not count."""
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    return config.layers * config.hidden * (attention + 3 * config.ffn)


def train_flops(
    config: DecoderConfig, vocab: Vocabulary, seqlens: Sequence[int] | np.ndarray, scored: float | None = None
) -> float:
    """FLOPs of forward and backward over documents of the given lengths (tokens).

    6 per matmul weight and token, and three forwards' worth of causal attention. `scored` is the number of tokens whose
    logits are computed (None = all; one of which half are computed counts half); the padding rows of the head do not.
    """
    lengths = np.asarray(seqlens, dtype=np.float64)
    tokens = lengths.sum()
    head = vocab.size * config.hidden * (tokens if scored is None else scored)
    visible = (lengths * (lengths + 1) / 2).sum()
    attention = 4 * config.layers * config.heads * config.head_dim * visible  # q.k and p.v, a multiply and an add each
    return float(6 * (matmul_parameters(config) * tokens + head) + 3 * attention)
