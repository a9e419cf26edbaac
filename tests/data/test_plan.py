import itertools
import json
import logging
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from memory_dataset import SCHEMA, MemoryDataset, texts
from slow_plan import SlowPlan, slow_order

from vtrain.data.compose import LanguageModel
from vtrain.data.order import BlockOrder, StoredOrder, epoch_key
from vtrain.data.plan import Misfits, Plan, PlannedStep, Source
from vtrain.data.plan_state import read_waiting, spell_waiting

SETTINGS = {"seed": 3, "pack_tokens": 100, "bins_per_step": 5, "max_documents": 7, "overlong": "split", "pool": 40}


def lengths(n: int, seed: int, low: int = 0, high: int = 130) -> list[int]:
    return np.random.default_rng(seed).integers(low, high + 1, n).tolist()


def source(name: str, n: int, weight=1.0, **options) -> Source:
    low, high = options.pop("low", 0), options.pop("high", 130)
    return Source(texts(lengths(n, n, low, high), name), weight, **options)


def three(**options) -> list[Source]:
    return [source("a", 83, 3.0, **options), source("b", 205, 2.0, **options), source("c", 7, 1.0, **options)]


def plan(sources: list[Source], composer=None, **settings) -> Plan:
    return Plan(sources, composer or LanguageModel(), **(SETTINGS | settings))


def take(of: Plan, steps: int = 10**9) -> list[PlannedStep]:
    return list(itertools.takewhile(lambda s: s is not None, (of.next_step() for _ in range(steps))))


def bins(of: Plan, step: PlannedStep) -> list[list[tuple]]:
    """As SlowPlan gives them."""
    columns = (step.epoch, step.position, step.index, step.start, step.length, step.full)
    names = [of.sources[s].name for s in step.source]
    rows = list(zip(names, *(c.tolist() for c in columns)))
    return [rows[a:b] for a, b in itertools.pairwise(step.bin_cu.tolist())]


def equal(a: PlannedStep, b: PlannedStep) -> bool:
    pairs = zip(vars(a).values(), vars(b).values())
    return all(np.array_equal(x, y) and x.dtype == y.dtype if isinstance(x, np.ndarray) else x == y for x, y in pairs)


def carry(state: dict) -> dict:
    return json.loads(json.dumps(state, sort_keys=True))


@pytest.mark.parametrize("overlong", ["drop", "split", "crop"])
def test_steps_equal_the_slow_plan(overlong):
    sources = [replace(s, max_epochs=m) for s, m in zip(three(), (2, 1, 9))]
    fast, slow = (
        plan(sources, overlong=overlong),
        SlowPlan(sources, LanguageModel(), **SETTINGS | {"overlong": overlong}),
    )
    steps = take(fast)
    for step in steps:
        assert bins(fast, step) == slow.next_step()
    assert slow.next_step() == []
    assert [s.number for s in steps] == list(range(len(steps)))


def appended(old: MemoryDataset, more: int, seed: int) -> MemoryDataset:
    grown = texts([len(s.ids) for s in old.samples] + lengths(more, seed), old.name)
    grown.hash, grown.left_out = f"{seed:016x}", set(old.left_out)
    return grown


