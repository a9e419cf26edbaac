"""A whole training step of a decoder as a GPU would run it: every kernel compiles, and nothing waits for the device."""

import numpy as np
import pytest
import torch
from sm90 import launches
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from vkernels import registry
from vtrain.batch import Document, PackedBatch
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.objectives.next_token import NextToken
from vtrain.train.kernel_tables import kernel_tables
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=1000, visual=4096)


class OnTriton(TorchDispatchMode):
    """Serves our ops by their Triton launches, on tensors without data: what reads them on the host fails."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("vkernels::")
        op = name.removesuffix("_backward")
        if op not in registry.ops() or "triton" not in registry.backends(op):
            return func(*args, **(kwargs or {}))
        backend = registry._table[op]["triton"]
        return (backend.forward if name == op else backend.backward)(*args)


@pytest.mark.slow
@pytest.mark.parametrize("tables", [True, False])
def test_a_step_launches_our_kernels_and_asks_the_device_nothing(tables):
    with torch.device("meta"):
        model = Decoder(DecoderConfig(2, 1024, 16, 8, 3072, head_dim=128, qk_norm=True), VOCAB).to(torch.bfloat16)
    ids = np.random.default_rng(0).integers(0, VOCAB.size, 3000).astype(np.int32)
    batch = PackedBatch.build([Document(ids)], VOCAB, pack_tokens=4096, max_documents=8, weighted=True)
    batch = (kernel_tables(VOCAB, pinned=False)(batch) if tables else batch).to("meta")
    with launches() as kernels, OnTriton():
        terms, _ = NextToken()(model, batch)
        terms["next_token"][0].backward()
    names = {name for name, _ in kernels}
    assert {"_attention_forward", "_attention_dq", "_attention_dkdv", "_embed", "_segment_sum"} <= names, names
    assert {"_score_rows", "_norm_rope_forward", "_rms_norm_backward"} <= names, names
    assert ("_longest_first" in names) is not tables  # lists of the host replace those made on the device


def test_reading_a_value_would_fail():
    with pytest.raises((RuntimeError, DataDependentOutputException)):
        torch.empty(3, device="meta").sum().item()
