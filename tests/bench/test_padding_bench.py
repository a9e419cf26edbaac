"""The padding bench trains on the same documents in both ways."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch


def test_both_ways_hold_the_same_documents_and_losses(tmp_path):
    import padding

    packed = padding.packed_steps(padding.write(tmp_path, 64))
    padded = padding.padded_steps(packed)
    assert [len(step) for step in padded] == [padding.DOCUMENTS // padding.MICRO] * 2
    trainer, sums, real = padding.Trainer(replace(padding.CONFIG, layers=1), padding.VOCAB), [], []
    for steps in (packed, padded):
        batches = list(itertools.chain.from_iterable(steps))
        with torch.no_grad():
            terms = [trainer.objective(trainer.model, batch)[0]["next_token"][0] for batch in batches]
        sums.append(float(sum(terms)))
        real.append((sum(b.tokens for b in batches), sum(b.scored for b in batches)))
        rows = sum(b.ids.numel() for b in batches)
        assert padding.padding_share(steps) == pytest.approx(100 * (1 - real[-1][0] / rows))
    assert sums[1] == pytest.approx(sums[0], rel=1e-5)
    assert real[0] == real[1] == (real[0][0], real[0][0] - 64)  # every token but the first of a document is a label
    assert {len(set(b.lengths.tolist())) for step in padded for b in step} == {1}
    assert trainer.step(packed[0][:1]) > trainer.step(packed[0][:1])


def test_shares_of_padding():
    import padding

    lengths = np.array([5, 5, 5, 5, 5, 5, 5, 10, *[10] * 8, 3])
    assert padding.share_of_padded(lengths) == pytest.approx(100 * (1 - 125 / 160))  # the last is no whole micro-batch
    assert padding.share_of_packed(np.full(20, 7), 15) == pytest.approx(100 / 15)
