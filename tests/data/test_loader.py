import json
import logging
import subprocess
import sys
import threading
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest
import torch
from memory_dataset import SCHEMA, SPECIALS, VOCAB, MemoryDataset, StoredSample, pictures, texts

from vtrain.batch import IGNORE, PackedBatch
from vtrain.data import Dataset, LanguageModel, Loader, ShardWriter, Source, TextToImage, buffers, sequential_batches
from vtrain.data.format import SEGMENT, SEGMENT_SPAN
from vtrain.data.manifest import publish
from vtrain.data.plan import Misfits
from vtrain.vocab import Vocabulary


def random_texts(n: int, name: str, low: int = 1, high: int = 40) -> MemoryDataset:
    return texts(np.random.default_rng(len(name) + n).integers(low, high + 1, n).tolist(), name)


def random_pictures(n: int, name: str) -> MemoryDataset:
    draw = np.random.default_rng(n)
    return pictures([draw.integers(0, 9, draw.integers(0, 4)).tolist() for _ in range(n)], 16, name)


SOURCES = [Source(random_texts(83, "a"), 3.0), Source(random_texts(2050, "b"), 2.0), Source(random_texts(7, "c"), 1.0)]


def loader(sources=SOURCES, composer=None, prefetch=0, **options) -> Loader:
    options = {"pack_tokens": 100, "bins_per_step": 5, "seed": 3, "pool": 40} | options
    return Loader(sources, composer or LanguageModel(), VOCAB, prefetch=prefetch, **options)


def content(batch: PackedBatch) -> tuple:
    tensors = (batch.ids, batch.labels, batch.positions, batch.cu_seqlens, batch.doc_keys, batch.weights)
    return (
        *(None if t is None else tuple(t.tolist()) for t in tensors),
        batch.documents,
        batch.tokens,
        tuple(batch.sources.tolist()),
    )


def take(loader: Loader, steps: int) -> list:
    return list(islice(iter(loader), steps))


def bins_of(loaders: list[Loader], steps: int) -> list[list[tuple]]:
    """Per step the real bins in dealt order: micro-step by micro-step, rank by rank."""
    of_ranks = [take(each, steps) for each in loaders]
    assert len({len(of_rank) for of_rank in of_ranks}) == 1
    merged = []
    for ranks in zip(*of_ranks):
        assert len({(s.number, s.bins, s.documents, s.tokens) for s in ranks}) == 1
        batches = [s.batches[a] for a in range(len(ranks[0].batches)) for s in ranks]
        assert [b.documents > 0 for b in batches] == [True] * ranks[0].bins + [False] * (len(batches) - ranks[0].bins)
        assert sum(b.tokens for b in batches) == ranks[0].tokens
        assert sum(b.documents for b in batches) == ranks[0].documents
        merged.append([content(b) for b in batches if b.documents])
    return merged


def group(world: int, **options) -> list[Loader]:
    return [loader(rank=rank, world=world, **options) for rank in range(world)]


def keys_of(batches) -> Counter:
    return Counter(k for b in batches for k in b.doc_keys[: b.documents].tolist())


def stored_keys(dataset: MemoryDataset) -> Counter:
    return Counter(np.array([s.key for s in dataset.samples if s.ids], dtype=np.uint64).view(np.int64).tolist())


@pytest.mark.parametrize("world", [2, 3, 8])
def test_n_ranks_get_the_bins_of_one(world):
    assert bins_of(group(world), 12) == bins_of(group(1), 12)


def test_every_rank_has_the_same_number_of_batches_with_padding_where_bins_are_missing():
    steps = [next(iter(each)) for each in group(3)]
    assert [len(s.batches) for s in steps] == [2, 2, 2]
    padding = steps[2].batches[1]
    assert (padding.documents, padding.tokens, padding.counts["next_token"]) == (0, 0, 0.0)
    assert padding.ids.tolist() == [-1] * 100
    assert padding.labels.tolist() == [IGNORE] * 100
    shapes = {(b.ids.shape, b.cu_seqlens.shape, b.doc_keys.shape) for s in steps for b in s.batches}
    assert shapes == {((100,), (9,), (8,))}  # 100 // 16 + 2 sequences


