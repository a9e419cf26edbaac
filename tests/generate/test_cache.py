"""The KV cache against the same decoder without one, and against plain float64 attention."""

import math

import numpy as np
import pytest
import torch

from vtrain.batch import Document, PackedBatch
from vtrain.generate.cache import KVCache
from vtrain.generate.engine import one_token_batch
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=37, visual=24)


def make_decoder(**changes) -> Decoder:
    shape = {"layers": 3, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "max_positions": 128, "init_std": 0.2}
    return Decoder(DecoderConfig(**{**shape, **changes}), VOCAB).eval()


def uncached_logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """Logits after the last token of one sequence, everything computed anew."""
    batch = PackedBatch.build([Document(np.array(tokens))], VOCAB)
    hidden, _ = decoder(batch)
    return decoder.logits(hidden[-1:])[0]


SHAPES = [{}, {"kv_heads": 4}, {"kv_heads": 1, "qk_norm": True}, {"qkv_bias": True, "tied": True, "head_dim": 16}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [(1, 7, 3, 12), (5, 5), (1,)], ids=str)
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(shape, lengths):
    decoder = make_decoder(**shape)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, VOCAB.size, n).tolist() for n in lengths]
    prompt_of = [*range(len(sequences)), 0, len(sequences) - 1]  # two sequences share a prompt with another
    documents = [Document(np.array(s)) for s in sequences]
    cache = KVCache(len(prompt_of), max(lengths) + 6, "cpu")
    cache.begin_prefill(lengths, prompt_of)
    hidden, _ = decoder(PackedBatch.build(documents, VOCAB), cache=cache)
    ends = np.cumsum(lengths)[prompt_of] - 1
    logits = decoder.logits(hidden[torch.from_numpy(ends)])
    rows = [list(sequences[p]) for p in prompt_of]
    step = one_token_batch(len(rows), torch.device("cpu"))
    for row, found in zip(rows, logits):
        torch.testing.assert_close(found, uncached_logits(decoder, row), atol=1e-5, rtol=1e-5)
    for _ in range(6):
        new = rng.integers(0, VOCAB.size, len(rows))
        step.positions = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        step.ids = torch.from_numpy(new.astype(np.int32))
        for row, token in zip(rows, new):
            row.append(int(token))
        cache.begin_step()
        hidden, _ = decoder(step, cache=cache)
        for row, found in zip(rows, decoder.logits(hidden)):
            torch.testing.assert_close(found, uncached_logits(decoder, row), atol=1e-5, rtol=1e-5)


def test_a_decode_step_is_attention_over_all_stored_rows():
    torch.manual_seed(1)
    Hq, Hk, D, lengths = 6, 2, 8, [4, 1]
    q, k, v = torch.randn(5, Hq, D), torch.randn(5, Hk, D), torch.randn(5, Hk, D)
    batch = PackedBatch.build([Document(np.zeros(n, dtype=np.int32)) for n in lengths], VOCAB)
    cache = KVCache(3, 6, "cpu")
    cache.begin_prefill(lengths, [1, 0, 1])
    cache.attend(0, q, k, v, batch)
    stored = [(k[4:], v[4:]), (k[:4], v[:4]), (k[4:], v[4:])]
    for _ in range(2):
        cache.begin_step()
        q1, k1, v1 = torch.randn(3, Hq, D), torch.randn(3, Hk, D), torch.randn(3, Hk, D)
        found = cache.attend(0, q1, k1, v1, batch)
        stored = [(torch.cat([a, k1[b : b + 1]]), torch.cat([c, v1[b : b + 1]])) for b, (a, c) in enumerate(stored)]
        for b, (keys, values) in enumerate(stored):
            for h in range(Hq):
                scores = keys[:, h // 3].double() @ q1[b, h].double() / D**0.5
                expected = scores.softmax(0) @ values[:, h // 3].double()
                torch.testing.assert_close(found[b, h].double(), expected, atol=1e-6, rtol=1e-5)


def test_blank_columns_cannot_leak():
    """What stands left of a short prompt, or in columns not yet used, has no influence."""
    batch = PackedBatch.build([Document(np.zeros(n, dtype=np.int32)) for n in (1, 5)], VOCAB)
    torch.manual_seed(2)
    q, k, v = (torch.randn(6, 2, 4) for _ in range(3))
    q1, k1, v1 = (torch.randn(2, 2, 4) for _ in range(3))
    found = []
    for poison in (0.0, 1e9, math.nan):
        cache = KVCache(2, 9, "cpu")
        cache.begin_prefill([1, 5], [0, 1])
        cache.attend(0, q, k, v, batch)
        for storage in (cache._keys[0], cache._values[0]):
            storage[0, :4] = poison
            storage[:, 5:] = math.nan if poison else 0.0
        cache.begin_step()
        found.append(cache.attend(0, q1, k1, v1, batch))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0])


def test_misuse_is_refused():
    cache = KVCache(1, 4, "cpu")
    for lengths, prompt_of, found in (([5], [0], "1 sequences from prompts of 5 to 5"), ([0, 2], [1], "of 0 to 2"),
                                      ([2], [0, 0], "2 sequences")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{found}.*expected 1 sequences and 1 to 4 tokens"):
            cache.begin_prefill(lengths, prompt_of)
    batch = PackedBatch.build([Document(np.zeros(3, dtype=np.int32))], VOCAB)
    cache.begin_prefill([3], [0])
    cache.attend(0, *torch.randn(3, 3, 2, 4).unbind(), batch)
    cache.begin_step()
    cache.attend(0, *torch.randn(3, 1, 2, 4).unbind(), batch)
    cache.begin_step()
    with pytest.raises(ValueError, match="length 4; expected 0 <= start <= length < 4"):
        cache.attend(0, *torch.randn(3, 1, 2, 4).unbind(), batch)
