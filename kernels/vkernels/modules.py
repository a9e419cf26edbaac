"""The ops as modules for other people's trainers, with the parameter names that Llama-like checkpoints use."""

from __future__ import annotations

import torch
from torch import nn

from vkernels.activations import swiglu
from vkernels.cross_entropy import linear_cross_entropy
from vkernels.norms import layer_norm, rms_norm


class RMSNorm(nn.Module):
    """x[..., dim] -> [..., dim], as `rms_norm`."""

    def __init__(self, dim: int, eps: float = 1e-6, *, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class LayerNorm(nn.Module):
    """x[..., dim] -> [..., dim], as `layer_norm`."""

    def __init__(self, dim: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class SwiGLU(nn.Module):
    """The MLP down(silu(gate(x)) * up(x)): x[..., dim] -> [..., dim]. Only gate(x) and up(x) are kept for backward."""

    def __init__(self, dim: int, hidden: int, bias: bool = False, *, device=None, dtype=None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LinearCrossEntropy(nn.Module):
    """nn.CrossEntropyLoss of hidden @ weight.T, without the logits ever existing at once. Labels are not shifted.

    reduction: "mean" over the labels that count, or "sum". z_loss, label_smoothing, softcap: as
    `linear_cross_entropy`. Under autocast the product is made in autocast's dtype.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"vkernels.LinearCrossEntropy: reduction is {reduction!r}, expected 'mean' or 'sum'")
        self.ignore_index, self.reduction = ignore_index, reduction
        self.options = {"z_loss": z_loss, "label_smoothing": label_smoothing, "softcap": softcap}

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """hidden[..., C], weight[V, C], labels int[...] -> float32 scalar; the mean of no label is nan, as in torch."""
        total, count = summed_loss(hidden, weight, labels, self.ignore_index, **self.options)
        return total / count if self.reduction == "mean" else total


def summed_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, **options: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """LinearCrossEntropy -> (the sum of the losses, the number of labels that count), float32 scalars."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    rows, labels = hidden.reshape(-1, hidden.shape[-1]).to(dtype), labels.reshape(-1)
    if ignore_index >= 0:
        labels = labels.masked_fill(labels == ignore_index, -1)
    return linear_cross_entropy(rows, [weight.to(dtype)], [0], labels, sizes=[len(weight)], joint=True, **options)
