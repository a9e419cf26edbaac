"""Next-token cross-entropy over all ids, and of codes over codes alone, against torch on sliced logits in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vkernels
from vkernels import head
from vtrain.batch import Document, PackedBatch
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.objectives.next_token import NextToken
from vtrain.vocab import Vocabulary

WIDTH = 24
VOCABULARIES = {
    "two": Vocabulary.of(text=130, visual=65),
    "three": Vocabulary.of(text=50, visual=33, vbpe=17),
    "visual first": Vocabulary.of(visual=40, text=129),
}


class Head(nn.Module):
    """Stands for a decoder: the hidden states are a parameter."""

    def __init__(self, vocab: Vocabulary, tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.vocab = vocab
        self.hidden = nn.Parameter(torch.randn(tokens, WIDTH, dtype=dtype))
        self.tables = nn.ParameterList(torch.randn(r.rows, WIDTH, dtype=dtype) / 4 for r in vocab.ranges)

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, dict]:
        return self.hidden, {}

    def head(self) -> tuple[list[torch.Tensor], list[int], list[int]]:
        return list(self.tables), self.vocab.bases, self.vocab.sizes


def make_batch(vocab: Vocabulary, lengths: dict[str, int], text_weight: float, tokens: int, tables=("rows_by_class",)):
    """One document with so many ids of each range in turn, text weighed; the rest of the batch is padding."""
    rng = np.random.default_rng(2)
    ids = np.concatenate([rng.integers(vocab[n].base, vocab[n].end, k) for n, k in lengths.items()] or [[]])
    weights = np.concatenate([np.full(k, text_weight if n == "text" else 1.0) for n, k in lengths.items()] or [[]])
    documents = [Document(ids.astype(np.int32), loss=weights.astype(np.float32))] if len(ids) else []
    return PackedBatch.build(
        documents, vocab, pack_tokens=tokens, max_documents=3, weighted=text_weight not in (0, 1), tables=tables
    )


def slow_sums(model: Head, batch: PackedBatch, visual_only: bool) -> dict[str, torch.Tensor]:
    """Weighted sums by range, row by row, from float64 logits."""
    vocab = model.vocab
    logits = torch.cat([model.hidden.double() @ t[: r.size].double().T for t, r in zip(model.tables, vocab.ranges)], 1)
    sums = {name: logits.new_zeros(()) for name in vocab.names}
    for row, label in enumerate(batch.labels.tolist()):
        if label < 0:
            continue
        r = vocab.ranges[vocab.index_of(label)]
        alone = visual_only and r.name == "visual"
        seen, target = (logits[row, r.base : r.end], label - r.base) if alone else (logits[row], label)
        weight = 1.0 if batch.weights is None else batch.weights[row].item()
        sums[r.name] = sums[r.name] + weight * F.cross_entropy(seen, torch.tensor(target))
    return sums


CASES = {
    "mixed": ("two", {"text": 9, "visual": 30}, 64),
    "three ranges": ("three", {"text": 5, "vbpe": 6, "visual": 21}, 40),
    "visual first": ("visual first", {"text": 7, "visual": 11}, 18),
    "no text": ("two", {"visual": 20}, 20),
    "no codes": ("three", {"text": 8, "vbpe": 3}, 16),
    "nothing": ("two", {}, 12),
    "full blocks": ("two", {"text": 513, "visual": 512}, 1040),
    "one more": ("two", {"text": 514, "visual": 513}, 1027),
}


@pytest.mark.parametrize("backend", ["cpu", "torch"])  # torch keeps the padding of the groups, as a GPU does
@pytest.mark.parametrize("text_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_visual_only_is_cross_entropy_on_sliced_logits(case, text_weight, backend):
    name, lengths, tokens = CASES[case]
    vocab = VOCABULARIES[name]
    batch = make_batch(vocab, lengths, text_weight, tokens)
    model, slow = Head(vocab, tokens, torch.float64), Head(vocab, tokens, torch.float64)
    with torch.no_grad():
        model.hidden[batch.labels < 0] = float("nan")  # rows that are not scored add nothing, whatever they hold
    vkernels.force("linear_cross_entropy", backend)
    try:
        terms, stats = NextToken("visual_only")(model, batch)
        (terms["next_token"][0] / 7).backward()
    finally:
        vkernels.force("linear_cross_entropy", None)
    expected = slow_sums(slow, batch, visual_only=True)
    total = sum(expected.values())
    assert {name: weight for name, (_, weight) in terms.items()} == {"next_token": 1.0}
    torch.testing.assert_close(terms["next_token"][0], total, rtol=1e-11, atol=1e-11)
    for r in vocab.names:
        torch.testing.assert_close(stats[r], expected[r], rtol=1e-11, atol=1e-11)
    if total.requires_grad:
        (total / 7).backward()
    for mine, theirs in zip(model.parameters(), slow.parameters()):
        wanted = torch.zeros_like(mine) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(mine.grad, wanted, rtol=1e-10, atol=1e-12)


def test_in_float32():
    name, lengths, tokens = CASES["three ranges"]
    batch = make_batch(VOCABULARIES[name], lengths, 0.3, tokens)
    model, slow = (Head(VOCABULARIES[name], tokens, dtype) for dtype in (torch.float32, torch.float64))
    slow.load_state_dict(model.state_dict())
    loss = NextToken("visual_only")(model, batch)[0]["next_token"][0]
    expected = sum(slow_sums(slow, batch, visual_only=True).values())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(model.parameters(), slow.parameters()):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_full_is_cross_entropy_on_all_logits(name):
    vocab = VOCABULARIES[name]
    batch = make_batch(vocab, {"text": 9, "visual": 12}, 0.3, 32, tables=())
    model = Head(vocab, 32, torch.float64)
    _, stats = NextToken("full")(model, batch)
    for visual_only in (False, True):
        expected = slow_sums(model, batch, visual_only)
        torch.testing.assert_close(stats["text"], expected["text"].detach())
        assert torch.allclose(stats["visual"], expected["visual"].detach()) == (not visual_only)


@pytest.mark.parametrize("softmax", ["full", "visual_only"])
@pytest.mark.parametrize("case", CASES)
def test_only_these_logits_are_made(case, softmax, monkeypatch):
    """`logits` tells the products of the forward pass, which on the host are made for scored rows only."""
    name, lengths, tokens = CASES[case]
    made, multiply = [], head.multiply

    def spy(a, b, out, *, add=False):
        made.append(0 if add else out.numel())
        multiply(a, b, out, add=add)

    monkeypatch.setattr(head, "multiply", spy)
    vocab, objective = VOCABULARIES[name], NextToken(softmax)
    batch = make_batch(vocab, lengths, 0.5, tokens, objective.tables(vocab))
    with torch.no_grad():
        objective(Head(vocab, tokens, torch.float32), batch)
    assert sum(made) == objective.logits(batch, vocab)
    codes = max(lengths.get("visual", 0) - (next(iter(lengths), "") == "visual"), 0)  # a first token is no target
    saved = codes * (vocab.size - vocab["visual"].size) if softmax == "visual_only" else 0
    assert objective.logits(batch, vocab) == batch.scored * vocab.size - saved


def test_through_a_tied_decoder():
    """The tables get gradients as embedding and as head: the same as torch's on one sequence."""
    vocab = VOCABULARIES["two"]
    config = DecoderConfig(1, 32, 4, 2, 48, qkv_bias=True, tied=True)
    batch = make_batch(vocab, {"text": 6, "visual": 15}, 0.3, 32)
    mine, theirs = Decoder(config, vocab), Decoder(config, vocab)
    NextToken("visual_only")(mine, batch)[0]["next_token"][0].backward()
    logits, rows = theirs.logits(theirs(batch)[0]), batch.labels >= 0
    logits = logits.masked_fill((batch.labels >= 130)[:, None] & (torch.arange(195) < 130), float("-inf"))
    losses = F.cross_entropy(logits[rows], batch.labels[rows].long(), reduction="none")
    (losses * batch.weights[rows]).sum().backward()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match=r"loss.visual_softmax is 'visual'; expected full or visual_only"):
        NextToken("visual")
    vocab = Vocabulary.of(text=20)
    with pytest.raises(ValueError, match=r'visual_only; the vocabulary \[\["text", 20\]\] has no range \'visual\''):
        NextToken("visual_only").tables(vocab)
    assert NextToken().tables(vocab) == ()
    vocab = VOCABULARIES["two"]
    with pytest.raises(ValueError, match="the batch has no table rows_by_class"):
        NextToken("visual_only")(Head(vocab, 16, torch.float32), make_batch(vocab, {"text": 3}, 1.0, 16, tables=()))
