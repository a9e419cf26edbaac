"""A linear layer on few rows, as a decode step has it: on a CPU the product is asked for the other way round.

MKL reads the weights of a float32 product of 2 to 8 rows at a third to a half of the memory's rate, and those of one
row at two thirds. As weight @ x.T with 2 or 4 rows at a time they come at the full rate: on one core of an EPYC, of 896
times [64000, 896], 22 GB/s instead of 17 (1 row), 8 (2 rows) and 9 (4 rows), and 11 instead of 7 for 8 rows. Of 4864
columns it helps 2 rows only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

MOST_ROWS = 8
AT_A_TIME = 4
MOST_COLUMNS = 2048


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x[T, C] @ weight[N, C].T + bias[N] -> [T, N], contiguous; by `F.linear` where it is as fast or has gradients."""
    rows, columns = x.shape
    if (rows != 2 and (rows > MOST_ROWS or columns > MOST_COLUMNS)) or not _turned(x):
        return F.linear(x, weight, bias)
    even = x if rows % 2 == 0 else torch.cat([x, x[:1]])
    parts = [torch.mm(weight, part.t()).t() for part in even.split(AT_A_TIME)]
    y = torch.cat(parts)[:rows]
    return y if bias is None else y.add_(bias)


def _turned(x: torch.Tensor) -> bool:
    """Whether the other way round is the faster one at all."""
    on_mkl = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkl.is_available()
    return on_mkl and not torch.is_grad_enabled()
