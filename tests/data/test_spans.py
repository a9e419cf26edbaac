"""`read_spans`, labels and columns over every token store and instruction set, against the arrays that were written."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from vtrain import _host
from vtrain.data import manifest
from vtrain.data.format import SEGMENT, STORES, Schema, ShardError
from vtrain.data.reader import Dataset, Shard
from vtrain.data.samples import cumulative
from vtrain.data.writer import ShardWriter
from vtrain.vocab import Vocabulary

COLUMNS = {"a": "u1", "b": "<u2", "c": "<u4", "d": "<u8", "e": "<i4", "f": "<i8", "g": "<f4", "h": "<f8"}
VOCABS = {"u8": 2**8, "u16": 2**16, "u16+1": 2**17, "u16+2": 2**18, "u32": 2**21}
assert list(VOCABS) == list(STORES)


@contextmanager
def isa(name: str | None):
    """Decoding with one instruction set; skips where the machine has none of that name."""
    try:
        _host.force_isa(name)
    except ValueError:
        pytest.skip(f"this machine has no {name}")
    try:
        yield
    finally:
        _host.force_isa(None)


ISAS = ("portable", "avx2", "avx512")


@dataclass
class Written:
    """What went into a dataset: flat ids and labels, cu of the samples, columns."""

    ids: np.ndarray
    labels: np.ndarray
    cu: np.ndarray
    columns: dict[str, np.ndarray]

    def row(self, flat: np.ndarray, sample: int) -> np.ndarray:
        return flat[self.cu[sample] : self.cu[sample + 1]]


def write(folder, store: str, parts: tuple[list[int], ...], labels: bool = True) -> Written:
    """A dataset of one shard per list of lengths, with ids of all bit patterns, labels and columns."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(store))
    size = VOCABS[store]
    schema = Schema(Vocabulary.of(text=size), labels=labels, columns=COLUMNS)
    infos, kept = [], []
    for number, lengths in enumerate(parts):
        cu = cumulative(np.array(lengths, dtype=np.int64))
        ids, targets = rng.integers(0, size, (2, cu[-1]))
        ids[::7], targets[::5] = size - 1, 0
        columns = {n: rng.integers(0, 200, len(lengths)).astype(dtype) for n, dtype in COLUMNS.items()}
        none = np.zeros(0, dtype=SEGMENT), np.zeros(len(lengths) + 1, dtype=np.int64)
        uuid = f"{number:016d}".encode()
        with ShardWriter(folder / f"{number}.vts", schema, uuid=uuid, id_store=store) as writer:
            keys = np.arange(1, len(lengths) + 1, dtype=np.uint64)
            options = {"labels": targets} if labels else {}
            writer.append_batch(ids, cu, *none, keys=keys, columns=columns, **options)
        infos.append(writer.info)
        kept.append((ids, targets, np.diff(cu), columns))
    manifest.publish(folder, schema, infos)
    ids, targets, lengths = (np.concatenate([part[k] for part in kept]) for k in range(3))
    columns = {name: np.concatenate([part[3][name] for part in kept]) for name in COLUMNS}
    return Written(ids, targets, cumulative(lengths), columns)


PARTS = ([97, 0, 33, 1, 96, 20], [0], [], [15, 128, 3] * 5)


@pytest.mark.parametrize("store", VOCABS)
@pytest.mark.parametrize("name", ISAS)
def test_every_start_and_count_of_every_store(tmp_path, store, name):
    written = write(tmp_path, store, PARTS)
    dataset = Dataset(tmp_path)
    with isa(name):
        for sample in (0, 2, 4, 8):
            length = int(np.diff(written.cu)[sample])
            for start in range(min(17, length)):
                counts = np.arange(min(71, length - start))
                room = counts + 3  # what lies between the answers must stay as it was
                at = cumulative(room)[:-1] + 1
                indices, starts = np.full(len(counts), sample), np.full(len(counts), start)
                for stream, flat in (("ids", written.ids), ("labels", written.labels)):
                    out = np.full(room.sum(), -7, dtype=np.int32)
                    expected = out.copy()
                    dataset.read_spans(indices, starts, counts, out, at, stream)
                    for count, place in zip(counts, at):
                        expected[place : place + count] = written.row(flat, sample)[start : start + count]
                    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("store", VOCABS)
