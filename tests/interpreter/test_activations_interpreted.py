"""The Triton kernels of the activations."""

import functools

import pytest
import torch

import vkernels
from vkernels.check.activations import CHECKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


@pytest.mark.parametrize("op", [vkernels.swiglu, vkernels.geglu, functools.partial(vkernels.geglu, approximate="tanh")])
def test_gradients_of_gated(op):
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(op, (gate, up), fast_mode=True)
    assert torch.autograd.gradcheck(op, gate, fast_mode=True)


def test_gradients_of_quick_gelu():
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(vkernels.quick_gelu, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("op", ["swiglu", "geglu", "quick_gelu"])
def test_extreme_gates_stay_finite(op):
    gate = torch.tensor([-1e15, -1e4, -100.0, -88.5, 0.0, 88.5, 1e4, 1e15], requires_grad=True)
    y = vkernels.quick_gelu(gate) if op == "quick_gelu" else getattr(vkernels, op)(gate, torch.ones(8))
    y.sum().backward()
    torch.testing.assert_close(y.detach(), gate.detach().relu(), atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(gate.grad, gate.detach().heaviside(torch.tensor(0.5)), atol=1e-30, rtol=1e-6)
