"""Next-token cross-entropy, reported per vocabulary range: over all ids, or of codes over codes alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import vkernels
from vtrain.batch import PackedBatch
from vtrain.vocab import Vocabulary

VISUAL = "visual"  # the range that visual_only scores on its own
SOFTMAX = ("full", "visual_only")


class NextToken(nn.Module):
    """Mean cross-entropy per scored label; a label's weight is the batch's (`PackedBatch.weights`).

    visual_softmax full: every label is told from all ids. visual_only: labels of the range `visual` are told from that
    range alone, the others from all ids; the other logits of codes are not made. The loader is asked for `tables`.
    """

    def __init__(self, visual_softmax: str = "full") -> None:
        super().__init__()
        if visual_softmax not in SOFTMAX:
            raise ValueError(f"loss.visual_softmax is {visual_softmax!r}; expected {' or '.join(SOFTMAX)}")
        self.visual_only = visual_softmax == "visual_only"

    def tables(self, vocab: Vocabulary) -> tuple[str, ...]:
        """What batches must carry, of vtrain.batch.TABLES. ValueError where the vocabulary has no visual range."""
        if not self.visual_only:
            return ()
        if VISUAL not in vocab:
            raise ValueError(f"loss.visual_softmax is visual_only; the vocabulary {vocab} has no range {VISUAL!r}")
        return ("rows_by_class",)

    def forward(self, model: nn.Module, batch: PackedBatch) -> tuple[dict, dict]:
        """-> ({"next_token": (sum, 1.0)}, {range: sum}); counts of the same names come with the batch."""
        hidden, _ = model(batch)
        weights, bases, sizes = model.head()
        # One sum over all ranges: its gradients are made beside the loss, without computing the logits again.
        loss, _, metrics = vkernels.linear_cross_entropy(
            hidden,
            weights,
            bases,
            batch.labels,
            sizes=sizes,
            row_weight=batch.weights,
            joint=True,
            metrics=True,
            **(_visual_alone(batch, model.vocab) if self.visual_only else {}),
        )
        stats = {r.name: part for r, part in zip(model.vocab.ranges, metrics.loss.unbind())}
        return {"next_token": (loss, 1.0)}, stats

    def logits(self, batch: PackedBatch, vocab: Vocabulary) -> int:
        """How many logits the scored rows of a batch need, counted on the host before the batch goes to a device."""
        if not self.visual_only:
            return batch.scored * vocab.size
        first, end, _ = _visual_rows(batch, vocab)
        codes = int(np.count_nonzero(batch.rows_by_class[first:end].numpy() < batch.ids.numel()))  # the rest is padding
        return codes * vocab[VISUAL].size + (batch.scored - codes) * vocab.size


def _visual_alone(batch: PackedBatch, vocab: Vocabulary) -> dict[str, Any]:
    """rows and class_cu as linear_cross_entropy takes them: the rows of codes as their range's group, then the others
    as the group that sees all ranges."""
    first, end, last = _visual_rows(batch, vocab)
    number, rows = vocab.names.index(VISUAL), batch.rows_by_class
    class_cu = [0] * (number + 1) + [end - first] * (len(vocab.ranges) - number) + [last]
    return {"rows": torch.cat([rows[first:end], rows[:first], rows[end:last]]), "class_cu": class_cu}


def _visual_rows(batch: PackedBatch, vocab: Vocabulary) -> tuple[int, int, int]:
    """The group of codes first:end in rows_by_class, and where the last group ends. Ints of the host."""
    if batch.class_cu is None:
        raise ValueError("loss.visual_softmax is visual_only; the batch has no table rows_by_class (NextToken.tables)")
    number, cu = vocab.names.index(VISUAL), batch.class_cu.tolist()
    return cu[number], cu[number + 1], cu[-1]
