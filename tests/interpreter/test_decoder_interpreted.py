"""A whole training step of the decoder on the Triton kernels, beside the same step on the CPU's own."""

import contextlib

import numpy as np
import pytest
import torch
from toys import VOCAB

import vkernels
from vkernels.check.judge import error
from vtrain.batch import Document, PackedBatch
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.objectives.next_token import NextToken
from vtrain.train.kernel_tables import kernel_tables

CONFIGS = {
    "llama": DecoderConfig(2, 48, 3, 1, 80, head_dim=24),
    "qwen2": DecoderConfig(1, 32, 4, 2, 48, qkv_bias=True, tied=True),
    "qwen3": DecoderConfig(2, 32, 4, 2, 48, head_dim=16, qk_norm=True),
}


def batch() -> PackedBatch:
    rng = np.random.default_rng(0)
    documents = [Document(rng.integers(0, VOCAB.size, n).astype(np.int32), key=n) for n in (70, 11, 1, 30)]
    return PackedBatch.build(documents, VOCAB, pack_tokens=140, max_documents=7, weighted=True)


def step(model: Decoder, batch: PackedBatch) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    terms, _ = NextToken()(model, batch)
    loss = terms["next_token"][0]
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@contextlib.contextmanager
def served_by(backend: str):
    with contextlib.ExitStack() as stack:
        for op in vkernels.registry.ops():
            if backend in vkernels.backends(op):
                stack.enter_context(vkernels.force(op, backend))
        yield


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2", "qwen3"))])
def test_a_step(name):
    model, plain = Decoder(CONFIGS[name], VOCAB), batch()
    with served_by("cpu"):
        expected = step(model, plain)
    found = step(model, plain)
    for key, value in expected.items():
        assert error(found[key], value) < 2e-5, key
    with_tables = step(model, kernel_tables(VOCAB, pinned=False)(plain).to("cpu"))
    for key, value in found.items():  # the lists of the host and those of the device are the same work
        assert torch.equal(with_tables[key], value), key
