"""Next-token cross-entropy over the whole vocabulary, reported per vocabulary range."""

from __future__ import annotations

from torch import nn

import vkernels
from vtrain.batch import PackedBatch


class NextToken(nn.Module):
    """Mean cross-entropy per scored label; a label's weight is the batch's (`PackedBatch.weights`)."""

    def forward(self, model: nn.Module, batch: PackedBatch) -> tuple[dict, dict]:
        """-> ({"next_token": (sum, 1.0)}, {range: sum}); counts of the same names come with the batch."""
        hidden, _ = model(batch)
        weights, bases, sizes = model.head()
        # One sum over all ranges: its gradients are made beside the loss, without computing the logits again.
        loss, _, metrics = vkernels.linear_cross_entropy(
            hidden, weights, bases, batch.labels, sizes=sizes, row_weight=batch.weights, joint=True, metrics=True
        )
        stats = {r.name: part for r, part in zip(model.vocab.ranges, metrics.loss.unbind())}
        return {"next_token": (loss, 1.0)}, stats
