"""Gradients of the touched rows of a table, and lazy AdamW of those rows."""

import pytest
import torch

import vkernels
from vkernels.check.touched import CHECKS


@pytest.mark.parametrize(
    ("check", "dtype"),
    [pytest.param(c, d, id=f"{c.op}-{c.name}-{d}") for c in CHECKS if c.small for d in c.dtypes],
)
def test_against_float64(check, dtype):
    for finding in check.run(torch.device("cpu"), dtype):
        assert finding.fine, finding


def test_rows_that_every_step_touches_follow_adamw():
    """Also in a model: the table is not differentiated, its output is a leaf."""
    torch.manual_seed(0)
    target = torch.randn(12, 4)
    eager = torch.randn(6, 4, requires_grad=True)
    lazy, m, v = eager.detach().clone(), torch.zeros(6, 4), torch.zeros(6, 4)
    optimizer = torch.optim.AdamW([eager], lr=0.1, weight_decay=0.1)
    ids = torch.arange(12) % 5 + 100  # row 5 is never touched
    for step in range(20):
        optimizer.zero_grad()
        (torch.nn.functional.embedding(ids - 100, eager) - target).square().sum().backward()
        optimizer.step()
        x = vkernels.embed(ids, [lazy], [100], sizes=[6]).requires_grad_()
        (x - target).square().sum().backward()
        touched = vkernels.embed_touched(x.grad, ids, 100, 6)
        vkernels.lazy_adamw_rows(lazy, m, v, touched, step=torch.tensor(step), lr=torch.tensor(0.1), weight_decay=0.1)
    torch.testing.assert_close(lazy[:5], eager[:5].detach(), rtol=1e-5, atol=1e-6)
    assert (m[5] == 0).all()
    assert not torch.equal(lazy[5], eager[5].detach())  # AdamW shrinks it, lazy Adam does not


def test_a_row_that_rests_keeps_its_moments():
    table, m, v = torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)
    for step, row in enumerate([0, 1, 1, 1]):
        touched = vkernels.embed_touched(torch.ones(1, 2), torch.tensor([row]), 0, 3)
        vkernels.lazy_adamw_rows(table, m, v, touched, step=step, lr=0.1, betas=(0.5, 0.5))
        if step == 0:
            rested = [x[0].clone() for x in (table, m, v)]
    assert all(torch.equal(x[0], y) for x, y in zip((table, m, v), rested))
    assert m[1].tolist() == [0.875, 0.875]


def test_grads_are_those_of_embed():
    g = torch.Generator().manual_seed(0)
    ids, dy = torch.randint(-1, 30, (200,), generator=g), torch.randn(200, 5, generator=g)
    table = torch.zeros(30, 5, requires_grad=True)
    vkernels.embed(ids, [table], [0], sizes=[30]).backward(dy)
    rows, grads, count = vkernels.embed_touched(dy, ids, 0, 30, order=vkernels.embed_order(ids, [0], [30]))
    n = int(count)
    assert torch.equal(rows[:n], ids[ids >= 0].unique().int())
    torch.testing.assert_close(grads[:n], table.grad[rows[:n]])


def test_checks():
    ids, dy = torch.tensor([3, -1, 5, 3]), torch.randn(4, 2)
    order = vkernels.embed_order(ids, [0], [9])
    torch.library.opcheck(torch.ops.vkernels.embed_touched.default, (dy, ids, 0, 9, *order))
    touched, state = vkernels.embed_touched(dy, ids, 0, 9), [torch.rand(9, 2) for _ in range(3)]
    args = (*state, *touched, torch.ones(4), 0.9, 0.99, 1e-8, 0.1)
    torch.library.opcheck(torch.ops.vkernels.lazy_adamw_rows.default, args)


def update(param, columns):
    touched = vkernels.embed_touched(torch.ones(1, columns), torch.tensor([0]), 0, 2)
    vkernels.lazy_adamw_rows(param, torch.zeros(2, 2), torch.zeros(2, 2), touched, step=0, lr=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: update(torch.zeros(2, 2).bfloat16(), 2), "param is torch.bfloat16"),
        (lambda: update(torch.zeros(3, 2), 2), r"exp_avg is .*expected contiguous float32 \[3, 2\]"),
        (lambda: update(torch.zeros(2, 2), 3), r"grads are \[1, 3\]"),
        (lambda: vkernels.embed_touched(torch.ones(2, 2), torch.tensor([0]), 0, 2), r"dy is \[2, 2\]"),
        (
            lambda: vkernels.embed_touched(
                torch.ones(1, 2), torch.tensor([0]), 0, 2, order=vkernels.embed_order(torch.arange(2), [0], [2])
            ),
            "an order of 2 entries",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