@pytest.mark.parametrize("stops", [[1], [3, 3, 4], [9]])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact_with_other_world_sizes(stops, prefetch):
    options = {"composer": TextToImage(seed=1, drop_caption=0.5), "prefetch": prefetch}
    options["sources"] = [Source(random_pictures(60, "p"), 1.0), Source(random_pictures(45, "q"), 2.0)]
    whole = bins_of(group(1, **options), sum(stops) + 4)
    resumed, state = [], None
    for world, stop in zip((2, 1, 3, 2), [*stops, 4]):
        ranks = group(world, **options)
        for each in ranks:
            if state is not None:
                each.load_state_dict(json.loads(state))
        resumed += bins_of(ranks, stop)
        states = {json.dumps(each.state_dict(), sort_keys=True) for each in ranks}
        assert len(states) == 1
        state = states.pop()
        assert len(state) < 3000
    assert resumed == whole


def test_state_describes_the_last_step_handed_out_not_the_prefetched_ones():
    whole = take(loader(), 8)
    first = loader(prefetch=4)
    states = []
    for step in islice(iter(first), 5):
        states.append(first.state_dict())
        assert first.state_dict()["step"] == first.steps == step.number + 1
    for done, state in enumerate(states, start=1):
        second = loader()
        second.load_state_dict(state)
        assert [content(b) for b in next(iter(second)).batches] == [content(b) for b in whole[done].batches]


def test_iterating_again_goes_on():
    whole = [[content(b) for b in s.batches] for s in take(loader(), 6)]
    parted = loader(prefetch=2)
    assert [[content(b) for b in s.batches] for n in (2, 1, 3) for s in take(parted, n)] == whole


@pytest.mark.parametrize("world", [1, 2])
def test_every_sample_exactly_once_per_epoch(world):
    sources = [replace(SOURCES[0], max_epochs=2), replace(SOURCES[2], max_epochs=3)]
    batches = [b for each in group(world, sources=sources) for step in each for b in step.batches]
    expected = stored_keys(SOURCES[0].dataset), stored_keys(SOURCES[2].dataset)
    assert keys_of(batches) == Counter(dict.fromkeys(expected[0], 2) | dict.fromkeys(expected[1], 3))
    for batch in batches:  # and every document is the sample of its key, whole
        for start, stop in zip(batch.cu_seqlens[: batch.documents], batch.cu_seqlens[1:]):
            assert len(set(batch.ids[start:stop].tolist())) == 1
            assert batch.positions[start:stop].tolist() == list(range(stop - start))


