"""The loader goes on where a state was taken: other ranks, other stages, grown datasets, after errors."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from memory_dataset import MemoryDataset
from test_compose import ASSISTANT, USER, chats
from test_loader import bins_of, content, group, keys_of, loader, random_pictures, random_texts, stored_keys, take

from vtrain.data import BlockOrder, Chat, LanguageModel, Source, TextToImage


def random_chats(n: int) -> MemoryDataset:
    draw = np.random.default_rng(n)
    turns = [[(USER, int(draw.integers(1, 9)), int(draw.integers(1, 6))), (ASSISTANT, 7, None)] for _ in range(n)]
    return chats(turns)


def sources() -> list[Source]:
    return [
        Source(random_texts(130, "wide", 1, 230), 1.0),
        Source(
            random_pictures(60, "pictures"), [(0, 1.0), (3000, 3.0)], composer=TextToImage(seed=4, drop_caption=0.4)
        ),
        Source(random_chats(40), 0.7, composer=Chat(features="clip"), order=BlockOrder(8, 2)),
    ]


MIXED = {"overlong": "split", "caps": (40, 12), "pool": 25}


def slots_of(batch) -> tuple:
    slots = batch.slots["clip"]
    return tuple(x for t in (slots.data, slots.index, slots.cu) for x in t.flatten().tolist())


@pytest.mark.parametrize("seed", range(4))
def test_chains_of_resumes_at_random_steps(seed):
    draw = np.random.default_rng(seed)
    stops = draw.integers(1, 12, 5).tolist()
    whole = bins_of(group(1, sources=sources(), **MIXED), sum(stops))
    resumed, state = [], None
    for stop, world in zip(stops, draw.permutation([1, 2, 3, 8, 5]).tolist()):
        ahead = {"prefetch": int(draw.integers(0, 3)), "readahead": int(draw.integers(0, 3))}
        ranks = group(world, sources=sources(), **MIXED, **ahead)
        for each in ranks:
            if state is not None:
                each.load_state_dict(json.loads(state))
        resumed += bins_of(ranks, stop)
        states = {json.dumps(each.state_dict(), sort_keys=True) for each in ranks}
        assert len(states) == 1
        state = states.pop()
    assert resumed == whole


def test_slots_are_the_same_on_any_number_of_ranks():
    def of(world):
        steps = zip(*(take(each, 6) for each in group(world, sources=sources(), **MIXED)))
        return [Counter(slots_of(b) for s in ranks for b in s.batches if b.documents) for ranks in steps]

    one = of(1)
    assert sum(len(step) for step in one) > 10
    assert of(3) == one


def finite() -> list[Source]:
    return [
        Source(random_texts(90, "one"), 2.0, max_epochs=1),
        Source(random_texts(70, "other"), 1.0, max_epochs=1),
        Source(random_pictures(50, "third"), 1.0, max_epochs=1, composer=TextToImage(seed=1)),
    ]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("steps", [1, 3])
def test_stages_lose_and_repeat_nothing(world, steps):
    """Other weights, budgets and sources from stage to stage; one source comes late, one rests in the middle."""
    one, other, third = finite()
    stages = [
        ({"sources": [one, other]}, steps),
        ({"sources": [replace(other, weight=5.0), third], "pack_tokens": 64, "bins_per_step": 3}, steps),
        ({"sources": [one, replace(other, weight=0.5), third], "pack_tokens": 80, "pool": 3}, None),
    ]
    batches, state = [], None
    for options, stop in stages:
        ranks = group(world, **options)
        for each in ranks:
            if state is not None:
                each.load_state_dict(json.loads(state), strict=False)
        for step in zip(*(islice(iter(each), stop) for each in ranks)):
            batches += [b for rank in step for b in rank.batches]
        [state] = {json.dumps(each.state_dict(), sort_keys=True) for each in ranks}
    assert keys_of(batches) == sum((stored_keys(s.dataset) for s in (one, other, third)), Counter())


def grow(dataset: MemoryDataset, n: int) -> MemoryDataset:
    grown = MemoryDataset(dataset.samples + random_texts(n, "more").samples, dataset.name)
    grown.hash = "hash of more"
    return grown


def test_an_appended_dataset_joins_at_the_next_epoch():
    small = random_texts(60, "growing")
    little = {"bins_per_step": 1, "pool": 5}  # or the samples that wait would be of the second epoch already
    first = loader([Source(small, max_epochs=2)], **little)
    before = take(first, 2)
    state = json.loads(json.dumps(first.state_dict()))
    second = loader([Source(grow(small, 25), max_epochs=2)], **little)
    with pytest.raises(ValueError, match=r"source\.growing\.hash is 'hash of growing' in the state"):
        second.load_state_dict(state)
    second.load_state_dict(state, strict=False)
    after = list(second)
    drawn = keys_of(b for s in [*before, *after] for b in s.batches)
    assert drawn == stored_keys(small) + stored_keys(grow(small, 25))
    third = loader([Source(grow(small, 25), max_epochs=2)], **little)
    third.load_state_dict(state, strict=False)
    assert [content(b) for s in third for b in s.batches] == [content(b) for s in after for b in s.batches]
    other = MemoryDataset(small.samples, "growing")
    other.uuid64 += 1
    with pytest.raises(ValueError, match=r"source\.growing\.uuid"):
        loader([Source(other, max_epochs=2)], **little).load_state_dict(state, strict=False)


class Breaking(MemoryDataset):
    reads = 0

    def read_spans(self, *args, **options):
        self.reads += 1
        if self.reads == 4:
            raise OSError("disk on fire")
        super().read_spans(*args, **options)


@pytest.mark.parametrize("ahead", [{}, {"prefetch": 2}, {"readahead": 3}])
def test_the_state_after_an_error_is_that_of_the_last_good_step(ahead):
    samples = random_texts(200, "a").samples
    run, done = loader([Source(Breaking(samples))], **ahead), []
    with pytest.raises(OSError, match="disk on fire"):
        done.extend([content(b) for b in step.batches] for step in run)
    assert len(done) == run.steps == 3
    whole = [[content(b) for b in s.batches] for s in take(loader([Source(MemoryDataset(samples))]), 6)]
    assert done == whole[:3]
    again = loader([Source(MemoryDataset(samples, "memory"))])
    again.load_state_dict(run.state_dict())
    assert [[content(b) for b in s.batches] for s in take(again, 3)] == whole[3:]


def test_the_state_is_exact_between_those_that_are_written_down():
    """States are written every 16 steps and planned again in between."""
    whole = [[content(b) for b in s.batches] for s in take(loader(), 40)]
    run = loader(prefetch=1)
    for step in islice(iter(run), 38):
        if step.number in (0, 14, 15, 16, 17, 30, 36):
            second = loader()
            second.load_state_dict(json.loads(json.dumps(run.state_dict())))
            assert second.steps == step.number + 1
            assert [content(b) for b in next(iter(second)).batches] == whole[step.number + 1]


def test_a_plain_language_model_keeps_its_state_small():
    run = loader([Source(random_texts(3000, "a"), composer=LanguageModel())], pool=512)
    take(run, 20)
    assert len(json.dumps(run.state_dict())) < 2048
