"""Library backends of packed attention: what they are asked for, and that calls fit the libraries' signatures."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from op_check import error

import vkernels
from vkernels import attention_facades as facades
from vkernels import oracle, registry

NAMES = ("cpu", "flash", "triton", "torch", "cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4")
PLAIN = {"head_dim": 64, "mask": "causal", "dtype": "bfloat16", "gqa": True, "same": True, "empty": False}


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.fixture
def hopper(monkeypatch):
    """A device that looks like a GPU to whoever asks for its capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "_chosen", {})
    return torch.device("cuda")


def test_names():
    assert vkernels.backends("varlen_attention") == NAMES


@pytest.mark.parametrize(
    ("differs", "chosen"),
    [
        ({}, "flash"),
        ({"same": False}, "flash"),
        ({"dtype": "float32"}, "triton"),
        ({"mask": "interval"}, "triton"),
        ({"head_dim": 20}, "triton"),
        ({"empty": True}, "triton"),
        ({"head_dim": 512}, "torch"),
        ({"head_dim": 256, "dtype": "float32"}, "torch"),
        ({"dtype": "float64"}, "torch"),
    ],
)
def test_choice_on_a_gpu_before_any_measurement(hopper, differs, chosen):
    backend = registry.select("varlen_attention", hopper, {**PLAIN, **differs})
    assert backend == registry._table["varlen_attention"][chosen]


@pytest.mark.parametrize(
    ("name", "differs", "reason"),
    [
        ("flash", {"mask": "interval"}, "causal documents only"),
        ("flash", {"head_dim": 264}, "up to 256 in steps of 8"),
        ("cudnn", {"same": False}, "as many keys as queries"),
        ("cudnn", {"head_dim": 192}, "up to 128"),
        ("flash_attn_4", {}, "flash_attn.cute.interface cannot be imported"),
        ("triton", {"head_dim": 257}, "up to 256"),
    ],
)
def test_a_forced_backend_says_why_not(hopper, monkeypatch, name, differs, reason):
    monkeypatch.setattr(facades, "_module", lambda name: None)
    with vkernels.force("varlen_attention", name), pytest.raises(ValueError, match=reason):
        registry.select("varlen_attention", hopper, {**PLAIN, **differs})


def test_an_older_gpu_and_the_cpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "needs compute capability 8.0" in facades.on_ampere(torch.device("cuda"))
    assert "runs on GPUs only" in facades.on_ampere(torch.device("cpu"))


def operands(D=16):
    q, k, v = (torch.randn(7, H, D, dtype=torch.bfloat16, device="meta") for H in (4, 2, 2))
    c = cu(4, 3).to("meta")
    return (q, k, v), (c, c, 4, 4, None, None, 0.25, None)


def promised(out, lse, grads, qkv):
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (qkv[0].shape, qkv[0].dtype, (4, 7), torch.float32)
    assert lse.is_contiguous()
    assert [g.shape for g in grads] == [x.shape for x in qkv]


def test_flash_operators_fit_the_fake_shapes():
    qkv, rest = operands()
    out, lse = facades.flash_forward(*qkv, *rest)
    promised(out, lse, facades.flash_backward(out, *qkv, out, lse, *rest), qkv)


KINDS = {"Tensor": torch.Tensor, "int": int, "float": float, "bool": bool}


def bound(schema, args, kwargs):
    """The arguments by name; TypeError where number, name or type does not fit."""
    plain = [a for a in schema.arguments if not a.kwarg_only]
    assert len(args) <= len(plain)
    named = dict(zip([a.name for a in plain], args)) | kwargs
    for argument in schema.arguments:
        if argument.name not in named:
            assert argument.has_default_value(), argument.name
            continue
        kind, value = str(argument.type).removeprefix("Optional[").removesuffix("]"), named[argument.name]
        optional = str(argument.type).startswith("Optional")
        assert isinstance(value, KINDS[kind]) or (optional and value is None), (argument.name, kind, value)
    assert set(named) <= {a.name for a in schema.arguments}
    return named


