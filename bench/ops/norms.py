"""Norms, gated activations and rotary positions: bound by bytes, all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import Cost, Judged, On, Problem, case, compiled, eager

import vkernels
from vkernels import oracle

ROWS = 64  # that are judged against float64
EPS = 1e-6
HEADS = {"T": 32768, "Hq": 16, "Hk": 8, "D": 128}
TOY_HEADS = {"T": 2048, "Hq": 4, "Hk": 2, "D": 64}


def passes(elements: int, on: On, forward: int, backward: int) -> dict[str, Cost]:
    """Costs of an op that touches so many tensors of `elements` elements in each pass."""
    size = elements * on.dtype.itemsize
    return {"forward": Cost(0.0, forward * size), "backward": Cost(0.0, backward * size)}


def liger(name: str, *last: Any, **options: Any) -> Callable:
    """An op of Liger's, with these arguments after the tensors."""

    def build() -> Callable:
        from liger_kernel.transformers import functional

        function = getattr(functional, name)
        return lambda *tensors: function(*tensors, *last, **options)

    return build


def plain_rms_norm(x, w):
    return F.rms_norm(x, w.shape, w, EPS)


@case("rms_norm", value=60, full={"T": 32768, "C": 2048}, small={"T": 4096, "C": 512})
@case("rms_norm", value=12, full={"T": 8192, "C": 8192}, small={"T": 512, "C": 4096})
@case("rms_norm", value=11, full={"T": 524288, "C": 128}, small={"T": 32768, "C": 64})
def rms_norm(on: On, T: int, C: int) -> Problem:
    x, w = on.randn(T, C), on.randn(C)
    # in_place would overwrite the gradient that all share
    peers = {
        "torch eager": eager(plain_rms_norm), "torch.compile": compiled(plain_rms_norm),
        "Liger": liger("liger_rms_norm", EPS, in_place=False),
    }  # fmt: skip
    judged = Judged(oracle.rms_norm, [x[:ROWS], w], ROWS)
    return Problem([x, w], vkernels.rms_norm, peers, judged=judged, **passes(T * C, on, 2, 3))


@case("add_rms_norm", value=61, full={"T": 32768, "C": 2048}, small={"T": 4096, "C": 512})
def add_rms_norm(on: On, T: int, C: int) -> Problem:
    def plain(x, residual, w):
        stream = x + residual
        return plain_rms_norm(stream, w), stream

    x, residual, w = on.randn(T, C), on.randn(T, C), on.randn(C)
    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain),
             "Liger": liger("liger_fused_add_rms_norm", EPS, in_place=False)}  # fmt: skip
    judged = Judged(lambda x, r, w: (oracle.rms_norm(x + r, w), x + r), [x[:ROWS], residual[:ROWS], w], ROWS)
    return Problem([x, residual, w], vkernels.add_rms_norm, peers, judged=judged, **passes(T * C, on, 4, 4))


@case("layer_norm", value=14, full={"T": 32768, "C": 1024}, small={"T": 4096, "C": 512})
def layer_norm(on: On, T: int, C: int) -> Problem:
    def plain(x, w, b):
        return F.layer_norm(x, w.shape, w, b, 1e-5)

    x, w, b = on.randn(T, C), on.randn(C), on.randn(C)
    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain), "Liger": liger("liger_layer_norm", 1e-5)}
    return Problem(
        [x, w, b], vkernels.layer_norm, peers, judged=Judged(plain, [x[:ROWS], w, b], ROWS), **passes(T * C, on, 2, 3)
    )


def gated(on: On, T: int, ffn: int, ours, plain, fused: str) -> Problem:
    gate, up = on.randn(T, ffn), on.randn(T, ffn)
    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain), "Liger": liger(fused)}
    judged = Judged(plain, [gate[:ROWS], up[:ROWS]], ROWS)
    return Problem([gate, up], ours, peers, judged=judged, **passes(T * ffn, on, 3, 5))


@case("swiglu", value=58, full={"T": 32768, "ffn": 6144}, small={"T": 2048, "ffn": 1536})
def swiglu(on: On, T: int, ffn: int) -> Problem:
    return gated(on, T, ffn, vkernels.swiglu, lambda gate, up: F.silu(gate) * up, "liger_swiglu")