def test_epochs_and_sources_have_orders_of_their_own():
    source = Source(texts([10] * 50, "one"), max_epochs=3)
    batches = [b for step in loader([source], bins_per_step=1) for b in step.batches]
    keys = [k for b in batches for k in b.doc_keys[: b.documents].tolist()]
    epochs = [keys[i : i + 50] for i in (0, 50, 100)]
    assert all(Counter(e) == Counter(epochs[0]) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_reports_of_sources():
    documents, tokens = Counter(), Counter()
    run = loader(bins_per_step=4)
    for step in take(run, 30):
        assert sum(r.tokens for r in step.sources.values()) == step.tokens
        assert sum(r.documents for r in step.sources.values()) == step.documents
        for number, (name, report) in enumerate(step.sources.items()):
            assert report.documents == sum(int((b.sources == number).sum()) for b in step.batches)
            documents[name] += report.documents
            tokens[name] += report.tokens
            assert documents[name] <= report.epoch * len(SOURCES[number].dataset) + 1e-9
    total = sum(tokens.values())
    for name, share in {"a": 3 / 6, "b": 2 / 6, "c": 1 / 6}.items():
        assert abs(tokens[name] / total - share) < 0.01


def test_every_source_may_have_a_composer_of_its_own():
    sources = [
        Source(random_pictures(30, "p"), max_epochs=1, composer=TextToImage(drop_caption=0)),
        Source(random_texts(40, "t"), max_epochs=1),
    ]
    batches = [b for step in loader(sources) for b in step.batches]
    assert keys_of(batches) == stored_keys(sources[0].dataset) + stored_keys(sources[1].dataset)
    for batch in batches:
        for start, source in zip(batch.cu_seqlens.tolist(), batch.sources[: batch.documents].tolist()):
            assert (batch.ids[start] == SPECIALS["<|t2i|>"]) == (source == 0)


def test_tables_are_made_where_they_are_asked_for():
    sources = [Source(random_pictures(30, "p"))]
    plain, *others = (
        take(loader(sources, TextToImage(), tables=tables), 4)
        for tables in ((), ("segments",), ("segments", "rows_by_class"))
    )
    for tables, steps in zip((("segments",), ("segments", "rows_by_class", "class_cu")), others):
        for step, expected in zip(steps, plain):
            assert [content(b) for b in step.batches] == [content(b) for b in expected.batches]
            for name in ("segments", "rows_by_class", "class_cu"):
                shapes = {None if getattr(b, name) is None else getattr(b, name).shape for b in step.batches}
                assert len(shapes) == 1
                assert (shapes == {None}) == (name not in tables)


def test_raw_packs_hold_the_tokens_of_the_batches():
    for raw, made in zip(take(loader(raw=True, prefetch=1), 12), take(loader(), 12)):
        assert (raw.number, raw.documents, raw.tokens, raw.sources) == (
            made.number,
            made.documents,
            made.tokens,
            made.sources,
        )
        for pack, batch in zip(raw.batches, made.batches):
            assert torch.equal(pack.ids, batch.ids)
            assert torch.equal(pack.cu_seqlens, batch.cu_seqlens)
            assert pack.keys.tolist() == batch.doc_keys.numpy().view(np.uint64)[: batch.documents].tolist()
    [step] = loader([Source(texts([5]), max_epochs=1)], raw=True, rank=4, world=5)
    assert (step.batches[0].tokens, step.batches[0].segments.dtype) == (0, SEGMENT_SPAN)
    with pytest.raises(ValueError, match=r"source 'a': raw packs .* is text_to_image, expected language_model"):
        loader(composer=TextToImage(), raw=True)
    with pytest.raises(ValueError, match="raw packs have no tables"):
        loader(raw=True, tables=("segments",))


def test_split_samples_keep_all_their_tokens():
    ids = np.random.default_rng(0).integers(0, 190, 457).tolist()
    dataset = MemoryDataset([StoredSample(ids, 5), StoredSample(ids[:31], 6)])
    batches = [b for s in loader([Source(dataset, max_epochs=1)], overlong="split") for b in s.batches]
    pieces = [
        b.ids[start:stop].tolist()
        for b in batches
        for key, start, stop in zip(b.doc_keys.tolist(), b.cu_seqlens.tolist(), b.cu_seqlens[1:].tolist())
        if key == 5
    ]
    assert sorted(x for piece in pieces for x in piece) == sorted(ids)
    assert all(piece == ids[at : at + 100] for at, piece in zip(starts_of(pieces, ids), pieces))
    for b in batches:  # every piece is a document of its own
        for start, stop in zip(b.cu_seqlens[: b.documents].tolist(), b.cu_seqlens[1:].tolist()):
            assert b.labels[start:stop].tolist() == [*b.ids[start + 1 : stop].tolist(), IGNORE]
            assert b.positions[start:stop].tolist() == list(range(stop - start))


def starts_of(pieces: list[list[int]], ids: list[int]) -> list[int]:
    return [next(at for at in range(0, len(ids), 100) if ids[at : at + 100] == piece) for piece in pieces]


@pytest.mark.parametrize("options", [{"prefetch": 3}, {"readahead": 4}, {"prefetch": 2, "readahead": 3}])
def test_nothing_of_a_step_depends_on_how_far_ahead_it_is_made(options):
    def of(run):
        return [(s.number, s.bins, s.tokens, s.sources, [content(b) for b in s.batches]) for s in take(run, 12)]

    assert of(loader(rank=1, world=2, **options)) == of(loader(rank=1, world=2))


def test_readahead_asks_for_the_samples_of_this_rank_before_they_are_read():
    source = Source(random_texts(300, "wanted"))
    numbers = {sample.key: i for i, sample in enumerate(source.dataset.samples)}
    run = loader([source], rank=1, world=2, readahead=3)
    used = []
    for number, step in enumerate(islice(iter(run), 8)):
        keys = [k for b in step.batches for k in b.doc_keys.numpy().view(np.uint64)[: b.documents].tolist()]
        used += [numbers[key] for key in keys]
        wanted = source.dataset.wanted
        assert wanted[: len(used)] == used
        planned = loader([Source(source.dataset)], rank=1, world=2)
        assert len(wanted) == sum(b.documents for s in take(planned, number + 4) for b in s.batches)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("raw", [False, True])
def test_batches_that_are_held_are_never_written_again(prefetch, raw):
    held, seen = [], []
    for step in take(loader(prefetch=prefetch, raw=raw), 40):
        held.append([(b.ids, b.cu_seqlens) for b in step.batches])
        seen.append([(b.ids.clone(), b.cu_seqlens.clone()) for b in step.batches])
    for mine, theirs in zip(held, seen):
        assert all(torch.equal(a, b) for x, y in zip(mine, theirs) for a, b in zip(x, y))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_memory_does_not_grow(prefetch, monkeypatch):
    """Three fields of a step have slabs of one shape: of the step in work, those ready, the two that are handed over,
    and the few spare ones of the pool."""
    pools = []

    class Watched(buffers.Buffers):
        def __init__(self, pinned: bool) -> None:
            super().__init__(pinned)
            pools.append(self)

    monkeypatch.setattr("vtrain.data.loader.Buffers", Watched)
    kept = None
    for number, step in enumerate(islice(iter(loader(prefetch=prefetch)), 200)):
        (pool,) = pools
        assert max(len(slabs) for slabs in pool._slabs.values()) <= 3 * (prefetch + 3) + buffers.SPARE
        if number == 20:
            kept = step.batches[2].ids  # one row of a slab
            as_it_was = kept.clone()
    assert torch.equal(kept, as_it_was)


def test_a_small_batch_by_hand():
    dataset = pictures([[2], []], codes=2)
    [one, two] = dataset.samples
    source, composer = Source(dataset, max_epochs=1), TextToImage(drop_caption=0)
    [step] = loader([source], composer, pack_tokens=12, max_documents=4, bins_per_step=1)
    [batch] = step.batches
    t2i, soi = SPECIALS["<|t2i|>"], SPECIALS["<|soi|>"]
    first, second = [t2i, *one.ids[:2], soi, *one.ids[2:]], [t2i, soi, *two.ids]
    keys = [one.key, two.key]
    if batch.cu_seqlens[1] == 4:  # the order of the epoch
        first, second, keys = second, first, keys[::-1]
    assert batch.ids.tolist() == [*first, *second, -1, -1]
    assert batch.labels.tolist() == [*first[1:], IGNORE, *second[1:], IGNORE, IGNORE, IGNORE]
    assert batch.positions.tolist() == [*range(len(first)), *range(len(second)), 0, 1]
    assert batch.cu_seqlens.tolist() == [0, len(first), 10, 12, 12]
    assert np.array(batch.doc_keys[:2]).view(np.uint64).tolist() == keys
    assert batch.counts == {"next_token": 8.0, "text": 4.0, "visual": 4.0}
    assert batch.weights is None


def test_all_batches_have_weights_when_one_might():
    sources = [Source(random_pictures(30, "p"))]
    for weight, expected in {0.5: True, 1.0: False}.items():
        steps = take(loader(sources, TextToImage(text_weight=weight), rank=2, world=3), 3)  # with a padding batch
        assert {b.weights is not None for s in steps for b in s.batches} == {expected}


def test_overlong_samples():
    dataset = texts([150, 20, 101, 0, 30, 100], "long")
    source = Source(dataset, max_epochs=1)
    with pytest.raises(ValueError, match=r"source 'long': sample \d \(key 0x\w+\) has 1\d\d tokens, a bin 100"):
        list(loader([source]))
    [dropped] = loader([source], overlong="drop")
    assert (dropped.documents, dropped.tokens) == (3, 150)
    assert dropped.sources["long"].misfits == Misfits(dropped=2, empty=1)
    cropped = list(loader([source], overlong="crop", bins_per_step=1, pool=1))
    assert sum(s.tokens for s in cropped) == 350
    assert cropped[-1].sources["long"].misfits == Misfits(cropped=2, empty=1)
    ids = Counter(i for s in cropped for b in s.batches for i in b.ids.tolist() if i >= 0)
    assert ids == Counter({0: 100, 1: 20, 2: 100, 4: 30, 5: 100})
    with pytest.raises(ValueError, match="overlong is 'cut'; expected one of error, drop, split, crop"):
        loader([source], overlong="cut")


@pytest.mark.parametrize("overlong", ["split", "crop"])
def test_a_long_caption_never_cuts_codes(overlong):
    """Pictures of 16 codes whose captions do not fit: cut texts are fine, cut pictures are not."""
    long, composer = pictures([[9], [90], [3]], 16, "long"), TextToImage(drop_caption=0)
    mixed = [Source(long, max_epochs=1), Source(texts([150], "texts"), composer=LanguageModel(), max_epochs=1)]
    said = rf"source 'long': sample 1 \(key 0x\w+\) has 108 tokens, a bin 100; overlong = {overlong} would cut codes"
    with pytest.raises(ValueError, match=said):
        list(loader(mixed, composer, overlong=overlong))
    with pytest.raises(ValueError, match=said):
        list(sequential_batches(long, composer, VOCAB, pack_tokens=100, overlong=overlong))
    short = [replace(mixed[0], tokens=(0, 100)), mixed[1]]  # a sample that is left out is no error
    assert list(loader(short, composer, overlong=overlong))[-1].sources["long"].misfits.filtered == 1
    for ok in (replace(composer, max_caption_tokens=82), replace(composer, drop_caption=1.0)):
        visual = VOCAB["visual"]
        ids = [i for s in loader(mixed, ok, overlong=overlong) for b in s.batches for i in b.ids.tolist()]
        assert sum(visual.base <= i < visual.end for i in ids) == 3 * 16


def test_misfits_and_cut_samples_survive_a_resume():
    sources = [Source(random_texts(300, "wide", 0, 130)), SOURCES[0]]
    whole = take(loader(sources, overlong="crop"), 20)
    first = loader(sources, overlong="crop")
    take(first, 11)
    second = loader(sources, overlong="crop")
    second.load_state_dict(first.state_dict())
    assert [(s.number, s.sources, [content(b) for b in s.batches]) for s in take(second, 9)] == [
        (s.number, s.sources, [content(b) for b in s.batches]) for s in whole[11:]
    ]
    assert whole[-1].sources["wide"].misfits.cropped > 10


def test_a_source_of_which_nothing_fits_is_an_error_not_a_hang():
    sources = [SOURCES[0], Source(texts([500] * 9, "giant"))]
    with pytest.raises(ValueError, match="source 'giant': 9 samples in a row"):
        take(loader(sources, overlong="drop"), 50)


def test_sources_that_mean_different_things_are_refused():
    cases = {
        "vocabulary": replace(SCHEMA, vocab=Vocabulary.of(text=200, visual=65)),
        "specials": replace(SCHEMA, specials={"<|t2i|>": 3}),
        "text tokenizer: text-sha and other": replace(SCHEMA, text_tokenizer="other"),
        "image tokenizer: image-sha and none": replace(SCHEMA, image_tokenizer=""),
    }
    for field, schema in cases.items():
        with pytest.raises(ValueError, match=f"sources 'a' and 'odd' cannot be mixed: {field}"):
            loader([SOURCES[0], Source(texts([3], "odd", schema))])
    with pytest.raises(ValueError, match=r"source 'a': its vocabulary is .* expected"):
        Loader(SOURCES, LanguageModel(), Vocabulary.of(text=9), pack_tokens=100, bins_per_step=1)
    with pytest.raises(ValueError, match="names repeat: a, a"):
        loader([SOURCES[0], SOURCES[0]])
    with pytest.raises(ValueError, match=r"found a MemoryDataset; expected Source\(dataset\)"):
        loader([texts([5])])
    with pytest.raises(ValueError, match=r"composer 'chat'; expected make_composer\('chat'\)"):
        loader([Source(texts([5]))], "chat")
    with pytest.raises(ValueError, match=r"'shards/x': a path; expected Dataset\(path\)"):
        Source("shards/x")
    with pytest.raises(ValueError, match="order 'blocks'; expected a BlockOrder, StoredOrder or None"):
        Source(texts([5]), order="blocks")
    with pytest.raises(ValueError, match="no data sources"):
        loader([])


def test_bad_sources_and_settings():
    with pytest.raises(ValueError, match="source 'nothing': the dataset nothing is empty"):
        Source(texts([], "nothing"))
    with pytest.raises(ValueError, match="max_epochs is 0"):
        Source(texts([1]), max_epochs=0)
    for options, message in {
        ("rank", 1): "rank 1 of 1",
        ("pack_tokens", 0): "pack_tokens is 0",
        ("bins_per_step", 0): "bins_per_step is 0",
        ("max_documents", 1): "max_documents is 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            loader(**dict([options]))


def test_states_are_json_whatever_the_settings_are_made_of():
    numbers = Source(texts([5, 6]), np.float32(2), max_epochs=np.int64(3), tokens=(np.int64(0), np.uint8(9)))
    options = {"pack_tokens": np.int32(100), "seed": np.int64(3), "bins_per_step": np.int64(5)}
    state = loader([numbers], LanguageModel(seed=np.int64(1)), **options).state_dict()
    plain = Source(texts([5, 6]), 2.0, max_epochs=3, tokens=(0, 9))
    loader([plain], LanguageModel(seed=1)).load_state_dict(json.loads(json.dumps(state)))


def test_states_of_other_runs_are_refused_by_name():
    state = loader().state_dict()
    other_data = [replace(SOURCES[0], dataset=texts([5] * 83, "z"), name="a"), *SOURCES[1:]]
    for options, message in (
        ({"seed": 4}, "seed is 3 in the state and 4 here"),
        ({"pack_tokens": 120}, "pack_tokens is 100 in the state and 120 here; max_documents is 7"),
        ({"bins_per_step": 6}, "bins_per_step is 5"),
        ({"overlong": "crop"}, "overlong is 'error'"),
        ({"composer": LanguageModel(seed=1)}, "composer.seed is 0"),
        ({"composer": TextToImage()}, "composer.name is 'language_model'"),
        ({"sources": other_data}, "source.a.hash is 'hash of a' in the state and 'hash of z' here"),
        ({"sources": [replace(SOURCES[0], weight=1.0), *SOURCES[1:]]}, "source.a.weight is 3.0"),
        ({"sources": SOURCES[:2]}, "sources is .*source.c.hash is 'hash of c' in the state and None here"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(**options).load_state_dict(state)
    with pytest.raises(ValueError, match="version 99; expected 2"):
        loader().load_state_dict(state | {"version": 99})


class Failing(MemoryDataset):
    def read_spans(self, *args, **options):
        raise OSError("disk on fire")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_exceptions_in_the_thread_surface_with_their_traceback(prefetch):
    others = set(threading.enumerate())
    with pytest.raises(OSError, match="disk on fire") as caught:
        next(iter(loader([Source(Failing(SOURCES[0].dataset.samples))], prefetch=prefetch)))
    assert "read_spans" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not set(threading.enumerate()) - others


@dataclass(frozen=True)
class Lying(LanguageModel):
    def lengths(self, dataset, indices, epoch):
        return super().lengths(dataset, indices, epoch) + 1


def test_a_composer_that_breaks_its_promise_is_caught():
    with pytest.raises(RuntimeError, match=r"source 'a': sample \d+ .* its composer promised"):
        take(loader(SOURCES[:1], Lying()), 1)


def test_prepare_sees_every_batch():
    seen = []

    def prepare(batch: PackedBatch) -> PackedBatch:
        seen.append(threading.current_thread().name)
        return replace(batch, max_seqlen=7)

    [step] = take(loader(prepare=prepare, prefetch=1), 1)
    assert [b.max_seqlen for b in step.batches] == [7] * 5
    assert set(seen) == {"prefetch"}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("pack_tokens", [40, 100, 4000])
def test_sequential_batches_are_one_pass_in_stored_order(world, pack_tokens):
    dataset = SOURCES[0].dataset
    options = {"pack_tokens": pack_tokens, "world": world}
    ranks = [list(sequential_batches(dataset, LanguageModel(), VOCAB, rank=r, **options)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    in_order = [batch for group in zip(*ranks) for batch in group]
    keys = [k for b in in_order for k in b.doc_keys[: b.documents].tolist()]
    assert keys == list(stored_keys(dataset))
    assert {b.ids.shape[0] for b in in_order} == {pack_tokens}


def test_sequential_batches_of_bad_data(caplog):
    dataset = texts([30, 150, 20], "long")
    with pytest.raises(ValueError, match="source 'long': sample 1 "):
        list(sequential_batches(dataset, LanguageModel(), VOCAB, pack_tokens=100))
    with caplog.at_level(logging.WARNING):
        [batch] = sequential_batches(dataset, LanguageModel(), VOCAB, pack_tokens=100, overlong="drop")
    assert batch.tokens == 50
    assert "dropped=1" in caplog.text
    with pytest.raises(ValueError, match="empty"):
        list(sequential_batches(texts([]), LanguageModel(), VOCAB, pack_tokens=100))


def write_shards(folder, dataset: MemoryDataset) -> Dataset:
    infos = []
    for number, samples in enumerate((dataset.samples[:11], dataset.samples[11:])):
        part = MemoryDataset(samples)
        everything = np.arange(len(samples))
        ids, cu = part.read(everything)
        spans, span_cu = part.segments(everything)
        segments = np.zeros(len(spans), SEGMENT)
        for field in ("start", "modality", "role"):
            segments[field] = spans[field]
        with ShardWriter(folder / f"{number}.vts", SCHEMA, uuid=bytes([number]) * 16) as writer:
            writer.append_batch(ids, cu, segments, span_cu, keys=part.keys(everything))
        infos.append(writer.info)
    publish(folder, SCHEMA, infos)
    return Dataset(folder)


def test_real_shards_give_the_same_documents(tmp_path):
    memory = random_pictures(40, "p")
    shards = write_shards(tmp_path, memory)
    composer = TextToImage(seed=2, drop_caption=0.3)
    from_memory, from_shards = (
        [content(b) for b in sequential_batches(d, composer, VOCAB, pack_tokens=120)] for d in (memory, shards)
    )
    assert from_memory == from_shards
    steps = list(loader([Source(shards, max_epochs=1)], composer, pack_tokens=120, prefetch=2))
    assert keys_of(b for s in steps for b in s.batches) == stored_keys(memory)


def test_data_imports_without_triton_and_models():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['vkernels'] = None\n"
        "import vtrain.data; [getattr(vtrain.data, name) for name in vtrain.data.__all__]\n"
        "assert not [m for m in sys.modules if m.startswith(('vtrain.models', 'vtrain.visual', 'vtrain.train'))]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_tensor_types():
    [step] = take(loader(), 1)
    batch = step.batches[0]
    assert {batch.ids.dtype, batch.labels.dtype, batch.cu_seqlens.dtype} == {torch.int32}
    assert batch.doc_keys.dtype == torch.int64


def test_samples_without_keys_of_padding():
    sample = StoredSample([1, 2, 3], 2**64 - 1)
    [step] = loader([Source(MemoryDataset([sample]), max_epochs=1)])
    assert step.batches[0].doc_keys[0].item() == -1