@pytest.mark.parametrize("seed", range(6))
def test_chains_of_resumes_stages_and_appends_equal_the_slow_plan(seed):
    """Every step, whatever came before: strict resumes at random steps, other mixtures and budgets, grown datasets,
    samples excluded later, sources that come and go."""
    draw = np.random.default_rng(seed)
    data = {"a": texts(lengths(31, 1), "a"), "b": texts(lengths(11, 2), "b"), "c": texts(lengths(5, 3), "c")}
    slow = SlowPlan([], LanguageModel(), **SETTINGS)
    fast = None
    for stage in range(5):
        settings = SETTINGS | {
            "pack_tokens": int(draw.integers(60, 180)),
            "bins_per_step": int(draw.integers(1, 6)),
            "overlong": ["drop", "split", "crop"][draw.integers(3)],
            "pool": int(draw.integers(1, 30)),
        }
        grown = ["a", "b", "c"][draw.integers(3)]
        if stage:
            data[grown] = appended(data[grown], int(draw.integers(1, 9)), 100 * seed + stage)
            data[grown].left_out |= set(draw.integers(0, len(data[grown]), 2).tolist())
        names = ["a", "b", "c"] if stage == 0 else draw.permutation(["a", "b", "c"])[: draw.integers(1, 4)].tolist()
        sources = [Source(data[n], float(draw.integers(1, 5))) for n in names]
        state = fast.state() if fast else None
        fast = plan(sources, **settings)
        if state:
            fast.load(carry(state), strict=False)
        slow.stage(sources, **settings)
        for _ in range(int(draw.integers(3, 12))):
            step = fast.next_step()
            assert bins(fast, step) == slow.next_step()
            assert fast._planner.tokens == slow.tokens
            if draw.random() < 0.3:
                state, fast = fast.state(), plan(sources, **settings)
                fast.load(carry(state))
                assert fast.state() == state


@pytest.mark.parametrize("stops", [[1], [3, 1, 1, 9], [40], [7, 30, 2]])
def test_resumed_steps_are_equal_in_every_field(stops):
    sources = [replace(s, max_epochs=m) for s, m in zip(three(), (3, 2, 20))]
    whole, parted, state = take(plan(sources)), [], None
    for stop in [*stops, 10**9]:
        part = plan(sources)
        if state is not None:
            part.load(carry(state))
        parted += take(part, stop)
        state = part.state()
    assert len(whole) == len(parted)
    assert all(equal(a, b) for a, b in zip(whole, parted))


def test_every_sample_exactly_once_per_epoch():
    sources = [replace(s, max_epochs=m) for s, m in zip(three(), (3, 2, 20))]
    tokens = defaultdict(list)
    for step in take(plan(sources)):
        assert np.all(np.add.reduceat(step.length, step.bin_cu[:-1]) <= 100)
        assert np.all(np.diff(step.bin_cu) <= 7)
        for s, e, i, start, length, full in zip(
            step.source, step.epoch, step.index, step.start, step.length, step.full
        ):
            assert full == len(sources[s].dataset.samples[i].ids)
            tokens[int(s), int(e), int(i)] += range(start, start + length)
    expected = {
        (s, e, i): list(range(len(sample.ids)))
        for s, of in enumerate(sources)
        for e in range(of.max_epochs)
        for i, sample in enumerate(of.dataset.samples)
        if sample.ids
    }
    assert {place: sorted(t) for place, t in tokens.items()} == expected


def test_an_epoch_keeps_its_size_after_an_append():
    old = texts([10] * 20, "a")
    first = plan([Source(old)], bins_per_step=1, pool=5)
    drawn = [i for s in take(first, 1) for i in s.index.tolist()]
    second = plan([Source(appended(old, 15, 9))], bins_per_step=1, pool=5)
    with pytest.raises(ValueError, match=r"source.a.hash is 'hash of a' in the state and '0000000000000009' here"):
        second.load(first.state())
    second.load(carry(first.state()), strict=False)
    steps = take(second, 6)
    by_epoch = defaultdict(list, {0: drawn})
    for s in steps:
        whole = s.start == 0  # the first piece of a split one, too
        for e, i in zip(s.epoch[whole].tolist(), s.index[whole].tolist()):
            by_epoch[e].append(i)
    assert sorted(by_epoch[0]) == list(range(20))
    assert Counter(by_epoch[1]) <= Counter(range(35))
    assert max(by_epoch[1]) >= 20
    third = plan([Source(texts([10] * 7, "a"))], bins_per_step=1, pool=5)
    with pytest.raises(ValueError, match=r"source 'a' has 7 samples, its cursor is at .* of 20 in epoch 0"):
        third.load(first.state(), strict=False)


