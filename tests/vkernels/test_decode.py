"""decode_attention against float64 and eager torch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vkernels
from vkernels import decode, oracle
from vkernels.check.decode import CHECKS

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: c.name)
def test_against_float64(backend, check, dtype):
    for finding in check.run(CPU, dtype):
        assert finding.fine, finding


def problem(B=3, Hq=4, Hk=2, D=8, L=20, dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, Hq, D), torch.randn(B, Hk, D), torch.randn(B, Hk, D)
    return [x.to(dtype) for x in (q, k, v, torch.randn(B, L, Hk, D), torch.randn(B, L, Hk, D))]


@pytest.mark.parametrize("outside", [torch.nan, torch.inf, 1e30])
def test_columns_outside_do_not_matter_and_stay(backend, outside):
    q, k, v, *caches = problem()
    length, start = torch.tensor([7, 19, 7], dtype=torch.int32), torch.tensor([2, 0, 7], dtype=torch.int32)
    for cache in caches:
        for b in range(3):
            cache[b, : start[b]] = cache[b, length[b] :] = outside
    expected, *new = oracle.decode_attention(q, k, v, *caches, length, start)
    found = vkernels.decode_attention(q, k, v, *caches, length, start=start)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    for cache, other in zip(caches, new):
        torch.testing.assert_close(cache.double(), other, atol=0, rtol=0, equal_nan=True)


def test_steps_make_causal_attention(backend):
    torch.manual_seed(1)
    T, B = 6, 2
    q, k, v = torch.randn(B, T, 4, 8), torch.randn(B, T, 2, 8), torch.randn(B, T, 2, 8)
    caches = torch.full((B, T, 2, 8), torch.nan), torch.full((B, T, 2, 8), torch.nan)
    length = torch.zeros((), dtype=torch.int64)
    rows = []
    for t in range(T):
        rows.append(vkernels.decode_attention(q[:, t], k[:, t], v[:, t], *caches, length))
        length += 1
    cu = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    expected = vkernels.varlen_attention(*(x.flatten(0, 1) for x in (q, k, v)), cu, max_seqlen_q=T)
    torch.testing.assert_close(torch.stack(rows, 1).flatten(0, 1), expected, atol=1e-6, rtol=1e-5)


def test_scale_and_slices_of_merged_tensors(backend):
    torch.manual_seed(0)
    q, k, v = (x.unflatten(1, (-1, 8)) for x in torch.randn(3, 8 * 8).split([32, 16, 16], dim=1))
    caches = torch.randn(3, 11, 2, 2, 8).unbind(2)
    length = torch.tensor(9)
    expected, *_ = oracle.decode_attention(q, k, v, *caches, length, scale=0.3)
    found = vkernels.decode_attention(q, k, v, *caches, length, scale=0.3)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_torch_backend_waits_for_nothing():
    with FakeTensorMode():  # reading a value raises
        q, k, v, *caches = problem()
        length, start = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        assert decode._forward(q, k, v, *caches, length, start, 1.0).shape == (3, 4, 8)


def test_compiles_and_checks():
    q, k, v, *caches = problem()
    length, start = torch.tensor([3, 19, 8]), torch.tensor([1, 4, 0])
    torch.library.opcheck(torch.ops.vkernels.decode_attention.default, (q, k, v, *caches, length, start, 0.5))
    torch._dynamo.reset()
    ours, theirs = [c.clone() for c in caches], [c.clone() for c in caches]
    compiled = torch.compile(vkernels.decode_attention, fullgraph=True, backend="aot_eager")
    found = compiled(q, k, v, *ours, length, start=start)
    torch.testing.assert_close(found, vkernels.decode_attention(q, k, v, *theirs, length, start=start), atol=0, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("at", [20, -1])
def test_a_column_outside_the_cache_is_named(at):
    q, k, v, *caches = problem()
    with pytest.raises(ValueError, match=rf"decode_attention: row 1 .* length {at}; expected 0 <= start <= .* < 20"):
        vkernels.decode_attention(q, k, v, *caches, torch.tensor([0, at, 0]))
    with pytest.raises(ValueError, match="row 0 starts at 5 and has length 4"):
        vkernels.decode_attention(q, k, v, *caches, torch.tensor(4), start=torch.tensor([5, 0, 0]))


def test_bad_operands_are_named():
    q, k, v, *caches = problem()
    length = torch.tensor(3)
    for wrong, word in [
        ((q[0], k, v, *caches, length), r"expected q\[B, Hq, D\]"),
        ((q[:2], k, v, *caches, length), "do not fit"),
        ((q[:, :3], k, v, *caches, length), "Hk dividing Hq"),
        ((q, k[:, :1], v, *caches, length), "do not fit"),
        ((q.double(), k, v, *caches, length), "expected one for all"),
        ((q, k, v, caches[0].mT.contiguous().mT, caches[1], length), "expected a last one of 1"),
        ((q, k, v, *caches, torch.zeros(2, dtype=torch.int32)), r"length is torch.int32 \(2,\)"),
        ((q, k, v, *caches, length.to("meta")), "operands on .*'cpu', 'meta'"),
        ((q, k, v, *caches, torch.zeros(3)), "length is torch.float32"),
        ((q.requires_grad_(), k, v, *caches, length), "no gradient"),
    ]:
        with pytest.raises(ValueError, match=f"decode_attention: .*{word}"):
            vkernels.decode_attention(*wrong)
