"""The Triton kernels of the optimizer."""

import pytest
import torch

import vkernels
from vkernels.check.adamw import CHECKS

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


def lists_of(shapes, moments, grads=torch.float32):
    g = torch.Generator().manual_seed(0)
    kinds = torch.float32, grads, moments, moments
    return [[torch.randn(s, generator=g).abs().to(kind) for s in shapes] for kind in kinds]


@pytest.mark.parametrize("seed", [(7 << 40) + 3, -5, (1 << 63) + 9])
def test_stochastic_rounding_has_the_bits_of_plain_torch(seed):
    results = []
    for name in ("triton", "torch"):
        lists = lists_of([(4099,), (0,), (33, 5)], torch.bfloat16)
        for g in lists[1]:
            g.zero_()
        with vkernels.force("adamw_step", name):
            vkernels.adamw_step(*lists, step=(1 << 31) + 5, lr=0.0, seed=seed)
        results.append([*lists[2], *lists[3]])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kept", [torch.tensor(False), torch.tensor(0.0), torch.tensor(1.0)])
def test_kept_and_zeroed(kept):
    """As plain torch does, with gradients at odd addresses that move between the steps."""
    results = []
    for name in ("triton", "torch"):
        lists = lists_of([(4096,), (19,)], torch.float32, torch.bfloat16)
        step = torch.tensor([2])
        with vkernels.force("adamw_step", name):
            for _ in range(2):
                flat = torch.cat([torch.ones(1).bfloat16(), *lists[1]])
                grads = [flat[1:4097], flat[4097:]]
                vkernels.adamw_step(lists[0], grads, *lists[2:], step=step, lr=0.1, kept=kept, zero_grads=True)
                assert not flat[1:].any()
        results.append([*lists[0], *lists[2], *lists[3], step])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert step == (4 if kept else 2)


def test_float64():
    """The kernel's own arithmetic: beside float64 it errs by rounding of float64."""
    lists = [[x.double() for x in tensors] for tensors in lists_of([(70,)], torch.float32)]
    theirs = torch.nn.Parameter(lists[0][0].clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.1)
    theirs.grad = lists[1][0].clone()
    for moment in (*lists[2], *lists[3]):
        moment.zero_()
    optimizer.step()
    vkernels.adamw_step(*lists, step=0, lr=0.1)
    torch.testing.assert_close(lists[0][0], theirs.detach(), rtol=1e-13, atol=1e-13)
