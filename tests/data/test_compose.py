from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_dataset import SCHEMA, SPECIALS, VOCAB, MemoryDataset, StoredSample, documents, pictures, texts

from vtrain.batch import PackedBatch
from vtrain.data.compose import Chat, LanguageModel, TextToImage, make_composer
from vtrain.data.format import Modality, Role, Schema
from vtrain.data.samples import pack_runs
from vtrain.rng import fold, uniform
from vtrain.vocab import Vocabulary

T2I, SOI = SPECIALS["<|t2i|>"], SPECIALS["<|soi|>"]


def draw(composer: TextToImage, epoch: int, key: int, field: str) -> float:
    return float(uniform(fold(composer.seed, epoch), np.array([key ^ fold(0, field)], dtype=np.uint64))[0])


def slow_text_to_image(composer: TextToImage, sample: StoredSample, epoch: int) -> tuple[list[int], list[float]]:
    """Ids and loss weights of one sample by the sentences in the class's docstring."""
    captions, codes, start = [], None, 0
    for length, modality, role in sample.segments:
        piece, start = sample.ids[start : start + length], start + length
        if modality == Modality.TEXT and role == Role.INPUT:
            captions.append(piece)
        if modality == Modality.IMAGE and role == Role.TARGET:
            codes = piece
    prefix, caption = [], []
    if captions and draw(composer, epoch, sample.key, "drop_caption") >= composer.drop_caption:
        caption = captions[int(draw(composer, epoch, sample.key, "caption") * len(captions))]
        if not composer.sample_short:
            caption = captions[1] if len(captions) > 1 else captions[0]
        caption = caption[: composer.max_caption_tokens or None]
        if composer.prefixes:
            prefix = composer.prefixes[int(draw(composer, epoch, sample.key, "prefix") * len(composer.prefixes))]
    ids = [T2I, *prefix, *caption, SOI, *codes]
    return ids, [composer.text_weight] * (len(ids) - len(codes)) + [1.0] * len(codes)


@settings(max_examples=150, deadline=None)
@given(
    captions=st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=12),
    codes=st.integers(0, 5),
    drop=st.sampled_from([0.0, 0.3, 1.0]),
    weight=st.sampled_from([0.0, 0.5, 1.0]),
    limit=st.integers(0, 4),
    short=st.booleans(),
    prefixes=st.lists(st.lists(st.integers(0, 199), max_size=5).map(tuple), max_size=4).map(tuple),
    epoch=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
)
def test_text_to_image_equals_the_slow_composer(captions, codes, drop, weight, limit, short, prefixes, epoch, order):
    dataset = pictures(captions, codes)
    composer = TextToImage(4, drop, weight, limit, short, prefixes)
    indices = np.array([order.randrange(len(captions)) for _ in range(order.randrange(20))], dtype=np.int64)
    made = documents(composer, dataset, indices, epoch)
    lengths = composer.lengths(dataset, indices, epoch)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(d) for d in made]
    assert lengths.tolist() == composer.compose(dataset, indices, epoch).lengths().tolist()
    for index, document in zip(indices, made):
        ids, loss = slow_text_to_image(composer, dataset.samples[index], epoch)
        assert document.ids.tolist() == ids
        assert document.key == dataset.samples[index].key
        assert document.loss.tolist() == loss


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
    [document] = documents(TextToImage(drop_caption=0), MemoryDataset([sample]), [0], 0)
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


SIMPLEAR = ["<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>"]