def test_a_parked_source_comes_back_where_it_left():
    sources = three()
    first = plan(sources)
    take(first, 4)
    before = first.state()
    without = plan([sources[0], sources[2]], pack_tokens=130)
    without.load(carry(before), strict=False)
    assert list(without.state()["parked"]) == ["b"]
    take(without, 5)
    resumed = plan([sources[0], sources[2]], pack_tokens=130)
    resumed.load(carry(without.state()))
    assert resumed.state() == without.state()
    back = plan(sources)
    back.load(carry(without.state()), strict=False)
    state = back.state()
    assert state["parked"] == {}
    assert state["sources"]["b"]["at"] == before["sources"]["b"]["at"]
    waited = [read_waiting(s["waiting"]) for s in (before, state)]
    assert np.array_equal(*(w[:, w[0] == 1] for w in waited))


class Columns(MemoryDataset):
    """score: the number of a sample, in twelfths."""

    def column(self, name, indices):
        assert name == "score"
        assert not set(np.asarray(indices).tolist()) & self.left_out, "an excluded sample was read"
        return np.asarray(indices) / 12

    def lengths(self, indices):
        assert not set(np.asarray(indices).tolist()) & self.left_out, "an excluded sample was read"
        return super().lengths(indices)


def test_filters_and_exclusions_are_skipped_and_counted():
    samples = texts([5 * (i % 20) for i in range(120)]).samples
    data = Columns(samples, "scored", replace(SCHEMA, columns={"score": "<f8"}))
    data.left_out = {3, 24, 25, 119}
    one = Source(data, where={"score": (1, 8.5)}, tokens=(10, 60), max_epochs=2)
    steps = take(plan([one]))
    inside = [i for i in range(12, 103) if i not in data.left_out and 10 <= 5 * (i % 20) <= 60]
    assert Counter(i for s in steps for i in s.index.tolist()) == Counter(dict.fromkeys(inside, 2))
    misfits = steps[-1].reports["scored"].misfits
    assert misfits == Misfits(excluded=8, filtered=2 * (120 - 4 - len(inside)))
    with pytest.raises(ValueError, match="where names the column 'scores'; the dataset has score"):
        Source(data, where={"scores": (0, 1)})
    with pytest.raises(ValueError, match="source 'scored': 120 samples in a row are empty, skipped or longer"):
        take(plan([replace(one, tokens=(1000, 2000))]))


