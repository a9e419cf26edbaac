"""The Triton kernels of packed attention on drawn documents, masks, heads and head sizes, against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vkernels
from vkernels import oracle
from vkernels.check.attention import lengths_to_cu
from vkernels.check.judge import poisoned

LENGTHS = st.sampled_from([0, 1, 2, 31, 63, 64, 65, 127, 128, 129, 150])


@st.composite
def calls(draw):
    """-> (shapes of q and k, arguments of varlen_attention, whether it gets a list made on the host, a seed)."""
    of_q = draw(st.lists(LENGTHS, min_size=1, max_size=3).filter(lambda n: sum(n) <= 260))
    same = draw(st.booleans())
    of_k = of_q if same else [draw(st.sampled_from([n, n + 3, n // 2, 0, 130])) for n in of_q]
    Tq, Tk, Hk = sum(of_q), sum(of_k), draw(st.integers(1, 2))
    shapes = (Tq, Hk * draw(st.integers(1, 3)), draw(st.sampled_from([1, 8, 20, 64, 80]))), (Tk, Hk)
    seed = draw(st.integers(0, 2**31))
    g, rows = torch.Generator().manual_seed(seed), torch.arange(Tq, dtype=torch.int32)
    anything = [torch.randint(-5, Tk + 5, (Tq,), generator=g, dtype=torch.int32) for _ in range(2)]
    width, block = draw(st.integers(1, 140)), draw(st.integers(1, 100))
    kv_lo = draw(st.sampled_from([None, rows - width, anything[0]]))
    kv_hi = draw(st.sampled_from([None, (rows // block + 1) * block, rows - width, anything[1]]))
    scale = draw(st.sampled_from([None, 0.05, 1.0]))
    cu = lengths_to_cu(of_q), None if same else lengths_to_cu(of_k)
    return shapes, cu, {"kv_lo": kv_lo, "kv_hi": kv_hi, "scale": scale}, draw(st.booleans()), seed


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(calls())
def test_any_call_gives_what_float64_gives(call):
    ((Tq, Hq, D), (Tk, Hk)), cu, options, listed, seed = call
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=g) for shape in ((Tq, Hq, D), (Tk, Hk, D), (Tk, Hk, D), (Tq, Hq, D))]
    masks = {name: options[name] for name in ("kv_lo", "kv_hi")}
    tiles = vkernels.attention_tiles(*cu, **masks) if listed else None

    def run(attend, dtype):
        *leaves, do = (x.to(dtype) for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = attend(*leaves)
        return out, lse, *torch.autograd.grad(out, leaves, do, allow_unused=True, materialize_grads=True)

    truth = run(lambda *x: oracle.varlen_attention(*x, *cu, **options), torch.float64)
    with poisoned():
        ours = run(
            lambda *x: vkernels.varlen_attention(*x, *cu, **options, tiles=tiles, return_lse=True), torch.float32
        )
    for mine, true in zip(ours, truth):  # gradients cancel to nothing where a row has one key
        torch.testing.assert_close(mine, true.float(), rtol=1e-4, atol=1e-4)
