"""A step never waits for the device: no value, no data-shaped tensor and no copy travels from device to host.

The meta device stands in for the GPU: its tensors have no data, so whatever would read them on the host fails, and a
dispatch mode refuses operators whose result depends on data or lies on another device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import VOCAB

from vtrain.batch import Document, PackedBatch
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.objectives.autoencoder import AutoencoderObjective
from vtrain.objectives.next_token import NextToken
from vtrain.train.ema import Ema
from vtrain.train.optim import AdamW
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig

FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal.default")


class DeviceOnly(TorchDispatchMode):
    """Refuses what would stall a GPU stream."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in FORBIDDEN):
            raise AssertionError(f"{func} needs data on the host")
        out = func(*args, **(kwargs or {}))
        inputs = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        outputs = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        if "meta" in inputs and "cpu" in outputs:
            raise AssertionError(f"{func} copies from device to host")
        return out


def batch(tables: Sequence[str] = ()) -> PackedBatch:
    rng = np.random.default_rng(0)
    documents = [Document(rng.integers(0, VOCAB.size, n).astype(np.int32), key=n) for n in (7, 11, 1)]
    return PackedBatch.build(documents, VOCAB, pack_tokens=32, max_documents=6, weighted=True, tables=tables)


CONFIGS = {
    "llama": DecoderConfig(2, 32, 4, 2, 48),
    "qwen2": DecoderConfig(2, 32, 4, 2, 48, qkv_bias=True, tied=True),
    "qwen3": DecoderConfig(2, 32, 4, 2, 48, qk_norm=True),
}


@pytest.mark.parametrize(
    ("name", "softmax"), [("llama", "full"), ("qwen2", "full"), ("qwen3", "full"), ("qwen2", "visual_only")]
)
def test_decoder_step_stays_on_the_device(name, softmax):
    with torch.device("meta"):
        model = Decoder(CONFIGS[name], VOCAB)
    objective = NextToken(softmax)
    on_device = batch(objective.tables(VOCAB)).to("meta")
    with DeviceOnly():
        terms, _ = objective(model, on_device)
        terms["next_token"][0].backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_autoencoder_step_stays_on_the_device(quantizer):
    config = AutoencoderConfig(
        resolution=8,
        base_channels=8,
        channel_multiplier=(1, 2),
        num_res_blocks=1,
        latent_channels=8,
        quantizer=quantizer,
        embed_dim=4,
        num_embeddings=16,
        fsq_levels=(4, 3),
    )
    with torch.device("meta"):
        model = Autoencoder(config)
    images = torch.zeros(5, 3, 8, 8, device="meta")
    keys, weights = torch.zeros(5, dtype=torch.int64, device="meta"), torch.ones(5, device="meta")
    with DeviceOnly():
        terms, _ = AutoencoderObjective()(model, images, keys, weights)
        sum(total * weight for total, weight in terms.values()).backward()
        model.end_step(0)
    assert all(p.grad is not None for p in model.parameters())


def test_optimizer_step_stays_on_the_device():
    named = {"w": nn.Parameter(torch.empty(3, 2, device="meta")), "bias": nn.Parameter(torch.empty(3, device="meta"))}
    optimizer = AdamW(named.items(), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ema = Ema([optimizer], 0.9)
    for p in named.values():
        p.grad = torch.empty_like(p)
    with DeviceOnly():
        kept = optimizer.clip(1.0, torch.zeros((), device="meta")).isfinite().float()
        optimizer.step(kept)
        ema.update(kept)
    assert kept.is_meta


def test_decoder_step_works_on_fake_tensors():
    """The same under FakeTensorMode, where reading a value raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Decoder(CONFIGS["qwen3"], VOCAB)
        fake = PackedBatch(**{k: _faked(v) for k, v in vars(batch()).items()})
        terms, _ = NextToken()(model, fake)
        terms["next_token"][0].backward()
        with pytest.raises(DataDependentOutputException):
            terms["next_token"][0].item()


def _faked(value):
    return torch.empty_like(value) if isinstance(value, torch.Tensor) else value


def test_the_guard_can_fail():
    x = torch.zeros(3, device="meta")
    with DeviceOnly():
        with pytest.raises(AssertionError, match="needs data on the host"):
            x.nonzero()
        with pytest.raises((AssertionError, RuntimeError)):
            x.to("cpu")
        with pytest.raises((AssertionError, RuntimeError)):
            x[0].item()