def test_whole_samples_in_any_order_and_more_than_a_window_of_them(tmp_path, store):
    written = write(tmp_path, store, PARTS)
    dataset = Dataset(tmp_path)
    assert {shard.footer.store.name for shard in dataset.shards} == {store}
    indices = np.random.default_rng(1).integers(0, len(dataset), 150)
    for method, flat in ((dataset.read, written.ids), (dataset.labels, written.labels)):
        found, cu = method(indices)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(np.diff(cu), np.diff(written.cu)[indices])
        np.testing.assert_array_equal(found, np.concatenate([written.row(flat, i) for i in indices]))
    for name, values in written.columns.items():
        found = dataset.column(name, indices)
        assert found.dtype == np.dtype(COLUMNS[name])
        np.testing.assert_array_equal(found, values[indices])
        np.testing.assert_array_equal(dataset.shards[0].column(name, [5, 0]), values[[5, 0]])
        assert dataset.column(name, []).dtype == np.dtype(COLUMNS[name])


def _sections(shard: Shard) -> list[tuple]:
    return [(s.id, s.offset, s.bytes, s.dtype.itemsize) for s in shard.footer.sections.values()]


@pytest.mark.parametrize("store", VOCABS)
@pytest.mark.parametrize("name", ISAS)
def test_ids_above_those_of_the_footer_are_damage(tmp_path, store, name):
    """Exactly when one is among what is asked, at whatever place; the footer is made to promise one id less."""
    write(tmp_path, store, ([90],))
    shard = Shard(tmp_path / "0.vts")
    zero, out = np.zeros(1, dtype=np.int64), np.empty(90, dtype=np.int32)
    for labels, flat in ((False, shard.read([0])[0]), (True, shard.labels([0])[0])):
        top = int(flat.max())
        table = _host.ShardTable("one", [0, 1], [])
        table.attach(0, "one", shard.data, _sections(shard), top - 1)
        for start, count in np.ndindex(20, 40):
            asked = (zero, np.array([start]), np.array([count]), out, zero, labels)
            with isa(name):
                if flat[start : start + count].max(initial=0) < top:
                    table.read_spans(*asked)
                    continue
                with pytest.raises(ShardError, match=f"id {top}; the footer says at most {top - 1}"):
                    table.read_spans(*asked)


@pytest.fixture
def small(tmp_path):
    write(tmp_path, "u16", ([10, 4], [6]), labels=False)
    return Dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"starts": [0, 5]}, ValueError, "4 tokens from 5 of sample 1, which has 4"),
        ({"starts": [-1, 0]}, ValueError, "3 tokens from -1 of sample 0, which has 10"),
        ({"starts": [2**63 - 1, 0]}, ValueError, "3 tokens from 9223372036854775807 of sample 0"),
        ({"counts": [3, 5], "at": [0, 0]}, ValueError, "5 tokens from 0 of sample 1, which has 4"),
        ({"counts": [-1, 0]}, ValueError, "-1 tokens to place 0 of 8"),
        ({"at": [0, 5]}, ValueError, "4 tokens to place 5 of 8"),
        ({"at": [-1, 4]}, ValueError, "3 tokens to place -1 of 8"),
        ({"at": [2**63 - 1, 4]}, ValueError, "to place 9223372036854775807 of 8"),
        ({"at": [0]}, ValueError, "differ in length"),
        ({"counts": [1, 2, 3]}, ValueError, "differ in length"),
        ({"indices": [0, 3]}, IndexError, "sample 3 asked for; it has 3"),
        ({"indices": [-1, 0]}, IndexError, "sample -1 asked for; it has 3"),
        ({"indices": [0.0, 1.0]}, IndexError, "expected a 1-d array of integers"),
        ({"starts": [[0, 0]]}, IndexError, "expected a 1-d array of integers"),
        ({"stream": "words"}, ValueError, "stream 'words'; expected ids or labels"),
        ({"stream": "labels"}, ValueError, "its schema stores no labels"),
    ],
)
def test_spans_that_cannot_be_are_refused(small, change, error, message):
    asked = {"indices": [0, 1], "starts": [0, 0], "counts": [3, 4], "at": [0, 4], "stream": "ids"} | change
    out = np.full(8 + 16, -7, dtype=np.int32)
    with pytest.raises(error, match=message):
        small.read_spans(asked["indices"], asked["starts"], asked["counts"], out[:8], asked["at"], asked["stream"])
    assert (out[8:] == -7).all()


