from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_dataset import SCHEMA, SPECIALS, VOCAB, MemoryDataset, StoredSample, pictures, texts

from vtrain.batch import PackedBatch
from vtrain.data.compose import LanguageModel, TextToImage, make_composer
from vtrain.data.format import Modality, Role
from vtrain.data.samples import pack_runs
from vtrain.rng import fold, uniform

T2I, SOI = SPECIALS["<|t2i|>"], SPECIALS["<|soi|>"]


def draw(composer: TextToImage, epoch: int, key: int, field: str) -> float:
    return float(uniform(fold(composer.seed, epoch), np.array([key ^ fold(0, field)], dtype=np.uint64))[0])


def slow_text_to_image(composer: TextToImage, sample: StoredSample, epoch: int) -> tuple[list[int], list[float]]:
    """Ids and loss weights of one sample by the sentence in the class's docstring."""
    captions, codes, start = [], None, 0
    for length, modality, role in sample.segments:
        piece, start = sample.ids[start : start + length], start + length
        if modality == Modality.TEXT and role == Role.INPUT:
            captions.append(piece)
        if modality == Modality.IMAGE and role == Role.TARGET:
            codes = piece
    caption = []
    if captions and draw(composer, epoch, sample.key, "drop_caption") >= composer.drop_caption:
        caption = captions[int(draw(composer, epoch, sample.key, "caption") * len(captions))]
        caption = caption[: composer.max_caption_tokens or None]
    ids = [T2I, *caption, SOI, *codes]
    return ids, [composer.text_weight] * (len(ids) - len(codes)) + [1.0] * len(codes)


@settings(max_examples=150, deadline=None)
@given(
    captions=st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=12),
    codes=st.integers(0, 5),
    drop=st.sampled_from([0.0, 0.3, 1.0]),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    limit=st.integers(0, 4),
    epoch=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
)
def test_text_to_image_equals_the_slow_composer(captions, codes, drop, weight, limit, epoch, order):
    dataset = pictures(captions, codes)
    composer = TextToImage(seed=4, drop_caption=drop, text_weight=weight, max_caption_tokens=limit)
    indices = np.array([order.randrange(len(captions)) for _ in range(order.randrange(20))], dtype=np.int64)
    documents = composer.compose(dataset, indices, epoch)
    lengths = composer.lengths(dataset, indices, epoch)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(d) for d in documents]
    for index, document in zip(indices, documents):
        ids, loss = slow_text_to_image(composer, dataset.samples[index], epoch)
        assert document.ids.tolist() == ids
        assert document.ids.dtype == np.int32
        assert document.key == dataset.samples[index].key
        assert loss == (document.loss.tolist() if document.loss is not None else [1.0] * len(ids))


def test_other_segments_are_left_out():
    base = VOCAB["visual"].base
    sample = StoredSample(
        ids=[1, 2, 3, base, base + 1, 4, 5, base + 2, base + 3],
        key=9,
        segments=[
            (1, Modality.TEXT, Role.SYSTEM),
            (2, Modality.TEXT, Role.INPUT),
            (2, Modality.IMAGE, Role.INPUT),
            (2, Modality.TEXT, Role.TARGET),
            (2, Modality.IMAGE, Role.TARGET),
        ],
    )
    [document] = TextToImage(drop_caption=0).compose(MemoryDataset([sample]), np.array([0]), 0)
    assert document.ids.tolist() == [T2I, 2, 3, SOI, base + 2, base + 3]


