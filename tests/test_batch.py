"""PackedBatch.build against a plain-Python model of one token at a time, and what it refuses."""

import re
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtrain._host import finish_bins
from vtrain.batch import IGNORE, PAD_KEY, Bins, Document, PackedBatch, seqlen_bucket
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
        labels=array(st.integers(0, VOCAB.size - 1), np.int32) if draw(st.booleans()) else None,
        source=draw(st.integers(0, 3)),
    )


def slow_model(documents, T, S):
    """One row at a time: (id, label, weight or None where not scored, position), then cu_seqlens and counts."""
    rows, cu = [], [0]
    counts = {"next_token": 0.0, "text": 0.0, "visual": 0.0}
    for d in documents:
        for i, token in enumerate(d.ids.tolist()):
            label, weight = IGNORE, None
            at = i + 1 if d.labels is None else i  # the token that is the label, or the row that has one
            if at < len(d.ids):
                target = int(d.ids[at] if d.labels is None else d.labels[at])
                worth = 1.0 if d.loss is None else float(d.loss[at])
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


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_portable_loops_find_the_same(seed, heavy):
    """Documents around the widths of vectors, so that heads, bodies and tails of the loops all run."""
    draw = np.random.default_rng(seed)
    lengths = np.concatenate([draw.integers(0, 4, 5), draw.integers(5, 70, 9)])
    found = []
    for portable in (False, True):
        draw = np.random.default_rng(seed)
        bins = Bins(lengths, np.array([8, 6]), 700, 10)
        arrays = bins.flat_ids, bins.flat_weights, bins.flat_labels, np.empty(1400, np.int32)
        arrays[0][:] = draw.integers(-1, VOCAB.size, 1400)
        arrays[1][:] = draw.choice([0.0, 1.0, 0.25 if heavy else 1.0], 1400)
        arrays[2][:] = draw.integers(0, VOCAB.size, 1400)
        stored = draw.integers(0, 2, len(lengths)).astype(np.uint8)
        rest = bins.cu.reshape(-1), bins.documents, stored, VOCAB.bases, VOCAB.size, portable
        bad, counts, scored, odd = finish_bins(*arrays, *rest)
        found.append([bad, counts.tolist(), scored.tolist(), odd.tolist(), *(a.tolist() for a in arrays)])
    assert found[0] == found[1]
    assert found[0][3] == [heavy, heavy]


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


@pytest.mark.parametrize("wrong", [12, 2**31 - 1])
def test_a_label_outside_the_vocabulary_names_its_document(wrong):
    documents = [Document(np.array([1])), Document(np.array([1, 2]), key=0xC, labels=np.array([0, wrong]))]
    with pytest.raises(ValueError, match=rf"document 0xc: label {wrong} is outside the vocabulary 0\.\.11"):
        PackedBatch.build(documents, VOCAB)


def test_slots_by_hand():
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    documents = [
        Document(np.array([1, -1, 2]), slots={"clip": [(1, rows[:1])]}),
        Document(np.array([-1, -1, -1, 3]), slots={"clip": [(0, rows[1:3]), (2, rows[3:])]}),
    ]
    clip = PackedBatch.build(documents, VOCAB, pack_tokens=9, caps=(6, 4)).slots["clip"]
    assert clip.data.tolist() == [*rows.tolist(), [0.0] * 3, [0.0] * 3]
    assert clip.index.tolist() == [1, 3, 4, 5, 9, 9]
    assert clip.cu.tolist() == [0, 1, 3, 4, 6, 6]
    with pytest.raises(ValueError, match="4 slot rows in 3 segments; a batch takes 3 rows in 4 segments"):
        PackedBatch.build(documents, VOCAB, pack_tokens=9, caps=(3, 4))


def test_rows_by_class_are_grouped_and_padded():
    draw = np.random.default_rng(0)
    lengths = np.array([1500, 3, 700, 0, 40])
    bins = Bins(lengths, np.array([2, 3]), 1700, 6)
    for row, length in zip(bins.rows, lengths):
        bins.flat_ids[row : row + length] = draw.choice([-1, 3, 6, 7, 11], length)
    bins.flat_weights[...] = 1.0
    for batch in bins.finish(VOCAB, False, ("rows_by_class",)):
        labels, rows, cu = batch.labels.numpy(), batch.rows_by_class.numpy(), batch.class_cu.tolist()
        expected = [np.flatnonzero((labels >= low) & (labels < high)) for low, high in ((0, 7), (7, 12))]
        assert cu == list(accumulate([-(-len(e) // 512) * 512 for e in expected], initial=0))
        for group, start, stop in zip(expected, cu, cu[1:]):
            assert rows[start:stop].tolist() == [*group, *[1700] * (stop - start - len(group))]
        assert len(rows) % 512 == 0
        assert set(rows[cu[-1] :].tolist()) <= {1700}


@pytest.mark.parametrize("name", ["loss", "positions", "labels"])
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
    slots = {"clip": [(0, np.ones((1, 3), dtype=np.float32))]}
    batch = PackedBatch.build([Document(np.array([-1, 2]), loss=loss, slots=slots)], VOCAB)
    batch.kernel_tables["order"] = (torch.arange(3), torch.zeros(2))
    moved = batch.to("meta")
    assert [t.device.type for t in moved.kernel_tables["order"]] == ["meta", "meta"]
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta", name
            assert value.device.type == "cpu", name
        elif name not in ("slots", "kernel_tables"):
            assert getattr(moved, name) is value, name
    [before], [after] = batch.slots.values(), moved.slots.values()
    assert {t.device.type for t in (after.data, after.index, after.cu)} == {"meta"}
    assert (before.data.device.type, after.role) == ("cpu", "replace")


def test_buckets_are_the_smallest_that_hold():
    buckets = [2**i for i in range(4, 25)] + [3 * 2**i for i in range(3, 25)]
    for length in [0, 1, *range(14, 400), *(b + d for b in buckets[:20] for d in (-1, 0, 1))]:
        assert seqlen_bucket(length) == min(b for b in buckets if b >= length)
