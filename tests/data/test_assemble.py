"""Batches assembled from pieces equal `PackedBatch.build` of the documents that a slow reading of the pieces gives."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from memory_dataset import SCHEMA, VOCAB, MemoryDataset, StoredSample, documents, pictures, texts
from test_compose import ASSISTANT, USER, chats

from vtrain._host import lay_documents, lay_pieces, spread_runs
from vtrain.batch import PackedBatch
from vtrain.data import Dataset, ShardWriter
from vtrain.data.assemble import Assembler
from vtrain.data.compose import Chat, LanguageModel, TextToImage
from vtrain.data.format import SEGMENT, Modality, Role
from vtrain.data.manifest import publish
from vtrain.data.raw import RawAssembler
from vtrain.data.samples import pack_runs, unpack_runs
from vtrain.data.twins import FeatureWriter

LABELS = replace(SCHEMA, labels=True, loss_weights=(0.0, 1.0, 0.25, *[1.0] * 253))
RUNS = replace(SCHEMA, loss_weights=LABELS.loss_weights)


def runs_of(length: int, draw) -> list[int]:
    if length == 0 or draw.random() < 0.3:
        return []
    cuts = np.sort(draw.integers(0, length + 1, 3))
    return pack_runs(np.diff([0, *cuts, length]), draw.integers(0, 3, 4)).tolist()


def weighed(n: int, name: str, schema, seed: int = 0) -> MemoryDataset:
    draw = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        length = int(draw.integers(0, 40))
        ids, labels = draw.integers(0, VOCAB.size, (2, length)).tolist()
        cut = int(draw.integers(0, length + 1))
        segments = [(cut, Modality.LATENT, Role.USER), (length - cut, Modality.LATENT, Role.ASSISTANT)]  # any ids
        samples.append(StoredSample(ids, 1000 + i, segments, runs_of(length, draw), labels))
    return MemoryDataset(samples, name, schema)


def talks(n: int) -> MemoryDataset:
    draw = np.random.default_rng(3)
    return chats(
        [
            [
                ((USER, ASSISTANT)[t % 2], int(draw.integers(0, 9)), int(draw.integers(0, 5)) if t % 3 == 0 else None)
                for t in range(draw.integers(0, 6))
            ]
            for _ in range(n)
        ]
    )


def step_of(sources, composers, bins: list[int], seed: int, cut: bool = False) -> SimpleNamespace:
    """Random samples of random sources in bins of the given sizes."""
    draw = np.random.default_rng(seed)
    n = sum(bins)
    source = draw.integers(0, len(sources), n)
    epoch = draw.integers(0, 2, n)
    index = np.array([draw.integers(0, len(sources[s].dataset)) for s in source], dtype=np.int64)
    each = zip(source, epoch, index)
    full = [composers[s].lengths(sources[s].dataset, np.array([i]), int(e))[0] for s, e, i in each]
    full = np.array(full, dtype=np.int32).reshape(n)
    start = draw.integers(0, full + 1) if cut else np.zeros(n)
    length = draw.integers(0, full - start + 1) if cut else full
    return SimpleNamespace(
        source=source.astype(np.int32),
        epoch=epoch,
        index=index,
        start=start.astype(np.int32),
        length=length.astype(np.int32),
        full=full,
        bin_cu=np.concatenate([[0], np.cumsum(bins)]).astype(np.int64),
    )


def slow(step, number, sources, composers) -> list:
    made = []
    if number is not None:
        for i in range(step.bin_cu[number], step.bin_cu[number + 1]):
            s, cut = int(step.source[i]), (step.start[i], step.length[i])
            made += documents(composers[s], sources[s].dataset, [step.index[i]], int(step.epoch[i]), [cut], s)
    return made


def assert_same(found: PackedBatch, expected: PackedBatch) -> None:
    assert (found.weights is None) == (expected.weights is None)
    for name in ("ids", "labels", "positions", "cu_seqlens", "doc_keys", "weights"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine is theirs is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), name
    for name in ("lengths", "sources"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    for name in ("tokens", "scored", "counts", "max_seqlen", "documents"):
        assert getattr(found, name) == getattr(expected, name), name
    for name, slots in expected.slots.items():
        mine = found.slots[name]
        for field in ("data", "index", "cu"):
            assert torch.equal(getattr(mine, field), getattr(slots, field)), field


CASES = {
    "text_to_image": ([pictures([[3, 5], [], [7]] * 5, 16)], [TextToImage(seed=2, drop_caption=0.3)]),
    "weighted text": ([pictures([[3, 5], [], [7]] * 5, 16)], [TextToImage(text_weight=0.1)]),
    "runs": ([weighed(30, "runs", RUNS)], [LanguageModel()]),
    "labels": ([weighed(30, "labels", LABELS)], [LanguageModel()]),
    "chat": ([talks(30)], [Chat(features="clip")]),
    "mixed": (
        [texts(list(range(30))), weighed(30, "labels", LABELS), pictures([[4]] * 9), talks(20), weighed(9, "r", RUNS)],
        [LanguageModel(), LanguageModel(), TextToImage(), Chat(features="clip", train_on="all"), LanguageModel()],
    ),
}


def case(name: str):
    datasets, composers = CASES[name]
    return [SimpleNamespace(dataset=d, name=d.name) for d in datasets], composers


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("bins", [[4], [3, 0, 9], [1, 17, 5, 8]])
def test_equals_the_slow_reading(name, cut, bins):
    sources, composers = case(name)
    caps = (200, 40) if name in ("chat", "mixed") else None
    step = step_of(sources, composers, bins, seed=len(bins), cut=cut)
    chosen = [*range(len(bins))[::-1], None]
    make = Assembler(sources, composers, VOCAB, pack_tokens=1000, max_documents=20, caps=caps)
    batches = make(step, chosen)
    assert len(batches) == len(chosen)
    for batch, number in zip(batches, chosen):
        options = {"pack_tokens": 1000, "max_documents": 20, "weighted": make.weighted, "caps": caps}
        assert_same(batch, PackedBatch.build(slow(step, number, sources, composers), VOCAB, **options))
        if caps:
            slots = batch.slots["clip"]
            assert (slots.data.shape, slots.index.shape, slots.cu.shape) == ((200, 3), (200,), (42,))


@pytest.mark.parametrize("cut", [False, True])
def test_segment_tables(cut):
    sources, composers = case("mixed")
    step = step_of(sources, composers, [12, 7], seed=9, cut=cut)
    options = {"pack_tokens": 1000, "max_documents": 20, "tables": ("segments",)}
    for number, batch in enumerate(Assembler(sources, composers, VOCAB, **options)(step, [0, 1])):
        table = batch.segments.numpy()
        assert table.dtype == np.int32
        assert (table[(table[:, 0] < 0).argmax() :] == -1).all()  # M is a bucket: the padding is at the end
        expected = slow_segments(step, number, sources, composers)
        assert [tuple(row) for row in table.tolist() if row[0] >= 0] == expected


def slow_segments(step, number, sources, composers) -> list[tuple]:
    """Row by row: which stored segment of the sample it comes from."""
    found, row = [], 0
    for document, i in enumerate(range(step.bin_cu[number], step.bin_cu[number + 1])):
        source, index = sources[step.source[i]], step.index[i]
        sample = source.dataset.samples[index]
        pieces = composers[step.source[i]].compose(source.dataset, np.array([index]), int(step.epoch[i]))
        origins = []  # (piece, segment of the sample) of every row, None for literals
        for p in range(len(pieces.sample)):
            for n in range(pieces.start[p], pieces.start[p] + pieces.count[p]):
                origins.append(None if pieces.token[p] >= 0 else (p, segment_of(sample, pieces, p, n)))
        rows = origins[step.start[i] : step.start[i] + step.length[i]]
        for at, origin in enumerate(rows):
            if origin is None or origin[1] is None:
                continue
            if at and rows[at - 1] == origin:
                found[-1][1] += 1
                continue
            _, modality, role = sample.segments[origin[1]]
            found.append([row + at, 1, int(modality), int(role), 0, 0, 0, document])
        row += step.length[i]
    return [tuple(f) for f in found]


def segment_of(sample, pieces, p: int, n: int) -> int | None:
    """The segment that holds token n of the sample, or row n of its features."""
    lengths = [s[0] for s in sample.segments]
    if pieces.token[p] == -1:
        lengths = [len(part) for part in sample.features[pieces.features]]
    holders = [k for k, length in enumerate(lengths) for _ in range(length)]
    return holders[n] if holders else None


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("bins", [[4], [3, 0, 9]])
def test_raw_packs(bins, cut):
    sources = [SimpleNamespace(dataset=weighed(30, n, RUNS, s), name=n) for s, n in enumerate("ab")]
    step = step_of(sources, [LanguageModel()] * 2, bins, seed=4, cut=cut)
    chosen = [*range(len(bins)), None]
    packs = RawAssembler(sources, pack_tokens=500, max_documents=20)(step, chosen)
    for pack, number in zip(packs, chosen):
        built = PackedBatch.build(
            slow(step, number, sources, [LanguageModel()] * 2), VOCAB, pack_tokens=500, max_documents=20
        )
        assert torch.equal(pack.ids, built.ids)
        assert torch.equal(pack.cu_seqlens, built.cu_seqlens)
        assert (pack.tokens, pack.documents, pack.max_seqlen) == (built.tokens, built.documents, built.max_seqlen)
        assert pack.keys.tolist() == built.doc_keys.numpy().view(np.uint64)[: built.documents].tolist()
        for d in range(pack.documents):
            i = step.bin_cu[number] + d
            sample, start, length = (
                sources[step.source[i]].dataset.samples[step.index[i]],
                step.start[i],
                step.length[i],
            )
            own = pack.segments[pack.segment_cu[d] : pack.segment_cu[d + 1]]
            assert own["length"].sum() == length
            roles = [role for size, _, role in sample.segments for _ in range(size)][start : start + length]
            assert np.repeat(own["role"], own["length"]).tolist() == roles
            assert own["start"].tolist() == np.cumsum([0, *own["length"]])[:-1].tolist()
            lengths, classes = unpack_runs(pack.runs[pack.run_cu[d] : pack.run_cu[d + 1]])
            stored_lengths, stored = unpack_runs(np.array(sample.runs, dtype=np.uint32))
            assert np.repeat(classes, lengths).tolist() == np.repeat(stored, stored_lengths)[start:][:length].tolist()


def test_features_of_two_widths_are_refused():
    narrow = chats([[(USER, 2, 1)]], name="narrow")
    narrow.samples[0].features["clip"] = [part[:, :2] for part in narrow.samples[0].features["clip"]]
    sources = [SimpleNamespace(dataset=d, name=d.name) for d in (talks(5), narrow)]
    with pytest.raises(ValueError, match="source 'narrow': features clip have 2 columns, others 3"):
        Assembler(sources, [Chat(features="clip")] * 2, VOCAB, pack_tokens=10, max_documents=3)
    with pytest.raises(ValueError, match="table 'rows'; expected one of segments, rows_by_class"):
        Assembler([], [], VOCAB, pack_tokens=10, max_documents=3, tables=("rows",))


def pieces_call(**changed) -> tuple:
    arrays = {
        "cu": np.array([0, 2]),
        "sample": np.array([-1, 0]),
        "start": np.array([0, 4], dtype=np.int32),
        "count": np.array([1, 6], dtype=np.int32),
        "token": np.array([3, -2], dtype=np.int32),
        "weight": np.array([1, 1], dtype=np.float32),
        "first": np.array([0]),
        "take": np.array([7]),
        "row": np.array([2]),
        "stored_labels": False,
        "ids": np.zeros(10, dtype=np.int32),
        "target": np.zeros(10, dtype=np.float32),
    }
    return lay_pieces(**(arrays | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"row": np.array([4])},
        {"row": np.array([-1])},
        {"take": np.array([8])},
        {"take": np.array([2**62])},
        {"first": np.array([1])},
        {"first": np.array([-1])},
        {"cu": np.array([0, 3])},
        {"cu": np.array([1, 0])},
        {"cu": np.array([-1, 2])},
        {"cu": np.array([0])},
        {"count": np.array([-1, 9], dtype=np.int32)},
        {"start": np.array([0, -4], dtype=np.int32)},
        {"target": np.zeros(9, dtype=np.float32)},
        {"token": np.zeros(3, dtype=np.int32)},
    ],
)
def test_pieces_that_do_not_fit_are_refused(changed):
    spans, _, _ = pieces_call()
    assert spans.T.tolist() == [[0, 4, 6, 3, 0]]
    with pytest.raises(ValueError, match="assemble: "):
        pieces_call(**changed)


@pytest.mark.parametrize(
    "changed",
    [{"row": [9]}, {"row": [-1]}, {"count": [-1]}, {"start": [-1]}, {"run_cu": [0, 2]}, {"run_cu": [1, 0]}],
)
def test_runs_outside_their_rows_are_refused(changed):
    arrays = {"run_cu": [0, 1], "start": [0], "count": [3], "row": [6]} | changed
    with pytest.raises(ValueError, match="a span lies outside its runs or its rows"):
        spread_runs(
            np.array([3 | 1 << 24], dtype=np.uint32),
            **{name: np.array(v, dtype=np.int64) for name, v in arrays.items()},
            class_weights=np.ones(256, dtype=np.float32),
            target=np.zeros(9, dtype=np.float32),
        )


def as_shards(folder, memory: MemoryDataset, twin: str = "") -> Dataset:
    """The same samples in two shards, with a feature twin beside each."""
    infos, twins = [], []
    for number, samples in enumerate((memory.samples[:7], memory.samples[7:])):
        part = MemoryDataset(samples, schema=memory.schema)
        everything = np.arange(len(samples))
        spans, span_cu = part.segments(everything)
        segments = np.zeros(len(spans), SEGMENT)
        for field in ("start", "modality", "role"):
            segments[field] = spans[field]
        (ids, cu), (runs, run_cu) = part.read(everything), part.loss_runs(everything)
        labels = np.array([x for s in samples for x in s.labels], dtype=np.int32) if memory.schema.labels else None
        facts = {"keys": part.keys(everything), "runs": runs, "run_offsets": run_cu, "labels": labels}
        path = folder / f"{number}.vts"
        with ShardWriter(path, memory.schema, uuid=bytes([number + 1]) * 16) as writer:
            writer.append_batch(ids, cu, segments, span_cu, **facts)
        infos.append(writer.info)
        if twin:
            column = part.features(twin)
            with FeatureWriter(
                folder / f"{number}.{twin}.vtf", path, twin, dim=3, dtype="f4", producer="test"
            ) as features:
                features.append(column.read(everything)[0], column.counts(everything)[0])
            twins.append(features.info)
    listed = {twin: {"kind": "features", "dim": 3, "dtype": "f4", "producer": "test", "files": twins}} if twin else {}
    publish(folder, memory.schema, infos, twins=listed)
    return Dataset(folder)


@pytest.mark.parametrize("name", [name for name in CASES if name != "mixed"])
@pytest.mark.parametrize("cut", [False, True])
def test_real_shards_give_the_same_batches(tmp_path, name, cut):
    [source], [composer] = case(name)
    twin = getattr(composer, "features", "")
    shards = as_shards(tmp_path, source.dataset, twin)
    real = [SimpleNamespace(dataset=shards, name=name)]
    step = step_of([source], [composer], [5, 11, 2], seed=1, cut=cut)
    options = {"pack_tokens": 1000, "max_documents": 20, "tables": ("segments", "rows_by_class"), "caps": (200, 40)}
    expected, found = (Assembler(s, [composer], VOCAB, **options)(step, [2, 0, 1]) for s in ([source], real))
    for mine, theirs in zip(found, expected):
        assert_same(mine, theirs)
        assert torch.equal(mine.segments, theirs.segments)
        assert torch.equal(mine.rows_by_class, theirs.rows_by_class)
    assert ("clip" in found[0].slots) == bool(twin)


def test_raw_packs_of_real_shards(tmp_path):
    memory = weighed(30, "runs", RUNS)
    sources = [SimpleNamespace(dataset=d, name="runs") for d in (memory, as_shards(tmp_path, memory))]
    step = step_of(sources[:1], [LanguageModel()], [5, 11, 2], seed=1)
    packs = (RawAssembler([s], pack_tokens=1000, max_documents=20)(step, [2, 0, 1]) for s in sources)
    for mine, theirs in zip(*packs):
        for name in ("ids", "cu_seqlens", "lengths", "keys", "segments", "segment_cu", "runs", "run_cu"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name


def test_documents_are_laid_end_to_end():
    lengths, documents = np.array([3, 0, 2, 5]), np.array([2, 0, 2])
    ids, cu = np.zeros((3, 7), np.int32), np.zeros((3, 4), np.int32)
    rows, tokens = lay_documents(lengths, documents, cu, ids)
    assert (rows.tolist(), tokens.tolist()) == ([0, 3, 14, 16], [3, 0, 7])
    assert cu.tolist() == [[0, 3, 3, 7], [0, 7, 7, 7], [0, 2, 7, 7]]
    assert ids.tolist() == [[0] * 3 + [-1] * 4, [-1] * 7, [0] * 7]


@pytest.mark.parametrize(
    ("lengths", "documents", "bins", "problem"),
    [
        ([3, 5], [2], 1, "documents that fit their bin"),
        ([3, -1], [2], 1, "documents that fit their bin"),
        ([1, 1, 1, 1], [4], 1, "as many documents as the bins hold"),
        ([1, 1], [1], 1, "as many documents as the bins hold"),
        ([1], [2], 1, "as many documents as the bins hold"),
        ([1], [1], 2, "a row of cu and of ids per bin"),
    ],
)
def test_documents_that_cannot_be_laid_are_refused(lengths, documents, bins, problem):
    with pytest.raises(ValueError, match=problem):
        lay_documents(
            np.array(lengths), np.array(documents), np.zeros((bins, 4), np.int32), np.zeros((bins, 7), np.int32)
        )