class WithExtents(LanguageModel):
    """A sample of n tokens has n // 3 slot rows and n % 4 frames."""

    def extents(self, dataset, indices, epoch):
        n = dataset.lengths(indices)
        return np.stack([n // 3, n % 4], axis=1).astype(np.int32)


def test_caps_hold_and_what_no_bin_can_hold_is_overlong():
    sources = [replace(s, max_epochs=2) for s in three()[:2]]
    for overlong in ("drop", "split", "crop"):
        steps = take(plan(sources, WithExtents(), overlong=overlong, caps=(25, 5)))
        counted = sum(r.misfits.dropped + r.misfits.split + r.misfits.cropped for r in steps[-1].reports.values())
        cut = drawn = 0
        for step in steps:
            rows, frames = np.minimum(step.full // 3, step.length), step.full % 4
            for a, b in itertools.pairwise(step.bin_cu):
                assert rows[a:b].sum() <= 25
                assert frames[a:b].sum() <= 5
            drawn += int((step.start == 0).sum())
            cut += int(((step.start == 0) & (step.length < step.full)).sum())
        full = [len(x.ids) for s in sources for x in s.dataset.samples for _ in range(2) if x.ids]
        fits = [n for n in full if n <= 100 and n // 3 <= 25]
        assert 0 < len(fits) < len(full)
        assert drawn == len(fits) + cut
        assert counted == len(full) - len(fits)
    with pytest.raises(ValueError, match=r"a bin 100 and \(rows, frames\) \(25, 5\)"):
        take(plan(sources, WithExtents(), overlong="error", caps=(25, 5)))


def test_sources_have_composers_of_their_own():
    class Half(LanguageModel):
        def lengths(self, dataset, indices, epoch):
            return super().lengths(dataset, indices, epoch) // 2

    sources = [source("a", 30, max_epochs=1, low=2), source("b", 30, max_epochs=1, low=2, composer=Half())]
    found = {0: 0, 1: 0}
    for step in take(plan(sources)):
        for s in found:
            found[s] += int(step.length[step.source == s].sum())
    whole = [[len(x.ids) for x in s.dataset.samples] for s in sources]
    assert found == {0: sum(whole[0]), 1: sum(n // 2 for n in whole[1])}


def test_orders_of_sources():
    data = texts([10] * 90, "a")
    for order in (None, BlockOrder(8, 3), StoredOrder()):
        steps = take(plan([Source(data, max_epochs=2, order=order)], pool=1))
        index = np.concatenate([s.index for s in steps])
        assert all(sorted(index[e * 90 : e * 90 + 90].tolist()) == list(range(90)) for e in (0, 1))
        assert (index[:90].tolist() == list(range(90))) == (order == StoredOrder())
        if order is None:
            assert tuple(index[:90].tolist()) == slow_order(90, epoch_key(3, data.uuid64, 0))
    states = [plan([Source(data, order=order)]).state() for order in (BlockOrder(8, 3), BlockOrder(8, 4))]
    with pytest.raises(ValueError, match=r"source.a.order.open is 4 in the state and 3 here"):
        plan([Source(data, order=BlockOrder(8, 3))]).load(states[1], strict=False)


def test_reports(caplog):
    sources = [replace(s, max_epochs=m) for s, m in zip(three(), (1, None, None))]
    of, seen = plan(sources), Counter()
    with caplog.at_level(logging.INFO, "vtrain.data.plan"):
        steps = take(of, 60)
    assert [r.getMessage() for r in caplog.records] == ["source 'a': 1 epochs drawn, it leaves the mixture"]
    for step in steps:
        assert sum(r.tokens for r in step.reports.values()) == step.tokens == step.length.sum()
        assert sum(r.documents for r in step.reports.values()) == step.documents
        seen += Counter({name: r.tokens for name, r in step.reports.items()})
        assert sum(r.token_share for r in step.reports.values()) == pytest.approx(1)
    last = steps[-1].reports
    assert [r.finished for r in last.values()] == [True, False, False]
    assert last["a"].epoch == 1
    state = of.state()
    for name, row in state["sources"].items():
        waits = sum(row["at"][3] for row in state["sources"].values())
        assert last[name].token_share == row["at"][3] / waits
        assert last[name].sample_share == row["at"][2] / sum(r["at"][2] for r in state["sources"].values())
        assert 0 <= row["at"][3] - seen[name] <= 40 * 130


@pytest.mark.parametrize(("count", "most"), [(1, 2100), (10, 3000)])
def test_states_are_small(count, most):
    sources = [source(f"dataset-{i}", 800 + i, i + 1.0, low=64, high=1300) for i in range(count)]
    settings = {"pack_tokens": 8192, "max_documents": 513, "pool": 512, "bins_per_step": 16}
    of = plan(sources, **settings)
    take(of, 12)
    assert len(json.dumps(of.state())) < most
    again = plan(sources, **settings)
    again.load(of.state())
    assert again.state() == of.state()


@pytest.mark.parametrize("seed", range(5))
def test_waiting_samples_are_spelled_exactly(seed):
    draw = np.random.default_rng(seed)
    for n in (0, 1, 2, 300):
        table = draw.integers(0, [[5], [2**40], [2**62], [2**31], [2**31]], (5, n))
        assert np.array_equal(read_waiting(spell_waiting(table)), table)


def test_states_of_other_runs_are_refused_by_name():
    sources = three()
    state = carry(plan(sources).state())
    other = [replace(sources[0], dataset=texts([5] * 83, "z"), name="a"), *sources[1:]]
    for options, message in (
        ({"seed": 4}, "seed is 3 in the state and 4 here"),
        ({"pack_tokens": 120, "pool": 9}, "pack_tokens is 100 in the state and 120 here; pool is 40"),
        ({"caps": (9, 9)}, r"caps is None in the state and \[9, 9\] here"),
        ({"composer": LanguageModel(seed=1)}, "composer.seed is 0"),
        ({"sources": other}, "source.a.uuid is .*; source.a.hash is 'hash of a' in the state and 'hash of z' here"),
        (
            {"sources": [replace(sources[0], weight=[(0, 3), (9, 1)]), *sources[1:]]},
            r"source.a.weight is 3.0 in .*\[\[",
        ),
        ({"sources": [replace(sources[0], max_epochs=7), *sources[1:]]}, "source.a.max_epochs is None .* 7 here"),
        ({"sources": sources[:2]}, r"sources is \['a', 'b', 'c'\] in the state and \['a', 'b'\] here"),
        ({"sources": sources[::-1]}, "sources is"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(options.pop("sources", sources), **options).load(state)
    for options, message in (({"seed": 4}, "seed"), ({"sources": other}, "source.a.uuid")):
        with pytest.raises(ValueError, match=message):
            plan(options.pop("sources", sources), **options).load(state, strict=False)
    with pytest.raises(ValueError, match="version 1; expected 2"):
        plan(sources).load(state | {"version": 1})


def test_broken_states_are_refused_and_change_nothing():
    sources = three()
    of = plan(sources)
    take(of, 3)
    state = of.state()
    table = read_waiting(state["waiting"])

    def waiting(row: int, value: int) -> dict:
        changed = table.copy()
        changed[row, 2] = value
        return {"waiting": spell_waiting(changed)}

    def at(**changes) -> dict:
        row = state["sources"]["b"] | changes
        return {"sources": state["sources"] | {"b": row}}

    epoch, position, *rest = state["sources"]["b"]["at"]
    broken = [
        *(waiting(row, value) for row, value in ((0, 3), (0, -1), (1, 99), (1, -1), (2, 10**6), (2, -1), (3, -5))),
        *({"waiting": text} for text in ("", "%%%", "AAAA", spell_waiting(table)[:-8], 7)),
        *(at(at=[epoch, p, *rest]) for p in (205, -1, 2**80)),
        at(at=[-1, position, *rest]),
        at(at=[epoch, position]),
        at(sizes=[]),
        at(sizes=[[0, 0]]),
        at(misfits={"n": 3}),
        {"parked": {"a": {}}, "sources": {k: v for k, v in state["sources"].items() if k != "a"}},
        {"step": "x"},
        {"step": -1},
        {"tokens": -1},
        {"parked": {"a": state["sources"]["a"] | {"waiting": spell_waiting(table[:, :0])}}},
        {"tokens": None},
    ]
    expected = plan(sources)
    for change in broken:
        fresh = plan(sources)
        with pytest.raises(ValueError, match=r"^(loader state|planner)"):
            fresh.load(carry(state) | change, strict="parked" not in change)
        assert fresh.state() == expected.state()
    assert equal(fresh.next_step(), expected.next_step())


def test_bad_settings():
    for options, message in (
        ({"overlong": "cut"}, "overlong is 'cut'; expected one of error, drop, split, crop"),
        ({"pack_tokens": 0}, "pack_tokens is 0"),
        ({"bins_per_step": 0}, "bins_per_step is 0"),
        ({"pool": 0}, "pool is 0"),
        ({"max_documents": 0}, "max_documents 0"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(three(), **options)
    for weight in ([], [(5, 1.0), (4, 1.0)], [(1, 1.0), (1, 2.0), (1, 3.0)]):
        with pytest.raises(ValueError, match="source 'a': weight"):
            source("a", 3, weight)
    key = r"source 'c': sample \d+ \(key 0x\w+\) has 1\d\d tokens, a bin 100; expected smaller ones"
    with pytest.raises(ValueError, match=key):
        take(plan(three(), overlong="error"))


def test_a_sample_that_outgrew_the_bins_is_an_error_where_that_was_asked():
    sources = three(high=99)
    of = plan(sources, overlong="error")
    take(of, 2)
    smaller = plan(sources, overlong="error", pack_tokens=30)
    with pytest.raises(ValueError, match="tokens, a bin 30"):
        smaller.load(of.state(), strict=False)
