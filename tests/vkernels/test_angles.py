"""rope_tables against Hugging Face's rotary modules, and far positions against float64."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, Qwen3VLVisionRotaryEmbedding

import vkernels

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 512},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn, all keys": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 512, "beta_fast": 16,
                       "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
    "yarn, given attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
                              "attention_factor": 0.8},
    "longrope": {"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096,
                 "short_factor": [1 + 0.01 * i for i in range(32)], "long_factor": [1 + 0.5 * i for i in range(32)]},
}  # fmt: skip


def llama(scaling, theta=500000.0):
    return LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=8192,
                       rope_parameters={"rope_theta": theta, **copy.deepcopy(scaling)})  # fmt: skip


def same(ours, theirs):
    """Theirs repeats every table for the second half of the head; float32 angles err by 6e-8 of the angle."""
    for mine, other in zip(ours, theirs):
        other = other.squeeze(0)
        half = other.shape[-1] // 2
        assert mine.dtype == torch.float32
        assert torch.equal(other[..., :half], other[..., half:])
        torch.testing.assert_close(mine, other[..., :half].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings(name):
    scaling = SCALINGS[name]
    positions = torch.arange(300)
    theirs = LlamaRotaryEmbedding(llama(scaling))(torch.ones(1), positions[None])
    same(vkernels.rope_tables(positions, 64, theta=500000.0, scaling=scaling), theirs)


@pytest.mark.parametrize("name", [n for n in SCALINGS if n != "default"])
def test_frequencies_of_scalings(name):
    """Read off the angles at position 1, which are below 1: to float32's last digits, also of the slowest pairs."""
    scaling = SCALINGS[name]
    inverse, attention = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](llama(scaling), torch.device("cpu"))
    cos, sin = vkernels.rope_tables(torch.tensor([1]), 64, theta=500000.0, scaling=scaling)
    torch.testing.assert_close(torch.atan2(sin, cos)[0], inverse, rtol=2e-6, atol=0)
    torch.testing.assert_close(torch.hypot(cos, sin)[0], torch.full((32,), float(attention)))


def test_longrope_takes_long_factors_for_long_sequences():
    scaling = SCALINGS["longrope"]
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](llama(scaling), torch.device("cpu"), seq_len=4097)
    cos, sin = vkernels.rope_tables(torch.tensor([1]), 64, theta=500000.0, scaling=scaling, max_seqlen=4097)
    torch.testing.assert_close(torch.atan2(sin, cos)[0], long, rtol=2e-6, atol=0)
    one = torch.tensor([1])
    short = vkernels.rope_tables(one, 64, scaling=scaling, max_seqlen=4096)
    assert torch.equal(short[0], vkernels.rope_tables(one, 64, scaling=scaling)[0])


def test_phi3_names():
    """Phi-3 keeps the original length outside the dictionary; what its config makes of it is what we read."""
    scaling = {k: v for k, v in SCALINGS["longrope"].items() if k not in ("factor", "original_max_position_embeddings")}
    config = Phi3Config(hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, pad_token_id=0,
                        original_max_position_embeddings=4096,
                        rope_parameters={"rope_theta": 10000.0, **scaling})  # fmt: skip
    inverse, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    scaling = {**config.rope_parameters, "factor": 131072 / 4096}
    cos, sin = vkernels.rope_tables(torch.tensor([1]), 64, scaling=scaling)
    torch.testing.assert_close(torch.atan2(sin, cos)[0], inverse, rtol=2e-6, atol=0)
    torch.testing.assert_close(torch.hypot(cos, sin)[0], torch.full((32,), float(attention)))


@pytest.mark.parametrize("sections", [[8, 12, 12], [11, 11, 10], [32, 0, 0]])
@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope(sections, interleaved):
    torch.manual_seed(0)
    positions = torch.randint(200, (3, 40))
    config, module = (
        (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding) if interleaved else (Qwen2VLTextConfig, Qwen2VLRotaryEmbedding)
    )
    config = config(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections})  # fmt: skip
    theirs = module(config)(torch.ones(1), positions[:, None])
    same(vkernels.rope_tables(positions, 64, theta=1e6, sections=sections, interleaved=interleaved), theirs)


def test_equal_axes_are_one():
    positions = torch.arange(40)
    plain = vkernels.rope_tables(positions, 64)
    for interleaved in (False, True):
        dealt = vkernels.rope_tables(positions.expand(3, -1), 64, sections=[11, 11, 10], interleaved=interleaved)
        assert all(torch.equal(a, b) for a, b in zip(plain, dealt))


def test_axes_of_a_vision_tower():
    torch.manual_seed(0)
    positions = torch.randint(64, (2, 50))
    config = Qwen3VLVisionConfig(hidden_size=320, num_heads=4)
    theirs = Qwen3VLVisionRotaryEmbedding(config)(torch.ones(1), positions.T)
    same(vkernels.rope_tables(positions, 80), theirs)


def test_far_positions_are_exact():
    """Past 1e5 and 1e7: as good as cos and sin in float64, which float32 angles are not by far."""
    positions = torch.tensor([100_000, 1_234_567, 50_000_001])
    cos, sin = vkernels.rope_tables(positions, 128)
    for t, p in enumerate(positions.tolist()):
        for i in (0, 1, 17, 63):
            angle = p * 10000.0 ** (-2 * i / 128)
            assert abs(cos[t, i].item() - math.cos(angle)) < 1e-6
            assert abs(sin[t, i].item() - math.sin(angle)) < 1e-6


def test_compiles():
    positions = torch.arange(12).expand(3, -1)

    def tables(positions):
        cos, sin = vkernels.rope_tables(positions, 16, scaling=SCALINGS["llama3"], sections=(2, 3, 3), interleaved=True)
        return cos + sin

    torch.testing.assert_close(torch.compile(tables, fullgraph=True, backend="aot_eager")(positions), tables(positions))
    empty = vkernels.rope_tables(torch.empty(0, dtype=torch.int64), 16)
    assert [t.shape for t in empty] == [(0, 8), (0, 8)]


def test_messages():
    one, three = torch.arange(4), torch.arange(12).view(3, 4)
    for match, positions, kwargs in [
        (r"positions \[1, 3, 4\], expected \[T\] or \[axes, T\]", three[None], {}),
        (r"head_dim 63, expected pairs for each of 1 axes", one, {"head_dim": 63}),
        (r"head_dim 64, expected pairs for each of 3 axes", three, {}),
        (r"sections \[8, 8\] for positions \[3, 4\], expected one per axis, 32 pairs", three, {"sections": [8, 8]}),
        (r"sections \[8, 8, 8\] .* 32 pairs", three, {"sections": [8, 8, 8]}),
        (r"sections \[32\] for positions \[4\]", one, {"sections": [32]}),
        (r"interleaved without sections", one, {"interleaved": True}),
        (r"rope_type 'dynamic', expected one of default, linear, llama3, yarn, longrope", one,
         {"scaling": {"rope_type": "dynamic"}}),
        (r"scaling of rope_type 'llama3' lacks low_freq_factor, high_freq_factor, original", one,
         {"scaling": {"type": "llama3", "factor": 8.0}}),
        (r"longrope has 3 factors, expected 32, one per pair", one,
         {"scaling": {**SCALINGS["longrope"], "short_factor": [1, 2, 3]}}),
        (r"scaling of rope_type 'longrope' lacks factor or attention_factor", one,
         {"scaling": {**SCALINGS["longrope"], "factor": None}}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^rope_tables: {match}"):
            vkernels.rope_tables(positions, **{"head_dim": 64, **kwargs})
