"""The linear layer of few rows against float64, on both sides of its limits."""

import pytest
import torch
import torch.nn.functional as F

from vtrain.models import few_rows

SHAPES = [(1, 5), (8, 1), (96, 131), (few_rows.MOST_COLUMNS + 4, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_equal_to_float64(shape, biased):
    columns, rows = shape
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    bias = torch.randn(rows) if biased else None
    for T in range(few_rows.MOST_ROWS + 3):
        x = torch.randn(2 * T, columns)[::2]
        found = few_rows.linear(x, weight, bias)
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


def test_what_needs_a_gradient_goes_the_usual_way(monkeypatch):
    x, weight = torch.randn(2, 6), torch.randn(5, 6, requires_grad=True)
    turned = []
    monkeypatch.setattr(torch, "mm", lambda a, b: turned.append(a.shape) or a.matmul(b))
    few_rows.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 6))
    assert not turned
    with torch.no_grad():
        few_rows.linear(x.bfloat16(), weight.bfloat16())
        assert not turned
        few_rows.linear(x, weight)
    assert len(turned) == torch.backends.mkl.is_available()
