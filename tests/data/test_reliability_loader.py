"""The loader over real shards: bins equal those of an undisturbed one-rank run over plain lists of samples, whatever
the number of ranks, however often it is resumed, across stages, appended shards and exclusions."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from memory_dataset import MemoryDataset, StoredSample
from test_loader import content, loader, random_pictures, random_texts
from test_resume import random_chats

from vtrain.batch import PackedBatch
from vtrain.data import BlockOrder, Chat, Dataset, LanguageModel, Loader, ShardWriter, Source, TextToImage, manifest
from vtrain.data import exclude as exclusions
from vtrain.data.format import SEGMENT
from vtrain.data.twins import FeatureWriter, twin_path

OPTIONS = {"overlong": "split", "caps": (40, 12), "pool": 25}  # bins of 100 tokens, 5 a step


class Twofold:
    """A dataset on disk and the same samples in memory, grown and thinned out together. clip: it has feature twins."""

    def __init__(self, folder: Path, samples: list[StoredSample], cuts: tuple[int, ...], clip: bool = False) -> None:
        self.folder, self.clip = folder, clip
        self.memory = MemoryDataset([], folder.name)
        folder.mkdir(parents=True)
        for first, last in zip((0, *cuts), (*cuts, len(samples))):
            self.grow(samples[first:last])

    def grow(self, samples: list[StoredSample]) -> None:
        """Append a shard."""
        part, everything = MemoryDataset(samples), np.arange(len(samples))
        spans, span_cu = part.segments(everything)
        segments = np.zeros(len(spans), SEGMENT)
        for field in ("start", "modality", "role"):
            segments[field] = spans[field]
        name = f"{len(self.memory.samples):05d}.vts"
        uuid = hashlib.sha256(f"{self.folder.name} {name}".encode()).digest()[:16]
        with ShardWriter(self.folder / name, part.schema, uuid=uuid) as writer:
            writer.append_batch(*part.read(everything), segments, span_cu, keys=part.keys(everything))
        manifest.append(self.folder, part.schema, [writer.info])
        if self.clip:
            self._add_clip(part)
        self.memory.samples = self.memory.samples + samples

    def _add_clip(self, part: MemoryDataset) -> None:
        found, everything = manifest.load(self.folder), np.arange(len(part))
        shard, column = self.folder / found.shards[-1].file, part.features("clip")
        with FeatureWriter(twin_path(shard, "clip"), shard, "clip", dim=3, dtype="f4", producer="test") as writer:
            writer.append(column.read(everything)[0], column.counts(everything)[0])
        manifest.add_twins(self.folder, "clip")

    def leave_out(self, numbers: list[int]) -> None:
        exclusions.leave_out(self.folder, exclusions.parse(",".join(map(str, numbers))))
        self.memory.left_out = self.memory.left_out | set(numbers)

    def open(self, real: bool) -> Dataset | MemoryDataset:
        """As it is now."""
        stored = Dataset(self.folder)
        if real:
            return stored
        memory = copy.copy(self.memory)
        memory.uuid64, memory.hash = stored.uuid64, stored.hash
        return memory


def slots_of(batch: PackedBatch) -> tuple:
    return tuple(
        (name, *(tuple(t.flatten().tolist()) for t in (slots.data, slots.index, slots.cu)))
        for name, slots in batch.slots.items()
    )


def run(sources: list[Source], world: int, steps: int | None, state: str | None, strict: bool, **options):
    """(per step its real bins in dealt order, the state in JSON) of some ranks that go on at a state."""
    ranks = [loader(sources, rank=rank, world=world, **OPTIONS | options) for rank in range(world)]
    for each in ranks:
        if state is not None:
            each.load_state_dict(json.loads(state), strict=strict)
    found = []
    for step in zip(*(islice(iter(each), steps) for each in ranks), strict=True):
        batches = [rank.batches[a] for a in range(len(step[0].batches)) for rank in step]
        assert sum(b.documents > 0 for b in batches) == step[0].bins
        found.append([(content(b), slots_of(b)) for b in batches if b.documents])
    [state] = {json.dumps(each.state_dict(), sort_keys=True) for each in ranks}
    return found, state


@pytest.fixture
def data(tmp_path) -> dict[str, Twofold]:
    return {
        "wide": Twofold(tmp_path / "wide", random_texts(130, "wide", 1, 230).samples, (11, 12, 90)),
        "pictures": Twofold(tmp_path / "pictures", random_pictures(60, "pictures").samples, (30,)),
        "chats": Twofold(tmp_path / "chats", random_chats(40).samples, (25,), clip=True),
    }


class Stage:
    """What is mixed, how, and what happens to the datasets before: names in `sources` -> options of Source."""

    def __init__(self, sources: dict[str, dict], grow=(), leave_out=(), **options) -> None:
        self.sources, self.grow, self.leave_out, self.options = sources, dict(grow), dict(leave_out), options

    def begin(self, data: dict[str, Twofold]) -> None:
        for name, samples in self.grow.items():
            data[name].grow(samples)
        for name, numbers in self.leave_out.items():
            data[name].leave_out(numbers)

    def mixture(self, data: dict[str, Twofold], real: bool) -> list[Source]:
        return [Source(data[name].open(real), **options) for name, options in self.sources.items()]


WIDE = {"weight": [(0, 1.0), (3000, 3.0), (3000, 0.5)]}
PICTURES = {"weight": [(0, 2.0), (4000, 0.2)], "composer": TextToImage(seed=4, drop_caption=0.4)}
CHATS = {"weight": 0.7, "composer": Chat(features="clip"), "order": BlockOrder(8, 2)}
STAGES = [
    Stage({"wide": WIDE, "pictures": PICTURES, "chats": CHATS}),
    Stage(
        {"wide": WIDE, "pictures": PICTURES | {"weight": 1.0}, "chats": CHATS},
        grow={"pictures": random_pictures(21, "more").samples, "chats": random_chats(13).samples},
        leave_out={"wide": [0, 1, 2, 11, 129, *range(50, 70)], "pictures": [5, 80]},
        pack_tokens=130,
        max_documents=9,
    ),
    Stage({"pictures": PICTURES, "wide": {"weight": 1.0}}, grow={"wide": random_texts(17, "long", 90, 260).samples}),
    Stage(
        {"chats": CHATS | {"weight": 2.0}, "wide": {"weight": 1.0, "tokens": (4, 200)}},
        leave_out={"chats": [1, 30, 52], "wide": [139]},
        bins_per_step=4,
    ),
]


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_chains_of_resumes_across_stages_appends_and_exclusions(data, seed):
    draw = np.random.default_rng(seed)
    truth = found = None  # the states so far
    slots = cut = 0
    for number, stage in enumerate(STAGES):
        stage.begin(data)
        stops = draw.integers(1, 7, 4).tolist()
        expected, truth = run(stage.mixture(data, real=False), 1, sum(stops), truth, strict=False, **stage.options)
        resumed = []
        for stop, world in zip(stops, draw.permutation([1, 2, 3, 8]).tolist()):
            ahead = {"prefetch": int(draw.integers(0, 3)), "readahead": int(draw.integers(0, 3))}
            strict = len(resumed) > 0
            bins, found = run(stage.mixture(data, real=True), world, stop, found, strict, **stage.options, **ahead)
            resumed += bins
        assert resumed == expected, f"stage {number}"
        assert found == truth, f"stage {number}"
        slots += sum(max(cu) > 0 for step in expected for _, tables in step for _, _, _, cu in tables)
        state = json.loads(found)["sources"]
        cut += sum(row.get("misfits", {}).get("split", 0) for row in state.values())
    assert slots > 10
    assert cut > 10


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_the_bins_of_one(data, world):
    one, several = (run(STAGES[0].mixture(data, real=True), n, 10, None, True)[0] for n in (1, world))
    assert several == one


def tokens_of(batches: list[PackedBatch]) -> Counter:
    """Key -> how many rows its documents have in all."""
    found: Counter = Counter()
    for batch in batches:
        cu = batch.cu_seqlens.tolist()
        for n, key in enumerate(batch.doc_keys[: batch.documents].numpy().view(np.uint64).tolist()):
            found[key] += cu[n + 1] - cu[n]
    return found


def expected_tokens(source: Source, epochs: dict[int, np.ndarray]) -> Counter:
    """epochs: epoch -> the samples that it has."""
    found: Counter = Counter()
    composer = source.composer or LanguageModel()
    for epoch, numbers in epochs.items():
        lengths = composer.lengths(source.dataset, numbers, epoch).tolist()
        found.update(dict(zip(source.dataset.keys(numbers).tolist(), lengths)))
    return +found


@pytest.mark.parametrize("worlds", [(1, 1, 1), (3, 8, 2)])
def test_every_sample_exactly_once_per_epoch(data, worlds):
    """All tokens of all samples; what was appended in the first epoch joins the second, what was left out goes."""
    data["wide"].leave_out([4, *range(20, 31)])
    sources = {
        "wide": {"weight": [(0, 2.0), (2000, 1.0)], "max_epochs": 2},
        "pictures": {"composer": TextToImage(seed=1, drop_caption=0.5), "max_epochs": 3},
        "chats": {"composer": Chat(features="clip"), "max_epochs": 2},
    }
    stages = [
        Stage(sources, pool=5, bins_per_step=2),
        Stage(sources, grow={"wide": random_texts(19, "later", 1, 230).samples}, pool=5, bins_per_step=2),
        Stage(sources, pool=60, bins_per_step=3),
    ]
    batches, state = [], None
    for stage, world, steps in zip(stages, worlds, (4, 9, None)):
        stage.begin(data)
        mixture = stage.mixture(data, real=True)
        ranks = [loader(mixture, rank=r, world=world, **OPTIONS | stage.options) for r in range(world)]
        for each in ranks:
            if state is not None:
                each.load_state_dict(state, strict=False)
        for each in ranks:
            batches += [b for step in islice(iter(each), steps) for b in step.batches]
        state = ranks[0].state_dict()
    wide, pictures, chats = mixture
    kept = np.setdiff1d(np.arange(len(wide.dataset)), [4, *range(20, 31)])
    expected = expected_tokens(wide, {0: kept[kept < 130], 1: kept})
    expected += expected_tokens(pictures, dict.fromkeys(range(3), np.arange(60)))
    expected += expected_tokens(chats, dict.fromkeys(range(2), np.arange(40)))
    assert tokens_of(batches) == expected


def test_samples_left_out_in_the_middle_come_no_more_and_all_others_as_often_as_before(data):
    source = {"wide": {"max_epochs": 2}}
    first = loader(Stage(source).mixture(data, real=True), **OPTIONS)
    batches = [b for step in islice(iter(first), 8) for b in step.batches]
    before, out = tokens_of(batches), [*range(0, 130, 3)]
    data["wide"].leave_out(out)
    [source] = Stage(source).mixture(data, real=True)
    second: Loader = loader([source], **OPTIONS)
    second.load_state_dict(first.state_dict(), strict=False)
    after = tokens_of([b for step in second for b in step.batches])
    left_out = set(source.dataset.keys(np.array(out)).tolist())
    assert not left_out & after.keys()
    expected = expected_tokens(source, dict.fromkeys(range(2), np.setdiff1d(np.arange(130), out)))
    assert {key: count for key, count in (before + after).items() if key not in left_out} == expected
    assert left_out & before.keys()