def test_cudnn_is_called_as_its_schema_says(monkeypatch):
    schema = torch.ops.aten._cudnn_attention_forward.default._schema
    seen = {}

    def recorded(*args, **kwargs):
        seen.update(bound(schema, args, kwargs))
        out = torch.empty_like(args[0])
        return out, out.new_empty((7, 4, 1), dtype=torch.float32), None, None, 4, 4, None, None, None

    monkeypatch.setattr(facades.torch.ops.aten, "_cudnn_attention_forward", recorded)
    qkv, rest = operands()
    promised(*facades.cudnn_forward(*qkv, *rest), qkv, qkv)
    assert [seen[n] for n in ("is_causal", "compute_log_sumexp", "dropout_p", "scale", "max_q")] == [
        True,
        True,
        0,
        0.25,
        4,
    ]
    assert seen["attn_bias"] is None
    assert facades.CUDNN.backward is facades.TRITON.backward


# The parameters of the packages' functions, in order; what stands after = has a default.
FLASH_2_FORWARD = """
    q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal = window_size_left
    window_size_right softcap alibi_slopes return_softmax block_table leftpad_k seqused_k
"""
FLASH_2_BACKWARD = """
    dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale
    causal window_size_left window_size_right softcap alibi_slopes deterministic = rng_state
"""
FLASH_3_FORWARD = """
    q k v = k_new v_new qv out_ cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k
    page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale softmax_scale
    causal window_size_left window_size_right attention_chunk softcap rotary_interleaved scheduler_metadata num_splits
    pack_gqa sm_margin
"""
FLASH_3_BACKWARD = """
    dout q k v out softmax_lse = cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv
    softmax_scale causal window_size_left window_size_right softcap deterministic sm_margin
"""
FLASH_4_FORWARD = """
    q k v = qv cu_seqlens_q cu_seqlens_k seqused_q seqused_k max_seqlen_q max_seqlen_k min_seqlen_k page_table
    softmax_scale causal softcap window_size_left window_size_right learnable_sink return_lse out lse
"""
FLASH_4_BACKWARD = """
    q k v out dout lse = softmax_scale causal softcap window_size_left window_size_right cu_seqlens_q cu_seqlens_k
    seqused_q seqused_k max_seqlen_q max_seqlen_k deterministic dq dk dv
"""


def signature(text):
    needed, optional = (part.split() for part in text.split("="))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind) for n in needed]
    return inspect.Signature(parameters + [inspect.Parameter(n, kind, default=None) for n in optional])


