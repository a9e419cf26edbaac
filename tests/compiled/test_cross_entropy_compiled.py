"""What the pass over the logits compiles to."""

import pytest
import torch
from sm90 import check, meta

from vkernels.jit import cross_entropy as jit

V = 151936


def loss(sizes, *, grads=True, rows=False, z_loss=0.0, label_smoothing=0.0, softcap=0.0, metrics=False):
    """4096 rows of 2048, as the autograd function and the op's forward pass call it."""

    def launch():
        T, C, n = 4096, 2048, len(sizes)
        bases = [sum(sizes[:i]) for i in range(n)]
        listed = (meta(T, dtype=torch.int32), [i * T // n for i in range(n + 1)]) if rows else (None, None)
        jit.cross_entropy_forward(
            meta(T, C), [meta(size, C) for size in sizes], bases, meta(T, dtype=torch.int32), sizes,
            None, None, *listed, z_loss, label_smoothing, softcap, False, metrics, [grads] * (n + 1),
        )  # fmt: skip

    return launch


def logprob():
    T, C = 4096, 2048
    labels = meta(T, dtype=torch.int32)
    jit.logprob_forward(meta(T, C), [meta(V, C)], [0], labels, [V], None, None, None, 1.0, 0.0, True)


def test_the_pass_over_long_rows():
    check("linear_cross_entropy", {"152k": loss([V], metrics=True), "152k, no gradients": loss([V], grads=False),
                                   "152k and 64k, grouped": loss([V, 65536], rows=True)})  # fmt: skip


@pytest.mark.slow
def test_every_term_and_short_rows():
    check("linear_cross_entropy", {"all terms": loss([V], z_loss=1e-4, label_smoothing=0.1, softcap=30.0),
                                   "1024 codes": loss([1024], metrics=True), "log-probabilities": logprob})  # fmt: skip