def test_a_sequence_of_simplear_is_as_written_by_hand():
    """Its ids: 151665 texts of Qwen2.5, seven specials, 64000 codes. A long caption never cuts codes."""
    vocab = Vocabulary.of(text=151672, visual=64000)
    schema = Schema(vocab, {name: 151665 + i for i, name in enumerate(SIMPLEAR)})
    caption, codes = [*range(100, 120)], [0, 63999, 5, 5]
    sample = StoredSample(
        [64, 65, *caption, *(151672 + code for code in codes)],
        77,
        [(2, Modality.TEXT, Role.INPUT), (20, Modality.TEXT, Role.INPUT), (4, Modality.IMAGE, Role.TARGET)],
    )
    dataset = MemoryDataset([sample], schema=schema)
    composer = TextToImage(drop_caption=0, max_caption_tokens=6, sample_short=False, prefixes=((32, 34981, 315),))
    [document] = documents(composer, dataset, [0], 0)
    text = [151665, 32, 34981, 315, 100, 101, 102, 103, 104, 105, 151667]
    assert document.ids.tolist() == [*text, 151672, 215671, 151677, 151677]
    batch = PackedBatch.build([document], vocab)
    assert batch.labels.tolist() == [*document.ids[1:].tolist(), -100]  # nothing but the padding is masked
    assert batch.counts == {"next_token": 14, "text": 10, "visual": 4}
    [document] = documents(replace(composer, drop_caption=1.0), dataset, [0], 0)
    assert document.ids.tolist() == [151665, 151667, 151672, 215671, 151677, 151677]


def test_which_caption_is_used_without_sample_short():
    dataset = pictures([[4], [2, 7], [3, 5, 6], []])
    composer = TextToImage(drop_caption=0, sample_short=False)
    for epoch in range(3):
        assert (composer.lengths(dataset, np.arange(4), epoch) - 6).tolist() == [4, 7, 5, 0]


def test_prefixes_are_uniform_and_drawn_apart_from_the_rest():
    n, prefixes = 6000, tuple((k,) * k for k in range(20))  # the first is empty
    dataset, indices = pictures([[3, 4]] * n, codes=1), np.arange(n)
    plain = TextToImage(seed=5, drop_caption=0.1)
    composer = replace(plain, prefixes=prefixes)
    bare = [plain.lengths(dataset, indices, epoch) - 3 for epoch in range(2)]
    added = [composer.lengths(dataset, indices, epoch) - 3 - bare[epoch] for epoch in range(2)]
    for caption, prefix in zip(bare, added):
        kept = caption > 0
        assert not prefix[~kept].any()
        assert abs(int((~kept).sum()) - 0.1 * n) < 3 * np.sqrt(0.09 * n)
        for of in (kept, caption == 3, caption == 4):  # whichever caption was drawn
            counts = np.bincount(prefix[of], minlength=20)
            assert len(counts) == 20
            expected = counts.sum() / 20
            assert ((counts - expected) ** 2 / expected).sum() < 50.8  # chi-square, 19 degrees of freedom, p = 1e-4
    assert (added[0] != added[1]).mean() > 0.8  # epochs are independent
    assert (replace(composer, seed=6).lengths(dataset, indices, 0) != bare[0] + added[0] + 3).mean() > 0.8


def test_settings_of_before_stay_the_same():
    """A state of a loader that knew neither prefixes nor sample_short is resumed, and its batches are the same."""
    plain = TextToImage(seed=2)
    older = {"name": "text_to_image", "seed": 2, "drop_caption": 0.1, "text_weight": 1.0, "max_caption_tokens": 0}
    assert plain.settings() == older
    assert replace(plain, sample_short=False, prefixes=((1, 2),)).settings() == older | {
        "sample_short": False,
        "prefixes": ((1, 2),),
    }
    dataset = pictures([[2, 3, 4]] * 9, codes=2)
    pieces = plain.compose(dataset, np.arange(9), 0)
    keys = [sample.key for sample in dataset.samples]
    chosen = [int(draw(plain, 0, key, "caption") * 3) * (draw(plain, 0, key, "drop_caption") >= 0.1) for key in keys]
    assert pieces.cu.tolist() == list(range(0, 37, 4))
    assert pieces.start[1::4].tolist() == [(0, 2, 5)[which] for which in chosen]


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
        batch = PackedBatch.build(documents(composer, dataset, [0], 0), VOCAB)
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
    made = documents(composer, dataset, indices, 0)
    assert [d.ids.tolist() for d in made] == [samples[i].ids for i in indices]
    assert composer.lengths(dataset, indices, 0).tolist() == [0, 5, 2, 5]
    assert made[1].loss.tolist() == [0, 0, 1, 0.25, 0.25]
    assert made[2].loss.tolist() == [1, 1]
    assert composer.weighted(schema)
    assert not composer.weighted(SCHEMA)


