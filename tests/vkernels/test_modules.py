"""vkernels.modules beside their counterparts in torch."""

import pytest
import torch
from torch import nn

from vkernels.modules import LayerNorm, LinearCrossEntropy, RMSNorm, SwiGLU


@pytest.mark.parametrize("pair", [(RMSNorm(24, 1e-5), nn.RMSNorm(24, 1e-5)), (LayerNorm(24), nn.LayerNorm(24))])
def test_norms(pair):
    ours, theirs = pair
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    assert "24, eps=1e-05" in repr(ours)


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu(bias):
    mlp = SwiGLU(8, 20, bias)
    x = torch.randn(2, 3, 8)
    expected = mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)
    mlp(x).sum().backward()
    assert all(p.grad is not None for p in mlp.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_linear_cross_entropy(reduction, ignore_index):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (2, 7))
    labels[0, :3] = ignore_index
    ours = LinearCrossEntropy(ignore_index, reduction, label_smoothing=0.1)(hidden, weight, labels)
    theirs = nn.CrossEntropyLoss(ignore_index=ignore_index, reduction=reduction, label_smoothing=0.1)(
        (hidden @ weight.T).flatten(0, 1), labels.flatten()
    )
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    nothing = LinearCrossEntropy(ignore_index)(hidden, weight, torch.full((2, 7), ignore_index))
    assert nothing.isnan()  # as torch's mean over nothing


def test_autocast_and_dtypes():
    hidden, weight, labels = torch.randn(6, 8), torch.randn(11, 8), torch.randint(11, (6,))
    exact = LinearCrossEntropy()(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LinearCrossEntropy()(hidden, weight, labels)
    assert loss.dtype == torch.float32
    assert not torch.equal(loss, exact)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(LinearCrossEntropy()(hidden.bfloat16(), weight, labels), exact, rtol=2e-2, atol=2e-2)


def test_errors():
    with pytest.raises(ValueError, match=r"reduction is 'none', expected 'mean' or 'sum'"):
        LinearCrossEntropy(reduction="none")
