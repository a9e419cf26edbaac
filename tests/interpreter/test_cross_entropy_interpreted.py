"""The Triton pass over the logits, inside the ops over the output head."""

import pytest
import torch

import vkernels
from vkernels import head
from vkernels.check.cross_entropy import CHECKS, draw, grouped, own_class
from vkernels.check.judge import error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_against_float64(check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


def leaves(sizes, T, C):
    inputs, where = draw(sizes, T, C, torch.Generator().manual_seed(0))
    return [x.double().requires_grad_() for x in inputs], where


def of(op, where, **options):
    """The op as a function of (h, *weights)."""
    bases, labels, sizes = where.values()
    return lambda h, *weights: op(h, list(weights), bases, labels, sizes=sizes, **options)


@pytest.mark.parametrize("options", [{}, {"joint": True, "z_loss": 0.3, "label_smoothing": 0.2, "softcap": 2.0}])
@pytest.mark.parametrize("listed", [False, True])
def test_gradients_of_the_loss(options, listed):
    """By recomputing; made in the forward pass; of groups, which are made in it as well."""
    inputs, where = leaves([5, 3], 5, 3)
    rows = grouped(where, block=2) if listed else {"row_class": own_class(where)}
    weight = torch.rand(5)
    loss = of(vkernels.linear_cross_entropy, where, row_weight=weight, **rows, **options)
    assert torch.autograd.gradcheck(lambda *x: loss(*x)[0], inputs, fast_mode=True)


@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_of_log_probabilities(entropy):
    inputs, where = leaves([5, 3], 5, 3)
    classes = {"row_class": torch.where(torch.arange(5) % 2 == 0, -1, own_class(where))}
    logprob = of(vkernels.linear_logprob, where, temperature=0.8, softcap=3.0, entropy=entropy, **classes)
    assert torch.autograd.gradcheck(logprob, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_longer_than_a_step_and_chunks_of_few_rows(dtype, monkeypatch):
    """Gradients overwrite the row they are made from: a later step must not read what an earlier one wrote."""
    inputs, where = draw([2 * 8192 + 5, 3000], 11, 4, torch.Generator().manual_seed(0))
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 10 * 19_408 * 4})
    found = {}
    for backend in ("torch", "triton"):
        x = [t.to(dtype).requires_grad_() for t in inputs]
        with vkernels.force("linear_cross_entropy", backend):
            total, *_ = of(vkernels.linear_cross_entropy, where, joint=True)(*x)
            found[backend] = [total, *torch.autograd.grad(total, x)]
    for mine, theirs in zip(found["triton"], found["torch"]):
        assert error(mine, theirs) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_dead_rows_add_nothing():
    """Rows of weight 0 and rows without a label, whatever they hold."""
    inputs, where = draw([20], 8, 4, torch.Generator().manual_seed(0))
    weight = torch.ones(8)
    weight[2] = 0
    inputs[0][[1, 2]] = float("inf")
    h, w = (x.requires_grad_() for x in inputs)
    total, count, metrics = of(vkernels.linear_cross_entropy, where, row_weight=weight, metrics=True)(h, w)
    total.sum().backward()
    assert count.tolist() == metrics.scored.tolist() == [5]
    assert all(x.isfinite().all() for x in (total, h.grad, w.grad))
    assert (h.grad[[1, 2, 5]] == 0).all()