def test_an_answer_goes_only_into_what_can_take_it(small):
    zero, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    for out in (np.zeros(8, np.int64), np.zeros(8, np.float32), np.zeros((8, 2), np.int32)[:, 0]):
        with pytest.raises(TypeError):
            small.read_spans(zero, zero, one, out, zero)
    sealed = np.zeros(8, np.int32)
    sealed.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        small.read_spans(zero, zero, one, sealed, zero)
    out = np.full((2, 4), -7, dtype=np.int32)
    small.read_spans([], [], [], out, [])
    assert (out == -7).all()
    small.read_spans([0, 0], [3, 0], [0, 2], out, [8, 3])  # rows of a slab are one flat array
    np.testing.assert_array_equal(out.ravel()[3:5], small.read([0])[0][:2])


def test_columns_and_labels_that_are_not_there(small):
    with pytest.raises(ValueError, match="no column 'z'; expected one of: a, b, c, d, e, f, g, h"):
        small.column("z", [0])
    with pytest.raises(IndexError):
        small.column("a", [3])
    with pytest.raises(ValueError, match="no labels"):
        small.labels([0])
    with pytest.raises(ValueError, match="no labels"):
        small.shards[0].labels([0])


def test_the_table_believes_nobody(tmp_path):
    """What Python hands to C++ is checked there again: sections, counts, numbers, in the words of one line."""
    write(tmp_path, "u16+1", ([5, 6],))
    shard = Shard(tmp_path / "0.vts")
    good = {entry[0]: entry for entry in _sections(shard)}
    size = shard.footer.file_bytes

    def attach(number=0, starts=(0, 2), drop=(), **changed):
        sections = [changed.get(id, entry) for id, entry in good.items() if id not in drop]
        table = _host.ShardTable("t", list(starts), [("KEY", 8), ("COL.a", 1)])
        table.attach(number, "f", shard.data, sections, 2**17)
        return table

    assert attach().lengths(np.array([1])).tolist() == [6]
    for wrong in (
        {"OFF": ("OFF", size, 12, 4)},
        {"OFF": ("OFF", good["OFF"][1], 2**63, 4)},
        {"OFF": ("OFF", 2**64 - 8, 12, 4)},
        {"OFF": ("OFF", good["OFF"][1] + 4, 12, 4)},
        {"OFF": ("OFF", good["OFF"][1], 8, 4)},
        {"SEGO": ("SEGO", good["SEGO"][1], 12, 0)},
        {"SEG": ("SEG", good["SEG"][1], 0, 8)},
        {"TOK": ("TOK", good["TOK"][1], 24, 3)},
        {"TOK": ("TOK", good["TOK"][1], 44, 4)},
        {"TOK1": ("TOK1", good["TOK1"][1], 1, 1)},
        {"TOK1": ("TOK2", good["TOK1"][1], 2, 1)},
        {"LBL": ("LBL", good["LBL"][1], 20, 2)},
        {"KEY": ("KEY", good["KEY"][1], 8, 8)},
        {"COL.a": ("COL.a", good["COL.a"][1], 2, 2)},
        {"starts": (0, 3)},
        {"starts": (0, 2**61)},
        *({"drop": (id,)} for id in ("TOK", "OFF", "SEG", "SEGO", "KEY", "COL.a")),
    ):
        with pytest.raises(ShardError, match=r"^f: "):
            attach(**wrong)
    with pytest.raises(IndexError):
        attach(number=1)
    for starts in ((), (1, 2), (0, 2, 1), (0, 2**62)):
        with pytest.raises(ValueError, match="rise from 0"):
            _host.ShardTable("t", list(starts), [])
    table = _host.ShardTable("t", [0, 2, 4], [])
    assert table.missing(np.array([3, 2, 3])) == [1]
    with pytest.raises(ValueError, match="shard 1 has no file"):
        table.lengths(np.array([2]))
    with pytest.raises(IndexError):
        table.column(0, np.array([0]))
    attached = attach()
    attached.attach(0, "again", shard.data, [], 1)
    assert attached.lengths(np.array([1])).tolist() == [6]