@case("geglu", value=13, full={"T": 32768, "ffn": 6144}, small={"T": 2048, "ffn": 1536})
def geglu(on: On, T: int, ffn: int) -> Problem:
    def plain(gate, up):
        return F.gelu(gate, approximate="tanh") * up

    return gated(on, T, ffn, lambda g, u: vkernels.geglu(g, u, approximate="tanh"), plain, "liger_geglu")


@case("quick_gelu", value=8, full={"T": 32768, "ffn": 4096}, small={"T": 2048, "ffn": 1024})
def quick_gelu(on: On, T: int, ffn: int) -> Problem:
    def plain(x):
        return x * torch.sigmoid(1.702 * x)

    x = on.randn(T, ffn)
    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain)}
    return Problem([x], vkernels.quick_gelu, peers, judged=Judged(plain, [x[:ROWS]], ROWS), **passes(T * ffn, on, 2, 3))


def angles(on: On, T: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin float32[T, half] of documents of 2048 tokens."""
    position = (torch.arange(T, device=on.device) % 2048).double()[:, None]
    theta = position * 1e6 ** -(torch.arange(half, device=on.device).double() / half)
    return theta.cos().float(), theta.sin().float()


def rotate(x, cos, sin):
    """Hugging Face's way, on x[T, H, D]."""
    cos, sin = (torch.cat([t, t], -1).unsqueeze(1).to(x.dtype) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def liger_rope(cos, sin):
    """Liger takes [1, H, T, D] and cos of both halves."""

    def build():
        function = liger("liger_rope")()
        c, s = (torch.cat([t, t], -1)[None] for t in (cos, sin))

        def call(q, k):
            turned = function(q.transpose(0, 1)[None], k.transpose(0, 1)[None], c.to(q.dtype), s.to(q.dtype))
            return tuple(x[0].transpose(0, 1) for x in turned)

        return call

    return build


@case("rope", value=40, full=HEADS, small=TOY_HEADS)
def rope(on: On, T: int, Hq: int, Hk: int, D: int) -> Problem:
    cos, sin = angles(on, T, D // 2)
    q, k = on.randn(T, Hq, D), on.randn(T, Hk, D)

    def plain(q, k):
        return rotate(q, cos, sin), rotate(k, cos, sin)

    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain), "Liger": liger_rope(cos, sin)}
    judged = Judged(lambda q, k: oracle.rope(q, k, cos[:ROWS], sin[:ROWS]), [q[:ROWS], k[:ROWS]], ROWS)

    def ours(q, k):
        return vkernels.rope(q, k, cos, sin)

    return Problem([q, k], ours, peers, judged=judged, **passes(T * (Hq + Hk) * D, on, 2, 2))


@case("qk_norm_rope", value=62, full=HEADS, small=TOY_HEADS)
def qk_norm_rope(on: On, T: int, Hq: int, Hk: int, D: int) -> Problem:
    cos, sin = angles(on, T, D // 2)
    leaves = q, k, wq, wk = on.randn(T, Hq, D), on.randn(T, Hk, D), on.randn(D), on.randn(D)

    def plain(q, k, wq, wk):
        return rotate(plain_rms_norm(q, wq), cos, sin), rotate(plain_rms_norm(k, wk), cos, sin)

    def fused():
        norm, turn = liger("liger_rms_norm", EPS, in_place=False)(), liger_rope(cos, sin)()
        return lambda q, k, wq, wk: turn(norm(q, wq), norm(k, wk))

    def truth(q, k, wq, wk):
        return oracle.rope(oracle.rms_norm(q, wq), oracle.rms_norm(k, wk), cos[:ROWS], sin[:ROWS])

    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain), "Liger": fused}
    judged = Judged(truth, [q[:ROWS], k[:ROWS], wq, wk], ROWS)

    def ours(q, k, wq, wk):
        return vkernels.qk_norm_rope(q, k, wq, wk, cos, sin)

    return Problem(list(leaves), ours, peers, judged=judged, **passes(T * (Hq + Hk) * D, on, 2, 3))
