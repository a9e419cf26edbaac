"""Known decoder shapes by name, and the translation of their configs from and to Hugging Face's `config.json`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from vtrain.models.decoder import DecoderConfig, RopeScaling
from vtrain.vocab import Vocabulary

_LLAMA_32 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
_LLAMA_31 = replace(_LLAMA_32, factor=8.0)


def _llama3(layers: int, hidden: int, heads: int, ffn: int, scaling: RopeScaling, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        layers, hidden, heads, 8, ffn, rope_theta=5e5, rope_scaling=scaling, norm_eps=1e-5, tied=tied,
        max_positions=131072,
    )  # fmt: skip


def _qwen25(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(layers, hidden, heads, kv_heads, ffn, rope_theta=1e6, qkv_bias=True, tied=tied)


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        layers, hidden, heads, 8, ffn, head_dim=128, rope_theta=1e6, qk_norm=True, tied=tied, max_positions=40960
    )


PRESETS = {
    "digits": DecoderConfig(3, 96, 3, 3, 288, max_positions=1024),
    "tiny": DecoderConfig(4, 128, 4, 2, 384, qk_norm=True, max_positions=4096),
    "llama-3.2-1b": _llama3(16, 2048, 32, 8192, _LLAMA_32, tied=True),
    "llama-3.2-3b": _llama3(28, 3072, 24, 8192, _LLAMA_32, tied=True),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14336, _LLAMA_31, tied=False),
    "qwen2.5-0.5b": _qwen25(24, 896, 14, 2, 4864, tied=True),
    "qwen2.5-1.5b": _qwen25(28, 1536, 12, 2, 8960, tied=True),
    "qwen2.5-7b": _qwen25(28, 3584, 28, 4, 18944, tied=False),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288, tied=False),
}


def preset(name: str, **overrides) -> DecoderConfig:
    """The shape called `name` with some fields replaced. ValueError for an unknown name or field.

    Where the preset has head_dim = hidden / heads, it stays so under another `hidden` or `heads`.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ValueError(
            f"model preset {name!r} is unknown, the nearest is {near[0]!r}; there are {', '.join(PRESETS)}"
        )
    config = PRESETS[name]
    unknown = sorted(overrides.keys() - vars(config).keys())
    if unknown:
        raise ValueError(f"model preset {name!r}: unknown fields {unknown}; a decoder has {', '.join(vars(config))}")
    if config.head_dim * config.heads == config.hidden and {"hidden", "heads"} & overrides.keys():
        overrides = {"head_dim": 0, **overrides}
    return replace(config, **overrides)


class UnsupportedConfig(ValueError):
    """A Hugging Face config asks for something this decoder does not do."""


def from_hf_config(hf: Mapping, where: str = "config.json") -> DecoderConfig:
    """A DecoderConfig from the fields of a Hugging Face `config.json` (llama, qwen2, qwen3; transformers 4 or 5).

    UnsupportedConfig (a ValueError) names the key that the decoder cannot honour.
    """
    kind = hf.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UnsupportedConfig(f"{where}: model_type {kind!r}, expected llama, qwen2 or qwen3")
    _refuse_unsupported(hf, where)
    try:
        rope = _rope_parameters(hf)
        return DecoderConfig(
            layers=hf["num_hidden_layers"],
            hidden=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            ffn=hf["intermediate_size"],
            head_dim=hf.get("head_dim") or (128 if kind == "qwen3" else 0),
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_rope_scaling(rope, where),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            tied=hf.get("tie_word_embeddings", False),
            max_positions=hf["max_position_embeddings"],
            init_std=hf.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise UnsupportedConfig(f"{where}: key {error} is missing") from error


def _refuse_unsupported(hf: Mapping, where: str) -> None:
    """Everything that changes the numbers and that the decoder does not do must be absent or off."""
    for key, allowed in {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "attention_dropout": (0, None),
        "quantization_config": (None,),
        "partial_rotary_factor": (1, None),
    }.items():
        if key in hf and hf[key] not in allowed:
            raise UnsupportedConfig(f"{where}: {key} {hf[key]!r} is not supported, expected {allowed[0]!r}")
    windowed = sorted(set(hf.get("layer_types") or ()) - {"full_attention"})
    if windowed:
        raise UnsupportedConfig(f"{where}: layer_types has {windowed}, expected only full_attention")


def _rope_parameters(hf: Mapping) -> dict:
    """transformers 5 has all of it in `rope_parameters`, transformers 4 in `rope_theta` and `rope_scaling`."""
    rope = {"rope_theta": hf.get("rope_theta", 10000.0)}
    return rope | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})


def _rope_scaling(rope: Mapping, where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UnsupportedConfig(
            f"{where}: rope partial_rotary_factor {rope['partial_rotary_factor']} is not supported, expected 1"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedConfig(f"{where}: rope_scaling of type {kind!r} is not supported, expected default or llama3")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_positions=rope["original_max_position_embeddings"],
    )


def to_hf_config(config: DecoderConfig, vocab: Vocabulary) -> dict:
    """The `config.json` under which transformers computes the same numbers, readable by its versions 4 and 5."""
    kind, architecture = "llama", "LlamaForCausalLM"
    if config.qkv_bias:
        kind, architecture = "qwen2", "Qwen2ForCausalLM"
    elif config.qk_norm:
        kind, architecture = "qwen3", "Qwen3ForCausalLM"
    hf = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": vocab.size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.rope_scaling:
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    if kind != "qwen2":
        hf["attention_bias"] = False
    return hf