def test_captions_are_dropped_and_chosen_at_the_right_rates():
    n, rate = 6000, 0.1
    dataset = pictures([[1, 2, 3]] * n, codes=1)
    composer = TextToImage(seed=1, drop_caption=rate)
    indices = np.arange(n)
    caption = [composer.lengths(dataset, indices, epoch) - 3 for epoch in range(3)]
    for lengths in caption:
        counts = np.bincount(lengths, minlength=4)
        for count, p in zip(counts, [rate, *[(1 - rate) / 3] * 3]):
            assert abs(count - n * p) < 4.5 * np.sqrt(n * p * (1 - p))
    dropped = [lengths == 0 for lengths in caption]
    both = int((dropped[0] & dropped[1]).sum())  # epochs are independent
    assert abs(both - n * rate**2) < 4.5 * np.sqrt(n * rate**2)
    other_seed = replace(composer, seed=2).lengths(dataset, indices, 0)
    assert (other_seed != composer.lengths(dataset, indices, 0)).mean() > 0.4


def test_text_weight_decides_what_is_scored():
    dataset = pictures([[3]], codes=4)
    codes = {"next_token": 4.0, "text": 0.0, "visual": 4.0}
    expected = {
        1.0: codes | {"next_token": 8.0, "text": 4.0},
        0.0: codes,
        0.5: codes | {"next_token": 6.0, "text": 2.0},
    }
    for weight, counts in expected.items():
        composer = TextToImage(drop_caption=0, text_weight=weight)
        batch = PackedBatch.build(composer.compose(dataset, np.array([0]), 0), VOCAB)
        assert batch.counts == counts
        assert composer.weighted(SCHEMA) == (batch.weights is not None) == (weight == 0.5)


def test_a_sample_without_one_picture_is_named():
    caption = (2, Modality.TEXT, Role.INPUT)
    picture = (1, Modality.IMAGE, Role.TARGET)
    for segments, found in (([caption], 0), ([picture, picture], 2)):
        dataset = MemoryDataset([StoredSample([200] * 2, 0xABC, segments)], "broken")
        with pytest.raises(ValueError, match=rf"broken: sample 0xabc has {found} target image segments"):
            TextToImage().lengths(dataset, np.array([0]), 0)


def test_missing_special_token_is_named():
    dataset = pictures([[1]], name="plain", schema=replace(SCHEMA, specials={"<|t2i|>": 196}))
    with pytest.raises(ValueError, match=r"plain: .*'<\|soi\|>'"):
        TextToImage().compose(dataset, np.array([0]), 0)


def test_language_model_keeps_ids_and_follows_the_runs():
    schema = replace(SCHEMA, loss_weights=(0.0, 1.0, 0.25, *[1.0] * 253))
    samples = [
        StoredSample([5, 6, 7, 8, 9], 1, runs=pack_runs([2, 1, 2], [0, 1, 2]).tolist()),
        StoredSample([3, 4], 2),
        StoredSample([], 3),
    ]
    dataset = MemoryDataset(samples, schema=schema)
    composer = LanguageModel()
    indices = np.array([2, 0, 1, 0])
    documents = composer.compose(dataset, indices, 0)
    assert [d.ids.tolist() for d in documents] == [samples[i].ids for i in indices]
    assert [d.key for d in documents] == [3, 1, 2, 1]
    assert composer.lengths(dataset, indices, 0).tolist() == [0, 5, 2, 5]
    assert documents[1].loss.tolist() == [0, 0, 1, 0.25, 0.25]
    assert documents[2].loss is None
    assert composer.weighted(schema)
    assert not composer.weighted(SCHEMA)


def test_composers_by_name():
    composer = make_composer("text_to_image", seed=3, drop_caption=0.2)
    assert composer == TextToImage(seed=3, drop_caption=0.2)
    assert composer.settings()["name"] == "text_to_image"
    assert make_composer("language_model").lengths(texts([4]), np.array([0]), 0).tolist() == [4]
    with pytest.raises(ValueError, match="unknown composer: 'text_to_imag'; did you mean 'text_to_image'"):
        make_composer("text_to_imag")
    with pytest.raises(ValueError, match="option of the composer 'language_model': 'x'; known: seed"):
        make_composer("language_model", x=1)


@pytest.mark.parametrize(
    "options", [{"drop_caption": -0.1}, {"drop_caption": 1.1}, {"text_weight": -1}, {"max_caption_tokens": -1}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        TextToImage(**options)