@pytest.mark.parametrize(
    ("version", "names", "texts"),
    [
        (2, ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"), (FLASH_2_FORWARD, FLASH_2_BACKWARD)),
        (3, ("_flash_attn_forward", "_flash_attn_backward"), (FLASH_3_FORWARD, FLASH_3_BACKWARD)),
        (4, ("_flash_attn_fwd", "_flash_attn_bwd"), (FLASH_4_FORWARD, FLASH_4_BACKWARD)),
    ],
)
def test_packages_are_called_as_their_signatures_say(monkeypatch, version, names, texts):
    seen = {}

    def recorder(text, results):
        def call(*args, **kwargs):
            seen.update(signature(text).bind(*args, **kwargs).arguments)
            return results()

        return call

    qkv, rest = operands()
    lse = torch.empty(4, 7, device="meta")
    forward = recorder(texts[0], lambda: (torch.empty_like(qkv[0]), lse, None, None))
    backward = recorder(texts[1], lambda: tuple(map(torch.empty_like, qkv)))
    package = SimpleNamespace(**dict(zip(names, (forward, backward))))
    monkeypatch.setattr(facades, "_module", lambda name: package)
    out, got = getattr(facades, f"flash{version}_forward")(*qkv, *rest)
    assert (seen["causal"], seen["softmax_scale"], seen["max_seqlen_q"], seen["max_seqlen_k"]) == (True, 0.25, 4, 4)
    assert seen["cu_seqlens_q"] is rest[0]
    seen.clear()
    grads = getattr(facades, f"flash{version}_backward")(out, *qkv, out, got, *rest)
    promised(out, got, grads, qkv)
    assert (seen["causal"], seen["softmax_scale"], seen["deterministic"]) == (True, 0.25, False)
    assert seen["dout"] is out
    assert seen["q"] is qkv[0]
    assert seen["v"] is qkv[2]


def test_rows_without_keys_have_our_sign(monkeypatch):
    lse = torch.tensor([[0.5, math.inf, -math.inf]])
    package = SimpleNamespace(_flash_attn_varlen_forward=lambda *args: (torch.zeros(3, 1, 8), lse, None, None))
    monkeypatch.setattr(facades, "_module", lambda name: package)
    q = torch.zeros(3, 1, 8)
    _, got = facades.flash2_forward(q, q, q, cu(3), cu(3), 3, 3, None, None, 1.0, None)
    assert got.tolist() == [[0.5, -math.inf, -math.inf]]


def views():
    """bf16 [5, 2, 8] that begin at 2 bytes, with rows 34 bytes apart, with elements apart, and all at one place."""
    flat = torch.randn(400).bfloat16()
    yield flat[1:81].view(5, 2, 8)
    yield flat[:85].view(5, 17)[:, :16].unflatten(1, (2, 8))
    yield flat[:160].view(5, 2, 16)[..., ::2]
    yield flat[:1].view(1, 1, 1).expand(5, 2, 8)


def test_libraries_get_rows_that_begin_at_16_bytes(monkeypatch):
    """They load 16 bytes at a time: elsewhere that is an error which takes the process' GPU context with it."""
    seen = []

    def forward(q, k, v, *rest):
        seen.extend((q, k, v))
        return torch.zeros(5, 2, 8), torch.zeros(2, 5), None, None

    package = SimpleNamespace(_flash_attn_varlen_forward=forward)
    monkeypatch.setattr(facades, "_module", lambda name: package)
    fine = torch.randn(5, 4, 8).bfloat16()[:, :2]
    for x in views():
        facades.flash2_forward(fine, x, x, cu(5), cu(5), 5, 5, None, None, 1.0, None)
        got = seen[-3:]
        assert got[0] is fine
        assert torch.equal(got[1], x)
        assert all(n * 2 % 16 == 0 for n in (got[1].data_ptr() // 2, *got[1].stride()[:2]))
        assert got[1].stride(2) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("of_k", [(7, 1, 130), (9, 3, 150), (5, 1, 60)])
def test_flash_on_a_gpu(of_k):
    torch.manual_seed(0)
    c_q, c_k = cu(7, 1, 130), cu(*of_k)
    q, k, v = (x.bfloat16() for x in operands(int(c_q[-1]), int(c_k[-1]), 4, 2, 64))
    true_o, true_lse = oracle.varlen_attention(q, k, v, c_q, c_k)
    q, k, v = (x.cuda().requires_grad_() for x in (q, k, v))
    o, lse = vkernels.varlen_attention(q, k, v, c_q.cuda(), c_k.cuda(), 130, max(of_k), return_lse=True)
    assert error(o.cpu(), true_o) < 4e-3
    torch.testing.assert_close(lse.cpu(), true_lse.float(), rtol=1e-3, atol=1e-3)
    grads = torch.autograd.grad(o, (q, k, v), o.detach())
    wide = [x.detach().float().cpu().requires_grad_() for x in (q, k, v)]
    expected = vkernels.varlen_attention(*wide, c_q, c_k)
    for a, b in zip(grads, torch.autograd.grad(expected, wide, o.detach().float().cpu())):
        assert error(a.cpu(), b) < 1e-2
