"""A wrong kind of argument is one line that names op, argument, what was found and what is expected, for every op."""

from __future__ import annotations

import pytest
import torch

import vkernels
from vkernels import registry

f, LABELS, CU = torch.randn, torch.arange(8), torch.tensor([0, 3, 8], dtype=torch.int32)
HEADS = {"q": f(8, 4, 16), "k": f(8, 2, 16)}
ANGLES = {"cos": f(8, 8), "sin": f(8, 8)}
RANGES = {"bases": [0, 10], "sizes": [10, 6]}
OUTPUT = {"h": f(8, 16), "weights": [f(10, 16), f(6, 16)], "labels": LABELS, **RANGES}
STATE = {"cluster_size": f(5), "embed_sum": f(5, 4), "codebook": f(5, 4)}
NEW = {"k_new": f(2, 2, 16), "v_new": f(2, 2, 16), "k_cache": f(2, 6, 2, 16), "v_cache": f(2, 6, 2, 16)}

# op -> a call that it takes, and the arguments of it that must be tensors of numbers of a certain kind
CALLS = {
    "rms_norm": ({"x": f(4, 8), "weight": f(8)}, "x weight"),
    "add_rms_norm": ({"x": f(4, 8), "residual": f(4, 8), "weight": f(8)}, "x residual weight"),
    "layer_norm": ({"x": f(4, 8), "weight": f(8), "bias": f(8)}, "x weight bias"),
    "swiglu": ({"gate": f(4, 8), "up": f(4, 8)}, "gate up"),
    "geglu": ({"gate": f(4, 8), "up": f(4, 8)}, "gate up"),
    "quick_gelu": ({"x": f(4, 8)}, "x"),
    "rope": (HEADS | ANGLES, "q k cos sin"),
    "qk_norm_rope": (HEADS | ANGLES | {"q_weight": f(16), "k_weight": f(16)}, "q k cos sin q_weight k_weight"),
    "rope_tables": ({"positions": LABELS, "head_dim": 16}, "positions"),
    "varlen_attention": (
        HEADS | {"v": f(8, 2, 16), "cu_seqlens_q": CU, "cu_seqlens_k": CU, "kv_lo": LABELS.int(), "kv_hi": LABELS + 1},
        "q k v cu_seqlens_q cu_seqlens_k kv_lo kv_hi",
    ),
    "attention_tiles": ({"cu_seqlens_q": CU, "kv_lo": torch.zeros(8, dtype=torch.int32)}, "cu_seqlens_q kv_lo"),
    "linear_cross_entropy": (OUTPUT | {"row_weight": f(8), "row_class": LABELS % 2}, "h labels row_weight row_class"),
    "linear_logprob": (OUTPUT | {"row_class": LABELS % 2}, "h labels row_class"),
    "embed": ({"ids": LABELS, "tables": [f(10, 16), f(6, 16)], **RANGES}, "ids"),
    "embed_order": ({"ids": LABELS, **RANGES}, "ids"),
    "embed_touched": ({"dy": f(8, 16), "ids": LABELS, "base": 0, "size": 10}, "dy ids"),
    "vq_nearest": ({"x": f(8, 4), "codebook": f(5, 4)}, "x codebook"),
    "vq_straight_through": ({"x": f(8, 4), "codebook": f(5, 4), "ids": LABELS % 5}, "x codebook ids"),
    "vq_code_sums": ({"x": f(8, 4), "ids": LABELS % 5, "num_codes": 5}, "x ids"),
    "vq_ema_update": (
        STATE | {"counts": f(5), "sums": f(5, 4), "decay": 0.9, "eps": 1e-5},
        "cluster_size embed_sum codebook counts sums",
    ),
    "vq_reset_codes": (STATE | {"dead": f(5) > 0, "rows": f(3, 4)}, "cluster_size embed_sum codebook dead rows"),
    "fsq_quantize": ({"z": f(8, 3), "levels": [3, 5, 4]}, "z"),
    "fsq_dequantize": ({"ids": LABELS, "levels": [3, 5, 4]}, "ids"),
    "lfq_quantize": ({"z": f(8, 6)}, "z"),
    "lfq_dequantize": ({"ids": LABELS, "dim": 6}, "ids"),
    "lfq_entropy": ({"z": f(8, 6), "groups": 2, "temperature": 1.0}, "z"),
    "newton_schulz": ({"g": f(8, 4)}, "g"),
    "decode_attention": (
        {"q": f(2, 4, 16), "length": torch.tensor([2, 3]), **NEW},
        "q length k_new v_new k_cache v_cache",
    ),
    "sample_logits": ({"logits": f(3, 9), "seed": 1, "step": 0, "keys": torch.arange(3)}, "logits keys"),
}
ELSEWHERE = ("lazy_adamw_rows", "adamw_step", "clip_factor", "vq_usage")  # lists and state: tested with their ops
VALUES = {  # op -> (arguments that it refuses, what it says)
    "vq_ema_update": ({"decay": 1.5}, "decay 1.5"),
    "vq_code_sums": ({"num_codes": 0}, "num_codes 0"),
    "fsq_quantize": ({"levels": [3, 5]}, r"levels \[3, 5\] for 3 channels"),
    "fsq_dequantize": ({"levels": []}, r"levels \[\]"),
    "lfq_dequantize": ({"dim": 32}, "dim 32"),
    "lfq_entropy": ({"temperature": 0.0}, "temperature 0.0"),
    "newton_schulz": ({"coefficients": (1.0, 2.0)}, r"coefficients \(1.0, 2.0\)"),
    "rope_tables": ({"theta": 0.0}, "theta 0.0"),
    "embed_touched": ({"size": -1}, "size -1"),
    "embed": ({"bases": [0, 5]}, r"\[0, 10\) and from 5 on overlap"),
    "embed_order": ({"bases": [0, 5]}, r"\[0, 10\) and from 5 on overlap"),
    "linear_cross_entropy": ({"bases": [0, 5]}, r"\[0, 10\) and from 5 on overlap"),
    "linear_logprob": ({"bases": [0, -1]}, r"bases \[0, -1\]"),
}


