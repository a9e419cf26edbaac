"""The objective of image autoencoders: pixel error of the reconstruction and commitment of latents to their codes."""

from __future__ import annotations

import torch
from torch import nn

from vtrain.visual.vqgan import Autoencoder


class AutoencoderObjective(nn.Module):
    """l1 and l2 mix the mean absolute and mean squared pixel error (pixels in [-1,1]); commitment weighs its term."""

    def __init__(self, *, l1: float = 0.0, l2: float = 1.0, commitment: float = 0.25):
        super().__init__()
        if min(l1, l2, commitment) < 0 or l1 + l2 == 0:
            raise ValueError(
                f"autoencoder loss: l1 {l1}, l2 {l2}, commitment {commitment}; expected none below 0, l1 + l2 > 0"
            )
        self.l1 = l1
        self.l2 = l2
        self.commitment = commitment

    def forward(
        self,
        model: Autoencoder,
        images: torch.Tensor,
        keys: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[dict[str, tuple[torch.Tensor, float]], dict[str, torch.Tensor]]:
        """images [B,3,H,W] in [-1,1], keys int64[B], weights float32[B] (0 = padding image, None = all 1).

        Returns terms {name: (sum over images, weight of the term)}, each to be divided by the global sum of the image
        weights, and stats {name: detached sum over images}: "mse" (PSNR = 10 log10(4 / mean)) and "l1".
        """
        reconstruction, _, commitment = model(images, keys, weights)
        error = reconstruction.float() - images.float()
        l1 = error.abs().flatten(1).mean(1)  # [B]
        l2 = error.square().flatten(1).mean(1)

        def total(per_image: torch.Tensor) -> torch.Tensor:
            return per_image.sum() if weights is None else (per_image * weights).sum()

        terms = {"reconstruction": (total(self.l1 * l1 + self.l2 * l2), 1.0)}
        if self.commitment:
            terms["commitment"] = (total(commitment), self.commitment)
        return terms, {"mse": total(l2.detach()), "l1": total(l1.detach())}
