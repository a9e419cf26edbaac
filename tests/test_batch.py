"""PackedBatch.build against a plain-Python model of one token at a time, and what it refuses."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtrain.batch import IGNORE, PAD_KEY, Document, PackedBatch, seqlen_bucket
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=7, visual=5)


@st.composite
def document(draw):
    length = draw(st.integers(0, 9))

    def array(element, dtype):
        return np.array(draw(st.lists(element, min_size=length, max_size=length)), dtype=dtype)

    return Document(
        array(st.integers(-1, VOCAB.size - 1), np.int32),
        key=draw(st.integers(1, 2**64 - 1)),
        loss=array(st.sampled_from([0.0, 0.25, 1.0, 3.0]), np.float32) if draw(st.booleans()) else None,
        positions=array(st.integers(0, 1000), np.int32) if draw(st.booleans()) else None,
        source=draw(st.integers(0, 3)),
    )


def slow_model(documents, T, S):
    """One row at a time: (id, label, weight or None where not scored, position), then cu_seqlens and counts."""
    rows, cu = [], [0]
    counts = {"next_token": 0.0, "text": 0.0, "visual": 0.0}
    for d in documents:
        for i, token in enumerate(d.ids.tolist()):
            label, weight = IGNORE, None
            if i + 1 < len(d.ids):
                target = int(d.ids[i + 1])
                worth = 1.0 if d.loss is None else float(d.loss[i + 1])
                if target >= 0 and worth > 0:
                    label, weight = target, worth
                    counts["next_token"] += worth
                    counts["text" if target < 7 else "visual"] += worth
            rows.append((token, label, weight, i if d.positions is None else int(d.positions[i])))
        cu.append(len(rows))
    rows += [(-1, IGNORE, None, i) for i in range(T - len(rows))]
    cu += [T] * (S + 1 - len(cu))
    return rows, cu, counts


@given(st.lists(document(), max_size=6), st.integers(0, 20), st.integers(0, 3), st.booleans(), st.booleans())
def test_equals_the_slow_model(documents, padding, empty, weighted, tight):
    tokens = sum(len(d) for d in documents)
    T = tokens if tight else tokens + padding
    S = len(documents) + (tokens < T) + (0 if tight else empty)
    shape = {} if tight else {"pack_tokens": T, "max_documents": S}
    batch = PackedBatch.build(documents, VOCAB, weighted=weighted, **shape)
    rows, cu, counts = slow_model(documents, T, S)

    assert batch.ids.tolist() == [row[0] for row in rows]
    assert batch.labels.tolist() == [row[1] for row in rows]
    assert batch.positions.tolist() == [row[3] for row in rows]
    assert batch.cu_seqlens.tolist() == cu
    scored = [(i, row[2]) for i, row in enumerate(rows) if row[2] is not None]
    if batch.weights is None:
        assert not weighted
        assert all(weight == 1 for _, weight in scored)
    else:
        assert weighted or any(weight != 1 for _, weight in scored)
        assert [float(batch.weights[i]) for i, _ in scored] == [weight for _, weight in scored]
        assert batch.weights.dtype == torch.float32
    assert batch.counts == counts
    assert batch.scored == len(scored)
    assert (batch.tokens, batch.documents) == (tokens, len(documents))
    assert batch.lengths.tolist() == [len(d) for d in documents]

    spare = S - len(documents)
    assert batch.doc_keys.numpy().view(np.uint64).tolist() == [d.key for d in documents] + [PAD_KEY] * spare
    assert batch.sources.tolist() == [d.source for d in documents] + [-1] * spare
    assert batch.max_seqlen >= max(np.diff(cu), default=0)
    assert isinstance(batch.max_seqlen, int)
    int32 = (batch.ids, batch.labels, batch.positions, batch.cu_seqlens)
    assert all(t.dtype == torch.int32 for t in int32)
    assert batch.doc_keys.dtype == torch.int64
    assert batch.kv_lo is None
    assert batch.kv_hi is None


def test_no_label_reaches_over_a_document_or_into_padding():
    documents = [Document(np.array([1, 2])), Document(np.array([], dtype=np.int32)), Document(np.array([3, 4]))]
    batch = PackedBatch.build(documents, VOCAB, pack_tokens=6, max_documents=5)
    assert batch.labels.tolist() == [2, IGNORE, 4, IGNORE, IGNORE, IGNORE]
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 4, 6, 6]
    assert batch.positions.tolist() == [0, 1, 0, 1, 0, 1]


def test_a_batch_of_padding_only():
    batch = PackedBatch.build([], VOCAB, pack_tokens=4, max_documents=3)
    assert batch.ids.tolist() == [-1] * 4
    assert batch.cu_seqlens.tolist() == [0, 4, 4, 4]
    assert batch.counts == {"next_token": 0.0, "text": 0.0, "visual": 0.0}
    assert (batch.tokens, batch.scored, batch.documents) == (0, 0, 0)


@pytest.mark.parametrize("wrong", [12, -2, 2**31, 2**32 + 3, -(2**32) + 3])
def test_an_id_outside_the_vocabulary_names_its_document(wrong):
    """2**32 + 3 would be the legal id 3 in int32."""
    documents = [
        Document(np.array([1, 11]), key=0xA),
        Document(np.array([], dtype=np.int32), key=0xB),
        Document(np.array([0, wrong, 12]), key=0xC),
        Document(np.array([1]), key=0xD),
    ]
    with pytest.raises(ValueError, match=rf"document 0xc: id {wrong} is outside the vocabulary 0\.\.11"):
        PackedBatch.build(documents, VOCAB, pack_tokens=32)


@pytest.mark.parametrize("name", ["loss", "positions"])
@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_a_document_of_uneven_parts_is_named(name, length):
    """One entry would be broadcast to all tokens."""
    with pytest.raises(ValueError, match=rf"document 0xc: {name} has {length} entries for 3 ids"):
        Document(np.array([1, 2, 3]), key=0xC, **{name: np.ones(length, dtype=np.int32)})


@pytest.mark.parametrize(
    ("lengths", "T", "S", "fits"),
    [
        ([3, 4], 7, 2, True),  # full: no padding document
        ([3, 4], 7, 1, False),
        ([3, 4], 8, 3, True),
        ([3, 4], 8, 2, False),  # the padding document takes one
        ([3, 4], 6, 9, False),
        ([], 4, 1, True),
        ([], 4, 0, False),
    ],
)
def test_documents_that_do_not_fit(lengths, T, S, fits):
    documents = [Document(np.zeros(n, dtype=np.int32)) for n in lengths]
    if fits:
        assert PackedBatch.build(documents, VOCAB, pack_tokens=T, max_documents=S).cu_seqlens.numel() == S + 1
        return
    found = f"{len(lengths)} documents with {sum(lengths)} tokens do not fit a batch of {T} tokens and {S} sequences"
    with pytest.raises(ValueError, match=re.escape(found)):
        PackedBatch.build(documents, VOCAB, pack_tokens=T, max_documents=S)


def test_to_moves_every_tensor_and_keeps_host_fields():
    loss = np.array([1, 0.5], dtype=np.float32)
    batch = PackedBatch.build([Document(np.array([1, 2]), loss=loss)], VOCAB)
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta", name
            assert value.device.type == "cpu", name
        else:
            assert getattr(moved, name) is value, name


def test_buckets_are_the_smallest_that_hold():
    buckets = [2**i for i in range(4, 25)] + [3 * 2**i for i in range(3, 25)]
    for length in [0, 1, *range(14, 400), *(b + d for b in buckets[:20] for d in (-1, 0, 1))]:
        assert seqlen_bucket(length) == min(b for b in buckets if b >= length)
