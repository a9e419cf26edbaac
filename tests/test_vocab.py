"""Vocabulary: ranges tile the ids, lookups agree with a walk over the ranges, bad vocabularies are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtrain.vocab import Range, Vocabulary

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=5)


def named(sizes):
    return Vocabulary.of(**{f"r{i}": size for i, size in enumerate(sizes)})


@given(sizes)
def test_ranges_tile_the_ids(sizes):
    vocab = named(sizes)
    owner = [i for i, size in enumerate(sizes) for _ in range(size)]
    assert vocab.size == sum(sizes) == len(owner)
    assert vocab.sizes == sizes
    assert vocab.bases == [sum(sizes[:i]) for i in range(len(sizes))]
    assert vocab.names == tuple(f"r{i}" for i in range(len(sizes)))
    assert [vocab.index_of(token) for token in range(vocab.size)] == owner
    ids = np.arange(vocab.size, dtype=np.int32)
    classes = vocab.classify(ids)
    assert classes.dtype == np.int8
    assert classes.tolist() == owner
    for r in vocab.ranges:
        assert vocab[r.name] is r
        assert r.end == r.base + r.size


def test_negative_ids_have_no_class():
    ids = np.array([[-100, -1], [0, 7]], dtype=np.int32)
    assert Vocabulary.of(text=5, visual=3).classify(ids).tolist() == [[-1, -1], [0, 1]]


@pytest.mark.parametrize(("size", "rows"), [(1, 128), (127, 128), (128, 128), (129, 256), (151672, 151680)])
def test_rows_are_padded_to_128(size, rows):
    assert Range("text", 0, size).rows == rows


@given(sizes)
def test_json_round_trip(sizes):
    vocab = named(sizes)
    again = Vocabulary.from_json(vocab.to_json())
    assert again == vocab
    assert str(again) == str(vocab)


def test_contains_and_unknown_name():
    vocab = Vocabulary.of(text=5, visual=3)
    assert "visual" in vocab
    assert "vbpe" not in vocab
    with pytest.raises(KeyError, match="no range 'vbpe'; it has text, visual"):
        vocab["vbpe"]


@pytest.mark.parametrize("token", [-1, 8, 2**40])
def test_index_of_an_id_outside(token):
    with pytest.raises(ValueError, match=rf"id {token} is outside the vocabulary 0\.\.7"):
        Vocabulary.of(text=5, visual=3).index_of(token)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ((), "at least one range"),
        ((Range("text", 0, 0),), "'text': base 0, size 0"),
        ((Range("text", 0, -3),), "size -3"),
        ((Range("text", 1, 3),), "expected base 0"),
        ((Range("text", 0, 3), Range("visual", 4, 3)), "'visual': base 4, size 3; expected base 3"),
        ((Range("text", 0, 3), Range("text", 3, 3)), "names repeat"),
        ((Range("text", 0, 2**31),), "int32"),
        ((Range("text.a", 0, 3),), "'text.a': expected a name of letters"),
        ((Range("", 0, 3),), "'': expected a name"),
        ((Range(7, 0, 3),), "range 7: expected a name"),
    ],
)
def test_bad_vocabularies(ranges, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(ranges)


def test_names_that_repeat_in_a_file():
    with pytest.raises(ValueError, match="names repeat"):
        Vocabulary.from_json([["text", 5], ["text", 7]])


@pytest.mark.parametrize("size", [1.5, "64", None, [3]])
def test_sizes_in_a_file_are_integers(size):
    with pytest.raises(TypeError):
        Vocabulary.from_json([["text", size]])


def test_numpy_sizes_become_numbers_that_json_knows():
    assert str(Vocabulary.of(text=np.int64(5))) == '[["text", 5]]'


def test_the_largest_vocabulary_is_legal():
    assert Vocabulary.of(text=2**31 - 1).size == 2**31 - 1