def refused(op: str, arguments: dict, what: str) -> None:
    with pytest.raises(ValueError, match=rf"^(vkernels\.)?{op}: .*{what}.*expected") as caught:
        getattr(vkernels, op)(**arguments)
    assert "\n" not in str(caught.value)


def test_every_op_is_here():
    functions = {name for name in vkernels.__all__ if hasattr(getattr(vkernels, name), "__code__")}
    assert functions - {"backends", "patch", "unpatch", *ELSEWHERE} == set(CALLS)


@pytest.mark.parametrize("op", CALLS)
def test_tensors_of_a_wrong_kind(op):
    call, names = CALLS[op]
    clean = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    getattr(vkernels, op)(**clean)
    for name in names.split():
        x = call[name]
        wrong = x.float() if not x.is_floating_point() else x.long()
        for bad in (wrong, x.to(torch.complex64)):
            refused(op, call | {name: bad}, rf"{name} (is|are) {bad.dtype}")


@pytest.mark.parametrize("op", VALUES)
def test_values_out_of_their_range(op):
    change, what = VALUES[op]
    refused(op, CALLS[op][0] | change, what)


def test_what_is_no_tensor_is_named():
    refused("layer_norm", CALLS["layer_norm"][0] | {"bias": None}, "bias is a NoneType")
    refused("varlen_attention", CALLS["varlen_attention"][0] | {"cu_seqlens_q": [0, 8]}, "cu_seqlens_q is a int")


def test_tensors_on_two_devices():
    """The meta device stands for a GPU: the kernels themselves would read what is not there."""
    raw = torch.ops.vkernels.rms_norm.default
    with pytest.raises(ValueError, match=r"^vkernels.rms_norm: weight is on meta, expected cpu as the others$"):
        registry._require_one_device(raw, (f(4, 8), f(8, device="meta"), 1e-6))