def chats(turns: list[list[tuple]], schema=SCHEMA, name: str = "chats") -> MemoryDataset:
    """Samples of (role, tokens, picture rows): a turn of text, before it a feature segment unless rows is None."""
    samples, value = [], 0
    for i, sample in enumerate(turns):
        ids, segments, features = [], [], []
        for role, tokens, rows in sample:
            if rows is not None:
                segments.append((0, Modality.FEATURE, Role.INPUT))
                features.append(np.arange(value, value + 3 * rows, dtype=np.float32).reshape(rows, 3))
                value += 3 * rows
            segments.append((tokens, Modality.TEXT, role))
            features.append(np.zeros((0, 3), np.float32))
            ids += [(value + t) % 190 for t in range(tokens)]
            value += tokens
        samples.append(StoredSample(ids, 100 + i, segments, labels=[(t + 1) % 190 for t in ids]))
        if any(rows is not None for _, _, rows in sample):
            samples[-1].features = {"clip": features}
    return MemoryDataset(samples, name, schema)


USER, ASSISTANT = Role.USER, Role.ASSISTANT


def test_chat_by_hand():
    dataset = chats([[(USER, 2, 3), (ASSISTANT, 3, None), (USER, 1, 2), (ASSISTANT, 1, None)], [(USER, 2, None)], []])
    first, second, _ = dataset.samples
    composer = Chat(features="clip")
    rows = np.concatenate(first.features["clip"])
    one, two, three = documents(composer, dataset, [0, 1, 2], 0)
    assert one.ids.tolist() == [-1, -1, -1, *first.ids[:5], -1, -1, *first.ids[5:]]
    assert one.loss.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert [(at, part.tolist()) for at, part in one.slots["clip"]] == [(0, rows[:3].tolist()), (8, rows[3:].tolist())]
    assert (two.ids.tolist(), two.loss.tolist(), two.slots) == (second.ids, [0, 0], {})
    assert len(three) == 0
    assert composer.lengths(dataset, np.arange(3), 0).tolist() == [12, 2, 0]
    assert composer.extents(dataset, np.arange(3), 0).tolist() == [[5, 2], [0, 0], [0, 0]]
    assert {*documents(Chat(features="clip", train_on="all"), dataset, [0], 0)[0].loss} == {1.0}
    assert not composer.weighted(SCHEMA)


@pytest.mark.parametrize("features", ["", "clip"])
def test_ids_in_a_feature_segment_are_ids(features):
    """Codes of a tower's own quantiser may stand there: the twin has no rows for them."""
    sample = StoredSample([7, 8, 9], 5, [(2, Modality.FEATURE, Role.INPUT), (1, Modality.TEXT, ASSISTANT)])
    sample.features["clip"] = [np.zeros((0, 3), np.float32)] * 2
    [found] = documents(Chat(features=features), MemoryDataset([sample]), [0], 0)
    assert (found.ids.tolist(), found.loss.tolist()) == ([7, 8, 9], [0, 0, 1])


def test_chat_of_what_it_cannot_use():
    dataset = chats([[(USER, 2, 3)]])
    with pytest.raises(ValueError, match="chats: sample 0x64 has feature segments; chat expects the name of the twin"):
        Chat().compose(dataset, np.array([0]), 0)
    dataset.samples[0].features["clip"].reverse()  # the rows stand at the text
    with pytest.raises(ValueError, match="sample 0x64 has rows of clip at a segment with tokens"):
        Chat(features="clip").compose(dataset, np.array([0]), 0)
    with pytest.raises(ValueError, match="sample 0x9 has no segments"):
        Chat().compose(MemoryDataset([StoredSample([], 8), StoredSample([1], 9)]), np.array([0, 1]), 0)
    with pytest.raises(ValueError, match="train_on is 'user'; expected assistant or all"):
        Chat(train_on="user")


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
    "options",
    [
        {"drop_caption": -0.1},
        {"drop_caption": 1.1},
        {"text_weight": -1},
        {"max_caption_tokens": -1},
        {"prefixes": ((3,), (4, -2))},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        TextToImage(**options)
